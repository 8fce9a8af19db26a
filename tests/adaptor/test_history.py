import math

import pytest

from featcache.adaptor.history import History
from featcache.errors import TrainingError


def history(*values):
    one = History(5)
    for value in values:
        one.add({"mrr": value, "images": 3})
    return one


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([], None),
        ([0.1, 0.3, 0.2], 1),
        ([0.3, 0.3], 0),
        ([math.nan, 0.1, math.nan, 0.2], 3),
        ([math.nan, math.inf], None),
        ([0.0], 0),
    ],
)
def test_the_best_epoch_is_the_first_highest_of_the_defined_ones(values, best):
    assert history(*values).best_epoch == best


def test_what_a_checkpoint_keeps_goes_on():
    before, after = history(0.1, math.nan), History(5)
    before.last_loss = 0.5
    after.go_on(before.state())
    assert after.validations == before.validations
    assert after.outcome(10)["final_loss"] == 0.5
    assert after.elapsed_s >= before.before_s
    with pytest.raises(TrainingError, match="does not say what was measured"):
        after.go_on({"validations": [3]})


def test_the_last_words_tell_what_could_not_be_measured():
    assert "undefined in every epoch" in history(math.nan).last_words(5)
    assert "undefined in the last epoch; best epoch 1" in history(0.1, math.nan).last_words(10)
    assert history().last_words(10).startswith("2 epochs in ")
