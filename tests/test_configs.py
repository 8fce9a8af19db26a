"""Every shipped YAML loads, is short, and says in its first line how to use it."""

import pytest

from featcache.config import list_configs, shipped

FILES = sorted(shipped("configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_is_short_and_starts_with_its_command(path):
    lines = path.read_text().splitlines()
    if path.parent.name != "prompts":  # those hold a sentence a line, for up to 15 findings
        assert len(lines) <= 40
    assert lines[0].startswith("# featcache ")


@pytest.mark.parametrize("name", list_configs("encoders"))
def test_an_encoder_config_fits_its_schema(name):
    from featcache.config import find_config, load_config
    from featcache.encoders.interface import EncoderConfig

    load_config(EncoderConfig, path=find_config("encoders", name))


@pytest.mark.parametrize("name", list_configs("runs"))
def test_a_run_config_fits_its_schema(name):
    from featcache.adaptor.train import load_run_config
    from featcache.config import find_config

    load_run_config(find_config("runs", name), [])
