"""Trainings that go on after they were killed or told to stop, and checkpoints that mislead."""

import shlex
import signal

import pytest
import torch

from featcache.adaptor.checkpoint import read_checkpoint, write_checkpoint
from featcache.errors import TrainingError


@pytest.fixture(scope="module")
def space(make_space):
    return make_space()


@pytest.fixture(scope="module")
def undisturbed(space):
    assert space.train("undisturbed") == 0
    return space.result("undisturbed")


@pytest.mark.parametrize(
    ("every", "step"),
    [(1, 7), (1, 5), (1, 4), (3, 8), (100, 3)],
    ids=["at a step", "at an epoch's edge", "one before it", "after two more", "unsaved"],
)
def test_killed_and_resumed_equals_undisturbed(space, undisturbed, every, step):
    name = f"killed-{every}-{step}"
    hurt = ("after", step, signal.SIGKILL)
    assert space.train(name, hurt, checkpoint_every=every) == -signal.SIGKILL
    assert space.train(name, checkpoint_every=every, threads=3) == 0
    assert ("goes on after step" in space.said()) == (every < 100)
    assert space.result(name) == undisturbed


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGTERM, 143, 7), (signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 14)],
    ids=["SIGTERM", "Ctrl-C at an epoch's edge", "SIGTERM one before the last"],
)
def test_a_signal_stops_after_the_step_and_names_what_goes_on(
    space, undisturbed, number, code, step
):
    name = f"stopped-{number}-{step}"
    assert space.train(name, ("during", step, number)) == code
    said = space.said()
    assert "Traceback" not in said
    assert f"error: training stopped after step {step} of 15; checkpoint step-00000" in said
    assert space.checkpoints(name) == [f"step-{step:09d}"]
    assert not (space.root / "runs" / name / "adaptor").exists()
    (command,) = [line for line in said.splitlines() if line.startswith("  try: ")]
    program, *arguments = shlex.split(command.removeprefix("  try: "))
    assert program == "featcache"
    assert space.type(arguments) == 0
    assert space.result(name) == undisturbed


def test_a_signal_in_the_last_step_changes_nothing(space, undisturbed):
    assert space.train("late", ("during", 15, signal.SIGTERM)) == 0
    assert space.result("late") == undisturbed


def test_two_checkpoints_are_kept(space):
    hurt = ("after", 9, signal.SIGKILL)
    assert space.train("kept", hurt, checkpoint_every=2) == -signal.SIGKILL
    assert space.checkpoints("kept") == ["step-000000006", "step-000000008"]
    folder = space.root / "runs" / "kept" / "checkpoints" / "step-000000008"
    assert {path.name for path in folder.iterdir()} == {"state.json", "tensors.safetensors"}
    assert not list((space.root / "runs").rglob("*.ckpt"))


@pytest.fixture
def unfinished(run, break_gradient, monkeypatch, tmp_path):
    """Change the checkpoint of a training that stopped after step 7, checksums and all; go on."""
    break_gradient(first=8)
    with pytest.raises(TrainingError):
        run(checkpoint_every=7)
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints" / "step-000000007"

    def go_on(change):
        state = read_checkpoint(folder)
        change(state)
        write_checkpoint(folder, state)
        return run(checkpoint_every=7)

    return go_on


def first_moment(state):
    return next(iter(state["optimizer_states"][0]["state"].values()))


def counts_of_epochs(state):
    return state["loops"]["fit_loop"]["epoch_progress"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.update(optimizer_states=[]), "optimizer_states"),
        (lambda state: state.update(lr_schedulers=[]), "lr_schedulers"),
        (lambda state: state.update(loops=3), "loops"),
        (lambda state: state["loops"]["fit_loop"]["state_dict"].clear(), "loops"),
        (lambda state: counts_of_epochs(state)["total"].update(started="x"), "loops"),
        (lambda state: state.update(callbacks="x"), "AttributeError"),
        (lambda state: first_moment(state).update(exp_avg=torch.zeros(1)), "optimizer_states"),
        (lambda state: first_moment(state).update(step=torch.tensor(99.0)), "optimizer_states"),
        (lambda state: state["optimizer_states"][0]["param_groups"][0].update(betas=(0, 0)), "opt"),
        (lambda state: state["featcache"].update(step=5), "step"),
        (lambda state: state["featcache"].update(step="seven"), "step"),
        (lambda state: state["featcache"].update(identity=None), "identity"),
        (lambda state: state["featcache"].update(generators={}), "generators"),
    ],
)
def test_a_checkpoint_that_does_not_lead_back_to_its_step_is_refused(unfinished, change, named):
    with pytest.raises(TrainingError, match=r"cannot go on from this|no checkpoint of a") as caught:
        unfinished(change)
    assert named in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.where.endswith("step-000000007/state.json")
    assert "delete this folder" in caught.value.fix


def test_a_checkpoint_that_counts_too_many_epochs_does_not_end_in_a_finished_run(
    unfinished, tmp_path
):
    def change(state):
        for counts in counts_of_epochs(state).values():
            counts.update(ready=3, started=3, processed=3, completed=3)

    with pytest.raises(TrainingError, match=r"ended by itself|cannot go on"):
        unfinished(change)
    assert not (tmp_path / "run" / "adaptor").exists()


def test_an_unchanged_checkpoint_goes_on(unfinished):
    assert unfinished(lambda state: None).facts["steps"] == 15
