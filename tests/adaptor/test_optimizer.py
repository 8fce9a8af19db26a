from functools import partial

import pytest

from featcache.adaptor.model import Adaptor
from featcache.adaptor.optimizer import learning_rate_factor, parameter_groups


def test_the_rate_rises_then_falls_in_a_straight_line():
    factor = partial(learning_rate_factor, total=10, warmup=0.2, schedule="linear")
    assert [factor(step) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert factor(9) == 0.125


def test_the_rate_falls_along_half_a_cosine():
    factor = partial(learning_rate_factor, total=8, warmup=0.0, schedule="cosine")
    assert factor(0) == 1.0
    assert factor(4) == pytest.approx(0.5)
    assert 0 < factor(7) < 0.05


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (1, 0.9), (3, 0.5), (200, 0.02)])
def test_the_rate_is_never_zero_nor_above_its_highest(schedule, total, warmup):
    factors = [
        learning_rate_factor(step, total=total, warmup=warmup, schedule=schedule)
        for step in range(total)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0


def test_only_matrices_decay():
    adaptor = Adaptor(12, 8, dim=16, layers=1, heads=2, feedforward=24)
    decayed, kept = parameter_groups([adaptor], 0.1)
    names = {id(parameter): name for name, parameter in adaptor.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "image_projection.weight",
        "text_projection.weight",
        *(f"blocks.0.{name}.weight" for name in ("query", "key_value", "out", "expand")),
        "blocks.0.contract.weight",
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
