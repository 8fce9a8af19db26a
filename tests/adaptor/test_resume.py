"""Real processes that are killed or told to stop, and trainings that go on afterwards."""

import shlex
import signal

import pytest


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
