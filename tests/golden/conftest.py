"""The builder of small feature sets, as a fixture."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def build():
    path = Path(__file__).parents[1] / "cache" / "building.py"
    place = importlib.util.spec_from_file_location("featcache_test_building", path)
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module
