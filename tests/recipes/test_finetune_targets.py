"""The recipes of probes on data sets, as a user types them."""

import pytest

pytestmark = [pytest.mark.weights, pytest.mark.slow]


def test_rsna_has_a_table_of_probes_and_one_of_sentences(clone):
    done = clone.type("make -o .venv/.demo finetune-rsna")
    assert done.returncode == 0, done.stderr
    assert "Linear probes: rsna, label `pneumonia`" in done.stdout
    assert "Zero-shot: rsna" in done.stdout
    said = " ".join(done.stdout.split())  # lines are wrapped wherever a number ends
    assert "none stand beside this synthetic stand-in" in said


def test_chexpert_has_all_its_findings_in_one_table(clone):
    done = clone.type("make -o .venv/.demo finetune-chexpert")
    assert done.returncode == 0, done.stderr
    assert "Linear probes: chexpert, findings" in done.stdout
    assert "blank ones as absent (blank=negative)" in " ".join(done.stdout.split())
