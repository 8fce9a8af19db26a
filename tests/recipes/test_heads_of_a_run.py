"""From cached tokens to scores on real radiographs, by the commands."""

import json

import pytest

pytestmark = pytest.mark.weights


def test_finetune_and_retrieve_print_tables_with_their_trivial_rows(clone):
    done = clone.call("featcache finetune --set draws=100")
    assert done.returncode == 0, done.stderr
    rows = ("majority class", "random encoder", "raw backbone", "Adaptor", "minus raw backbone")
    for row in rows:
        assert row in done.stdout
    done = clone.call("featcache retrieve --set draws=100 --json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == 1
    assert "chance" in done.stdout


def test_a_finished_result_is_not_touched_again(clone):
    first = clone.call("featcache retrieve --set draws=100")
    path = next((clone.root / "runs").rglob("retrieve/*/results.json"))
    before = path.stat().st_mtime_ns
    second = clone.type("featcache retrieve --set draws=100")  # another process finds it too
    assert "written" in first.stdout
    assert "found finished, left untouched" in second.stdout
    assert second.stdout.splitlines()[:-1] == first.stdout.splitlines()[:-1]
    assert path.stat().st_mtime_ns == before


def test_another_question_to_the_test_split_is_refused_unless_asked_again(clone):
    assert clone.call("featcache retrieve --set draws=100").returncode == 0
    done = clone.call("featcache retrieve --set draws=110")
    assert done.returncode == 1
    assert "--again" in done.stderr
    done = clone.call("featcache retrieve --set draws=110 --again")
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout


@pytest.mark.slow
def test_features_of_another_encoder_are_refused(clone):
    assert clone.type("featcache extract --backbone vit-b --text-encoder none").returncode == 0
    done = clone.type("featcache finetune --backbone vit-b")
    assert done.returncode == 1
    assert "fingerprint" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_verify_and_use_speak_of_the_workspace(clone):
    assert "lite0-demo" in clone.call("featcache info").stdout
    done = clone.call("featcache verify --json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == 1
    shard = next((clone.root / "features/image/lite0-demo").glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = clone.call("featcache verify image/lite0-demo")
    assert done.returncode == 1
    assert shard.name in done.stdout
    done = clone.call("featcache use --image none-such")
    assert done.returncode == 1
