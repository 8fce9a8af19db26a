"""A funnel counts what it drops, so that its sums close."""

import numpy as np
import pyarrow as pa

from featcache.manifest.funnel import Funnel
from featcache.manifest.table import check_funnel


def test_a_row_with_several_faults_counts_for_the_first():
    funnel = Funnel()
    funnel.start("rows", 4)
    table = pa.table({"a": [0, 1, 2, 3]})
    faults = {
        "one": np.array([True, False, False, False]),
        "two": np.array([True, True, False, False]),
        "none": np.array([False, False, False, False]),
    }
    left = funnel.keep(table, "good", faults)
    assert left["a"].to_pylist() == [2, 3]
    assert funnel.steps[1].dropped == {"one": 1, "two": 1}
    funnel.step("distinct", 2, {"identical": 0})
    assert funnel.steps[2].dropped == {}
    assert check_funnel(funnel.steps, 2) == []
