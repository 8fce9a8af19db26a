"""Columns by their published names."""

from pathlib import Path

import pytest

from featcache.errors import ManifestError
from featcache.manifest.columns import find_columns

TABLE = Path("t.csv")


def test_case_and_blanks_are_of_no_matter():
    names = ["image id", " LABEL ", "", "other", ""]
    assert find_columns(names, ["Label", "Image ID"], TABLE) == (
        {"Label": " LABEL ", "Image ID": "image id"}
    )


def test_all_missing_columns_are_named_with_what_is_there():
    with pytest.raises(ManifestError, match="no column `Label`, `Age`; did you mean `labl`"):
        find_columns(["labl", "Image ID"], ["Label", "Image ID", "Age"], TABLE)


def test_two_columns_for_one_are_named_and_others_may_repeat():
    with pytest.raises(ManifestError, match="`a` and ` A` have the same name") as caught:
        find_columns(["a", "b", "B", " A"], ["A"], TABLE)
    assert caught.value.fix == "remove all but one"
    assert find_columns(["a", "b", "B"], ["A"], TABLE) == {"A": "a"}
