"""The paper's figures and the defects of its protocol: data that must hold together."""

import ast
import inspect
from pathlib import Path

import pytest

from featcache.datasets.challenge import rsna_splits
from featcache.datasets.covid import published
from featcache.errors import ConfigError
from featcache.heads.paper import NO_CHECK, PROVED, SHARES, read_defects, read_paper
from featcache.heads.published import read_published

ROOT = Path(__file__).parents[2]
TABLES = {table.name: table for table in read_paper().tables}
DEFECTS = read_defects()
CHECKS = sorted({check for one in DEFECTS.by_name.values() for check in one.checks})


def best(table, encoder):
    return [max(table.of_texts(encoder, share)) for share in SHARES]


def mean(table, encoder):
    return [round(sum(table.of_texts(encoder, share)) / 5, 1) for share in SHARES]


def test_every_table_has_three_image_and_five_text_encoders():
    for table in TABLES.values():
        assert len(table.cells) == 3
        assert all(len(texts) == 5 for texts in table.cells.values()), table.name
        assert all(set(again) == set(table.cells[name]) for name, again in table.repeat.items())


def test_own_splits_are_called_as_the_readers_call_them():
    classes, masks = TABLES["rsna-classification"], TABLES["rsna-segmentation"]
    assert {classes.split, masks.split} < set(rsna_splits.RECIPES)
    assert f"the published lists, {PROVED[1]}" in inspect.getsource(rsna_splits.recompute)
    covid = inspect.getsource(published.split_as_mgca)
    assert f'f"{TABLES["covidx"].split}, by image' in covid
    assert f"equal to the published one {PROVED[0]}" in covid
    # images of several splits are moved, so that ours is never the paper's
    assert not TABLES["siim-segmentation"].is_split_of(f"mgca, {PROVED[0]}")


def test_the_printed_row_is_the_best_text_encoder_of_each_column():
    assert best(TABLES["rsna-classification"], "DINOv2-B") == [84.4, 85.6, 86.8]
    assert best(TABLES["covidx"], "DINOv2-B") == [71.0, 87.5, 92.3]


def test_rows_beside_our_tables_are_those_of_the_cells():
    """`published.yaml` has the Adaptor's rows, too: best of five, or their mean."""
    checked = 0
    for table in TABLES.values():
        (beside,) = (
            one
            for one in read_published().tables
            if (one.head, one.dataset) == (table.head, table.dataset)
        )
        for row in beside.rows:
            encoder = row.method.removeprefix("Adaptor (reference) ")
            if encoder == row.method:
                continue
            want = mean(table, encoder) if row.source == "mean" else best(table, encoder)
            assert list(row.at.values()) == want, (table.name, row.method)
            checked += 1
    assert checked == 8


def test_the_autoencoder_has_one_figure_on_siim():
    table = TABLES["siim-segmentation"]
    figures = [one for row in table.cells["ResNet-AE"].values() for one in row]
    assert sorted(figures) == [73.0] + [table.trivial.figure] * 14


def test_masks_of_few_labels_score_less_than_none():
    for name, above in (("siim-segmentation", 0.6), ("rsna-segmentation", 1.5)):
        table = TABLES[name]
        nothing = table.trivial.figure
        for encoder in ("DINOv2-S", "DINOv2-B"):
            few, some, all_labels = best(table, encoder)
            assert max(few, some) < nothing
            assert all_labels <= nothing + above + 1e-9


def test_two_exports_of_the_same_runs_lie_nineteen_points_apart():
    assert TABLES["rsna-segmentation"].largest_move == pytest.approx(68.9 - 50.1)
    assert TABLES["covidx"].largest_move == 0


def names_in(path: Path) -> set[str]:
    """Functions and classes of a module, and names that it sets at its top."""
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            names |= {one.id for one in ast.walk(target) if isinstance(one, ast.Name)}
    return names


@pytest.mark.parametrize("check", CHECKS)
def test_what_would_have_caught_a_defect_exists(check):
    path, _, name = check.partition("::")
    assert name in names_in(ROOT / path)


def test_every_check_but_a_row_is_a_test():
    for name, one in DEFECTS.by_name.items():
        assert any(check.startswith("tests/") for check in one.checks), name


def test_every_difference_of_the_protocols_is_a_known_defect():
    for table in TABLES.values():
        named = {name for one in table.differs for name in one.defects}
        assert named <= set(DEFECTS.by_name), table.name


def test_the_page_about_the_paper_has_the_list():
    """Changed `defects.yaml`? Put what this prints into docs/replication.md."""
    page = (ROOT / "docs" / "replication.md").read_text()
    want = "\n".join(DEFECTS.lines())
    assert want in page, want


def write(tmp_path, text):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    return file


def test_a_defect_without_any_check_has_to_say_so(tmp_path):
    text = "groups: {A: {X1: {what: w, here: 'it is fine', checks: []}}}"
    with pytest.raises(ConfigError, match=NO_CHECK):
        read_defects(write(tmp_path, text))
    said = read_defects(write(tmp_path, text.replace("it is fine", f"{NO_CHECK}.")))
    assert said.lines() == ["**A**", "", f"- **X1** w *Here:* {NO_CHECK}. *Checks:* none."]


def test_a_defect_stands_in_one_group(tmp_path):
    one = f"{{what: w, here: {NO_CHECK}, checks: []}}"
    with pytest.raises(ConfigError, match="`X1` stands in two groups"):
        read_defects(write(tmp_path, f"groups: {{A: {{X1: {one}}}, B: {{X1: {one}}}}}"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[77.0, 79.0, 81.3]", "[77.0, 79.0]", "a figure for each of 1, 10 and 100"),
        ("[77.0, 79.0, 81.3]", "[77.0, 79.0, 813]", "in percent"),
        ("head: classify", "head: retrieve", "head"),
    ],
)
def test_cells_that_cannot_be_are_refused(tmp_path, old, new, words):
    from featcache.heads.paper import PAPER_FILE

    text = PAPER_FILE.read_text()
    assert old in text
    with pytest.raises(ConfigError, match=words):
        read_paper(write(tmp_path, text.replace(old, new)))
