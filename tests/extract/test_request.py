"""Which encoder gets which file of weights."""

from pathlib import Path

import pytest

from featcache.encoders.request import EncoderRequest, assign_weights, split_weights
from featcache.errors import UsageError

VIT = EncoderRequest(modality="image", name="vit-b")
BERT = EncoderRequest(modality="text", name="cxr-bert")
MINILM = EncoderRequest(modality="text", name="minilm-demo")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "w.safetensors"
    path.touch()
    return path


def test_a_named_file_goes_to_its_encoder(file):
    got = assign_weights([VIT, BERT], split_weights([f"cxr-bert={file}"]))
    assert [request.weights for request in got] == [None, str(file.resolve())]


def test_a_file_alone_goes_to_the_only_encoder_that_lacks_weights(file):
    got = assign_weights([VIT, MINILM], split_weights([str(file)]))
    assert [request.weights for request in got] == [str(file.resolve()), None]


def test_a_file_alone_takes_what_the_named_ones_leave(file):
    weights = split_weights([str(file), f"vit-b={file}"])
    got = assign_weights([VIT, BERT], weights)
    assert [request.weights for request in got] == [str(file.resolve())] * 2


def test_a_file_that_could_be_for_two_is_refused(file):
    with pytest.raises(UsageError, match="vit-b or cxr-bert") as caught:
        assign_weights([VIT, BERT], split_weights([str(file)]))
    assert "--weights vit-b=" in str(caught.value)


def test_a_name_that_is_no_encoder_of_the_command_is_refused(file):
    with pytest.raises(UsageError, match="`vitb` is no encoder of this command"):
        assign_weights([VIT, BERT], split_weights([f"vitb={file}"]))


def test_a_missing_file_and_two_for_one_name_are_refused(file):
    with pytest.raises(UsageError, match="no such weights file"):
        split_weights(["vit-b=nowhere.safetensors"])
    with pytest.raises(UsageError, match="two weights files"):
        split_weights([f"vit-b={file}", f"vit-b={file}"])


def test_an_equals_sign_in_a_path_is_part_of_the_path(tmp_path):
    path = tmp_path / "a=b.safetensors"
    path.touch()
    assert split_weights([str(path)]) == {"": path}
