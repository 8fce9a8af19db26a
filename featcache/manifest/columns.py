"""Columns of a table by the names that a data set publishes, whatever their case and blanks."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from featcache.errors import ManifestError, nearest


def find_columns(names: Sequence[str], wanted: Sequence[str], where: Path) -> dict[str, str]:
    """The table's own name of each column that is wanted.

    Args:
        names: Of the table's columns, as they stand there.
        wanted: As published; all are needed.
        where: The table, for messages.

    Raises:
        ManifestError: A column is missing, or two that differ in case and blanks alone fit one.
    """
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spelled[name.strip().casefold()].append(name)
    missing = [name for name in wanted if name.casefold() not in spelled]
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing)
        # No published name has a digit; where the row of names is missing, an identifier has.
        shown = [name.strip() for name in names if name.strip() and not re.search(r"\d", name)]
        hint = nearest(missing[0], shown)
        raise ManifestError(f"the table has no column {listed}; {hint}", where=where)
    for name in wanted:
        if len(fitting := spelled[name.casefold()]) > 1:
            listed = " and ".join(f"`{one}`" for one in fitting)
            raise ManifestError(
                f"the columns {listed} have the same name, compared without case and blanks",
                where=where,
                fix="remove all but one",
            )
    return {name: spelled[name.casefold()][0] for name in wanted}
