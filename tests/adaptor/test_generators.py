import random

import numpy as np
import pytest
import torch

from featcache.adaptor.generators import (
    generator_states,
    seed_rank,
    seeded,
    set_generator_states,
)
from featcache.errors import TrainingError

CPU = torch.device("cpu")


def drawn():
    return [torch.rand(2).tolist(), np.random.rand(2).tolist()]  # noqa: NPY002


def test_generators_go_on_where_they_were_taken():
    with seeded(3, "cpu"):
        drawn()
        states = generator_states(CPU)
        expected = drawn()
    with seeded(4, "cpu"):
        set_generator_states(states, CPU, 0)
        assert drawn() == expected


def test_pythons_own_generator_too():
    # The type checks of the tests draw from it, so it is compared with itself.
    random.gauss(0, 1)  # holds a second number back
    states = generator_states(CPU)
    found = []
    for _ in range(2):
        set_generator_states(states, CPU, 0)
        found.append([random.gauss(0, 1), random.random()])
    assert found[0] == found[1]


def test_a_seed_acts_inside_alone():
    with seeded(5, "cpu"):
        states, before = generator_states(CPU), drawn()
        with seeded(6, "cpu"):
            assert drawn() != before
        after = drawn()
        set_generator_states(states, CPU, 0)
        assert [before, after] == [drawn(), drawn()]


def test_ranks_draw_apart_and_rank_0_goes_on():
    found = []
    for rank in range(3):
        with seeded(7, "cpu"):
            seed_rank(7, rank)
            found.append(torch.rand(1).item())
    assert len(set(found)) == 3
    with seeded(7, "cpu"):
        assert torch.rand(1).item() == found[0]


@pytest.mark.parametrize("harm", [lambda s: s.pop("torch"), lambda s: s.update(numpy=[1, 2])])
def test_other_states_are_refused_in_words(harm):
    states = generator_states(CPU)
    harm(states)
    with pytest.raises(TrainingError, match="cannot be used"):
        set_generator_states(states, CPU, 0)


def test_states_of_fewer_ranks_are_refused_in_words():
    with pytest.raises(TrainingError, match="cannot be used"):
        set_generator_states(generator_states(CPU), CPU, 1)
