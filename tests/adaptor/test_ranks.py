"""Two real processes that train together compute what one process with all pairs does."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adaptor import rank_worker
from safetensors.torch import load_file

from featcache.adaptor.losses import Ids, positives
from featcache.adaptor.ranks import Ranks

TESTS = Path(__file__).parents[1]
RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, TESTS / "adaptor" / "rank_worker.py"]
    started = [
        subprocess.Popen([*command, str(rank), str(RANKS), str(folder)], env=environment)
        for rank in range(RANKS)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(RANKS)]


@pytest.mark.parametrize("case", rank_worker.CASES)
def test_two_ranks_have_the_loss_and_the_gradients_of_one(found, case):
    step = rank_worker.Step(case)
    alone = rank_worker.results(step, step(rank_worker.whole_batch(), None), case)
    together = torch.cat([gradient.flatten() for gradient in alone.values()])
    for rank in range(RANKS):
        theirs = {name: found[rank][name] for name in alone}
        assert torch.allclose(theirs[f"{case}/loss"], alone[f"{case}/loss"], rtol=1e-6, atol=0)
        error = (torch.cat([part.flatten() for part in theirs.values()]) - together).norm()
        assert error <= 1e-6 * together.norm()
        for name, expected in alone.items():
            # A scalar's gradient is a sum that cancels; those of `paper`'s queries are zero.
            error = (theirs[name] - expected).norm()
            assert error <= 5e-6 * expected.norm() + 1e-9, f"{name}: {error / expected.norm()}"


def test_pairs_that_no_rank_holds_do_matter(found):
    ids = Ids.of(rank_worker.whole_batch())
    known = replace(ids, known=rank_worker.known_pairs())
    missed = positives(known, known) & ~positives(ids, ids)
    assert missed[:8, 8:].any()  # an image of one rank, a text of the other
    for objective, is_same in (("dual", False), ("paper", True)):
        losses = (found[0][f"{objective}-cosine-infonce-{how}/loss"] for how in ("queue", "known"))
        assert torch.equal(*losses) is is_same


def test_a_process_alone_has_no_ranks():
    assert Ranks.current() is None


def test_texts_of_other_ranks_do_matter(found):
    case = "dual-cosine-infonce-plain"
    step, whole = rank_worker.Step(case), rank_worker.whole_batch()
    half = type(whole)(**{name: tensor[:8] for name, tensor in vars(whole).items()})
    assert not torch.isclose(step(half, None), found[0][f"{case}/loss"][0], rtol=0.05)
