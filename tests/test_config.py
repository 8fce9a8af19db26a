import pytest

from featcache.config import (
    Config,
    apply_overrides,
    find_config,
    load_config,
    read_yaml,
    save_config,
)
from featcache.errors import ConfigError, UsageError


class Inner(Config):
    layers: int = 2
    rate: float = 1.0


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()


def test_file_lies_over_defaults_and_settings_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: file\ninner: {layers: 3}\n")
    got = load_config(Outer, path=path, overrides=["inner.layers=4"], defaults={"name": "below"})
    assert got == Outer(name="file", inner=Inner(layers=4))


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("inner: {rate: 2e-5}\n")
    assert load_config(Outer, path=path).inner.rate == 2e-5
    assert load_config(Outer, overrides=["inner.rate=1e-4"]).inner.rate == 1e-4


def test_all_wrong_keys_are_named_at_once_with_the_nearest_spelling(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("nam: x\ninner: {layer: 1, rate: fast}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path=path)
    message = str(caught.value)
    assert "`nam`: unknown key; did you mean `name`?" in message
    assert "`inner.layer`: unknown key; did you mean `layers`?" in message
    assert "`inner.rate`" in message
    assert str(path) in message
    assert "fast" not in message


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="line 2: the key `name` stands twice"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["layers", "=3", "inner.rate.deep=1"])
def test_a_setting_that_is_no_setting_is_refused(text):
    with pytest.raises(ConfigError):
        apply_overrides({"inner": {"rate": 1}}, [text])


def test_a_missing_file_and_a_list_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        read_yaml(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        read_yaml(path)


def test_a_saved_config_reads_back_equal(tmp_path):
    config = Outer(name="x: y # z", inner=Inner(rate=3e-7))
    save_config(config, tmp_path / "c.yaml", comment="featcache train-adaptor --config c.yaml")
    assert load_config(Outer, path=tmp_path / "c.yaml") == config


def test_an_unknown_encoder_offers_the_nearest_names():
    with pytest.raises(UsageError, match="did you mean `vit-b`"):
        find_config("encoders", "vitb")
