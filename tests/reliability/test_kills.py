"""Stage one is killed at any moment, in part or as a whole, and makes the same bytes."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest
from reliability.kit import children, content, partials, times, wait_until

from featcache.encoders.forward import Pace
from featcache.encoders.interface import locate_encoder
from featcache.encoders.request import EncoderRequest
from featcache.encoders.task import Part, ShardTask, make_shards
from featcache.extract.prepare import Admission, prepare
from featcache.manifest.table import open_manifest

SHARDS = 5


@pytest.fixture
def images(finished):
    return {name: value for name, value in content(finished).items() if name.startswith("image")}


def seconds_to_the_last_shard(tiny, launcher, root):
    """How long a run takes, on this machine and beside what else runs there now."""
    workspace = tiny.workspace(root)
    command = launcher.start(tiny.arguments(workspace))
    started = time.monotonic()
    wait_until(lambda: len(list(workspace.features.rglob("*.h5"))) == SHARDS)
    taken = time.monotonic() - started
    assert command.wait()[0] == 0
    return taken


def kill_at_random(tiny, launcher, root, count, seed):
    """Kill runs at random moments; a workspace that gets through makes room for the next.

    Returns:
        The workspaces, each with one undisturbed run at the end, and how many kills found how
        many complete shards.
    """
    launcher.run(["--help"])  # it has imported everything now
    span_s = seconds_to_the_last_shard(tiny, launcher, root / "timed")
    generator = random.Random(seed)
    made, found = [], []
    while len(found) < count:
        workspace = tiny.workspace(root / str(len(made)))
        made.append(workspace)
        complete = 0
        while complete < SHARDS and len(found) < count:
            command = launcher.start(tiny.arguments(workspace))
            time.sleep(generator.uniform(0, span_s))
            command.kill()
            code, said = command.wait()
            if code == 0:  # it was faster: no kill
                break
            assert code == -signal.SIGKILL, said
            complete = len(list(workspace.features.rglob("*.h5")))
            found.append(complete)
        code, said = launcher.run(tiny.arguments(workspace))
        assert code == 0, said
    return made, found


def test_a_group_killed_at_random_moments_leaves_the_same_bytes(tiny, images, launcher, tmp_path):
    made, _ = kill_at_random(tiny, launcher, tmp_path, 5, seed=1)
    for workspace in made:
        assert content(workspace) == images
        assert partials(workspace) == []


@pytest.mark.slow
def test_a_hundred_kills_leave_the_same_bytes(tiny, images, launcher, tmp_path):
    made, found = kill_at_random(tiny, launcher, tmp_path, 100, seed=2)
    assert set(found) == {0, 1, 2, 3, 4, 5}  # kills came at every stage
    for workspace in made:
        assert content(workspace) == images
        assert partials(workspace) == []


def test_a_killed_command_takes_its_workers_with_it(tiny, images, launcher, tmp_path):
    """Only the command's own process is killed: its workers must not go on alone."""
    workspace = tiny.workspace(tmp_path)
    command = launcher.start(tiny.arguments(workspace))
    workers = wait_until(lambda: children(command.pid))
    wait_until(lambda: list(workspace.features.rglob("*.h5")))
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in workers), limit_s=15)
    assert launcher.run(tiny.arguments(workspace))[0] == 0
    assert content(workspace) == images
    assert partials(workspace) == []


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_replaced_and_finished_shards_are_not_made_again(
    tiny, images, launcher, tmp_path, workers
):
    workspace = tiny.workspace(tmp_path)
    folder = workspace.features / "image/vit"
    command = launcher.start(tiny.arguments(workspace, "--workers", str(workers)))
    worker = wait_until(lambda: children(command.pid))[0]
    wait_until(lambda: len(times(folder)) >= 2, every_s=0.001)
    os.kill(worker, signal.SIGSTOP)  # so that what is finished stays what it is while we look
    before = times(folder)
    os.kill(worker, signal.SIGKILL)
    code, said = command.wait()
    assert code == 0, said
    assert 2 <= len(before) < 5
    assert {name: when for name, when in times(folder).items() if name in before} == before
    assert content(workspace) == images
    assert partials(workspace) == []
    assert "Traceback" not in said
    assert "distributed" not in said


def test_two_commands_on_one_set_at_once_make_the_same_bytes(tiny, images, launcher, tmp_path):
    workspace = tiny.workspace(tmp_path)
    both = [launcher.start(tiny.arguments(workspace)) for _ in range(2)]
    for command in both:
        code, said = command.wait()
        assert code == 0, said
        for word in ("Traceback", "error", "warn", "distributed", "fail"):
            assert word not in said
    assert content(workspace) == images
    assert partials(workspace) == []


def test_a_task_that_runs_twice_finds_its_shard(tiny, images, tmp_path):
    workspace = tiny.workspace(tmp_path, texts=0)
    folder = workspace.features / "image/vit"
    tables = open_manifest(workspace.manifest())
    located = locate_encoder(str(tiny.vit), "image")
    request = EncoderRequest(modality="image", name=str(tiny.vit), batch_size=4, shard_mb=1)
    prepare(folder, tables, request, located, "cpu", Admission())
    task = ShardTask((Part(located, folder, 2),), tables.folder, tables.meta.hash, Pace(1, "cpu"))
    rows = []
    make_shards(task, rows.append)
    assert content(workspace)["image/vit/shard-000002.h5"] == images["image/vit/shard-000002.h5"]
    first = times(folder)
    make_shards(task, rows.append)
    assert times(folder) == first
    make_shards(replace(task, again=True), rows.append)
    assert times(folder) != first
    assert content(workspace)["image/vit/shard-000002.h5"] == images["image/vit/shard-000002.h5"]
    assert rows == [4, 4, 8, 4, 4]
