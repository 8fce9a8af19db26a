"""The bench of large manifests: its sources are read as what they stand for."""

from pathlib import Path

import pytest

from featcache.bench.case import Setting
from featcache.bench.groups import manifest
from featcache.datasets import mimic_cxr_jpg, spreadsheet
from featcache.errors import ManifestError


def test_every_row_of_the_table_is_an_image_with_its_own_report(tmp_path):
    table = manifest.write_table(tmp_path / "source", 60)
    made = spreadsheet.read(table, tmp_path / "m", options=spreadsheet.Options())
    assert len(made.keys) == len(made.unique_texts()[1]) == 60
    assert set(made.splits()) == {"train", "validate", "test"}
    first = [line.partition(",")[0] for line in table.read_text().splitlines()[1:]]
    assert first != sorted(first)


def test_the_imitated_mimic_has_nothing_to_drop_but_laterals(tmp_path):
    tree = manifest.write_mimic(tmp_path / "source", 300)
    made = mimic_cxr_jpg.read(tree, tmp_path / "m", options=mimic_cxr_jpg.Options())
    reasons = {reason for step in made.meta.funnel for reason in step.dropped}
    assert (len(made.keys), reasons) == (200, {"another view"})
    assert set(made.splits()) == {"train", "validate", "test"}


@pytest.mark.parametrize("bench", manifest.BENCHES[::3], ids=lambda bench: bench.name)
def test_a_command_of_its_own_is_measured(tmp_path, bench):
    found = bench.measure(Setting(tmp_path, 1, quick=True, quiet=True))
    assert 0 < found.figure < 100
    assert found.detail["cpu_s"][0] > 0.1
    assert 0.05 < found.detail["peak_gb"][0] < 1


def test_a_command_that_fails_is_no_figure(tmp_path, capfd):
    with pytest.raises(ManifestError, match="could not be made"):
        manifest._make("spreadsheet", Path("nowhere.csv"), tmp_path)
    assert "nowhere.csv" in capfd.readouterr().err
