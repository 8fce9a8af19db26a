"""Synthetic trees that several test modules read and none changes, drawn once a session."""

from functools import cache

import pytest

from featcache.synth.registry import synthesize


@pytest.fixture(scope="session")
def draw_tree(tmp_path_factory):
    """Draws the tree of a data set by its name, at the first call."""
    return cache(lambda name: synthesize(name, tmp_path_factory.mktemp(name) / "tree"))


def _tree(dataset):
    @pytest.fixture(scope="session", name=f"{dataset.replace('-', '_')}_tree")
    def tree(draw_tree):
        return draw_tree(dataset).path

    return tree


covidx_tree = _tree("covidx")
mimic_cxr_jpg_tree = _tree("mimic-cxr-jpg")
rsna_tree = _tree("rsna")
siim_tree = _tree("siim")
