"""Synthetic trees that several test modules read and none changes, drawn once a session."""

import pytest

from featcache.synth.registry import synthesize


def _tree(dataset):
    @pytest.fixture(scope="session", name=f"{dataset.replace('-', '_')}_tree")
    def tree(tmp_path_factory):
        return synthesize(dataset, tmp_path_factory.mktemp(dataset) / "tree").path

    return tree


covidx_tree = _tree("covidx")
mimic_cxr_jpg_tree = _tree("mimic-cxr-jpg")
rsna_tree = _tree("rsna")
siim_tree = _tree("siim")
