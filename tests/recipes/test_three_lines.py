"""What a user types after the demo, in every order, twice."""

import itertools
import json

import pytest

pytestmark = pytest.mark.weights

LINES = {
    "extract": "featcache extract --backbone vit-b",
    "train": "featcache train-adaptor",
    # -o: the environment of this test counts as installed, nothing is to be installed here
    "finetune": "make -o .venv/.demo finetune-covidx",
}
ORDERS = list(itertools.permutations(LINES))


def run_of_table(clone) -> str:
    tables = sorted((clone.root / "finetune-covidx" / "results").rglob("results.json"))
    return " ".join(path.parents[2].name for path in tables)


def follow(clone, order) -> None:
    """Type the lines twice; each must work, and take what is current at its turn."""
    image_set, run = "lite0-demo", "lite0-demo"
    for _, name in itertools.product(range(2), order):
        done = clone.type(LINES[name])
        assert done.returncode == 0, done.stderr
        state = json.loads((clone.root / "workspace.json").read_text())
        if name == "extract":
            image_set = "vit-b"
        if name == "train":
            run = image_set
        if name == "finetune":
            assert f"run {run}-minilm-demo" in done.stderr
            assert "covidx (synthetic stand-in)" in done.stdout
            assert f"{run}-minilm-demo" in run_of_table(clone)
        assert state["image"] == image_set
        assert state["manifest"] == "demo"
        assert state["text"] == "minilm-demo"
        assert state["run"].startswith(f"{run}-minilm-demo")


def test_the_three_lines_in_the_order_of_the_readme_twice(clone):
    follow(clone, ORDERS[0])


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS[1:], ids="-".join)
def test_the_three_lines_in_every_other_order_twice(clone, order):
    follow(clone, order)


def test_without_a_run_the_recipe_trains_nothing_of_the_users(clone):
    """Only the first step of the recipe: it must leave a trained workspace alone."""
    before = (clone.root / "workspace.json").read_bytes()
    done = clone.call("featcache demo --unless-trained")
    assert done.returncode == 0
    assert "trained already" in done.stdout
    assert (clone.root / "workspace.json").read_bytes() == before
