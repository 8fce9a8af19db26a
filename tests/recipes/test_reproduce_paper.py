"""The recipe of the paper's tables: what it types, and a small one from end to end."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word"; done >> "$RECORD"
echo >> "$RECORD"
[ "$1" != use ] || printf 'current in x\\nmanifest  made\\nimage     a\\ntext      v\\nrun  r\\n'
"""


def lines_of(tmp_path, recipe="reproduce-paper", **variables) -> list[list[str]]:
    """What a recipe types into a program that only writes it down."""
    root = tmp_path / "a b (1)"
    for name in ("image/a", "image/b", "text/v"):
        (root / "features" / name).mkdir(parents=True)
    program = tmp_path / "bin" / "featcache"
    program.parent.mkdir()
    program.write_text(RECORDER)
    program.chmod(0o755)
    record = tmp_path / "record"
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "RECORD": str(record),
        "FEATCACHE_ROOT": str(root),
    }
    subprocess.run(["sh", PIPELINES / f"{recipe}.sh"], env=environment | variables, check=True)
    return [line.rstrip("\t").split("\t") for line in record.read_text().splitlines()]


def of(lines, *names):
    return [line for line in lines if line[0] in names]


def root_of(line):
    return line[line.index("--root") + 1]


def test_four_heads_of_the_current_run_then_the_page(tmp_path):
    lines = lines_of(tmp_path, RSNA="/my rsna", PROBES="--set seeds=1", MASKS="--set steps=9")
    main = str(tmp_path / "a b (1)")
    assert of(lines, "train-adaptor") == []
    heads = of(lines, "finetune", "segment")
    assert [line[0] for line in heads] == ["finetune", "finetune", "segment", "segment"]
    assert all(line[line.index("--run") + 1] == main for line in heads)
    assert [line[-2:] for line in heads[:2]] == [["--set", "seeds=1"]] * 2
    assert [line[-2:] for line in heads[2:]] == [["--set", "steps=9"]] * 2
    assert lines[-1] == ["reproduce", "--root", main]


def places(lines):
    return [Path(root_of(line)).name for line in of(lines, "finetune", "segment")]


def test_stand_ins_have_folders_of_their_own_and_quick_decoders(tmp_path):
    """So neither their features nor their reads of the test split are in the way of real ones."""
    lines = lines_of(tmp_path, RSNA="/my rsna")
    trees = {line[1]: line[2] for line in of(lines, "manifest")}
    assert trees == {"rsna": "/my rsna", "covidx": "synthetic", "siim": "synthetic"}
    assert places(lines) == ["finetune-rsna", "stand-in-covidx", "stand-in-siim", "finetune-rsna"]
    siim, rsna = of(lines, "segment")
    assert siim[-4:] == ["--set", "seeds=1", "--set", "steps=100"]
    assert rsna[-2:] == ["--set", "decoder=linear"]


@pytest.mark.parametrize(
    ("recipe", "tree"),
    [
        ("finetune-rsna", "RSNA"),
        ("finetune-covidx", "COVIDX"),
        ("finetune-chexpert", "CHEXPERT"),
        ("segment-rsna", "RSNA"),
        ("segment-siim", "SIIM"),
    ],
)
def test_a_stand_in_is_not_in_the_way_of_the_real_pictures(tmp_path, recipe, tree):
    """Its read of the test split would refuse theirs."""
    drawn, real = (
        lines_of(tmp_path / name, recipe, **{tree: path})
        for name, path in (("drawn", ""), ("real", "/data"))
    )
    assert places(drawn) == [f"{recipe}-stand-in"]
    assert places(real) == [recipe]
    for lines in (drawn, real):
        own = {root_of(line) for line in lines if line[0] != "demo"}
        assert len(own) == 1


def test_rsna_that_was_encoded_for_masks_already_is_taken(tmp_path):
    (tmp_path / "a b (1)" / "segment-rsna").mkdir(parents=True)
    trees = {"RSNA": "/my rsna", "SIIM": "/my siim", "COVIDX": "/my covidx"}
    lines = lines_of(tmp_path, **trees)
    assert places(lines) == ["finetune-rsna", "finetune-covidx", "segment-siim", "segment-rsna"]


def test_named_encoders_get_an_adaptor_in_a_workspace_of_its_own(tmp_path):
    settings = "--config configs/runs/paper.yaml"
    lines = lines_of(tmp_path, BACKBONE="b", TEXT_ENCODER="new", TRAIN=settings)
    main = f"{tmp_path}/a b (1)"
    work = f"{main}/reproduce-paper"
    given = ["--manifest", f"{main}/manifests/made", "--root", work]
    assert of(lines, "extract")[0] == [
        *("extract", "--backbone", "none", "--text-encoder", "new"),
        *given,
    ]
    (training,) = of(lines, "train-adaptor")
    assert training == [
        *("train-adaptor", *given, "--backbone", f"{main}/features/image/b"),
        *settings.split(),
    ]
    heads = of(lines, "finetune", "segment")
    assert all(line[line.index("--run") + 1] == work for line in heads)
    assert lines[-1] == ["reproduce", "--root", work]


def test_the_text_encoder_that_is_current_goes_with_a_new_backbone(tmp_path):
    lines = lines_of(tmp_path, BACKBONE="new")
    main = f"{tmp_path}/a b (1)"
    assert of(lines, "extract")[0][:5] == [
        *("extract", "--backbone", "new", "--text-encoder", "none"),
    ]
    (training,) = of(lines, "train-adaptor")
    assert training[-2:] == ["--text-encoder", f"{main}/features/text/v"]
    assert "--backbone" not in training


@pytest.mark.weights
@pytest.mark.slow
def test_it_makes_all_tables_and_goes_on_where_it_was(clone):
    quick = "--set seeds=1 --set subsets=1 --set draws=100 --set random_encoder=false"
    masks = f"{quick} --set steps=5 --set learning_rates=[1e-2]"
    line = f"PROBES={shlex.quote(quick)} MASKS={shlex.quote(masks)} make -o .venv/.demo"
    first = clone.type(f"{line} reproduce-paper")
    assert first.returncode == 0, first.stderr
    page = first.stdout[first.stdout.index("# The paper's tables beside run") :]
    assert page.count("**Synthetic stand-in**") == 4
    assert "Not made yet" not in page
    (file,) = clone.root.rglob("reproduction.json")
    tables = json.loads(file.read_text())["tables"]
    assert [len(table["ours"]) for table in tables] == [1] * 4
    assert all(table["ours"][0]["missing_shares"] == [] for table in tables)
    kept = {path: path.read_bytes() for path in clone.root.rglob("results.json")}
    second = clone.type(f"{line} reproduce-paper")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("found finished, left untouched") == 5
    assert second.stdout.endswith(page)
    assert {path: path.read_bytes() for path in clone.root.rglob("results.json")} == kept
    assert (clone.root / "workspace.json").read_bytes() != b""
