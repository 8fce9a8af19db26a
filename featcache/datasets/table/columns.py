"""Which of a table's columns means what, told by the names in its first row."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from featcache.errors import ManifestError, nearest
from featcache.manifest.checks import LABEL_PREFIX

FIELDS = (
    "image_path",
    "key",
    "subject_id",
    "study_id",
    "view_position",
    "split",
    "source",
    "mask_path",
    "text",
)
_FIX = "rename the column, or say which one it is: --set columns.image_path=NAME"
_MAX_NAME_CHARS = 64
# A number, or a part of a path: a first row with one of these holds an image, not names.
_DATA = re.compile(r"[-+]?[0-9.,]+|.*[/\\].*\.\w{2,5}|.*[\r\n].*", re.DOTALL)


def resolve_columns(
    names: Sequence[str], columns: Mapping[str, str], labels: Sequence[str], where: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Find the columns that mean something.

    Args:
        names: The table's columns.
        columns: Our name to the table's, where the user says so.
        labels: Columns that are labels, beside those named `label:NAME`.
        where: The table, for messages.

    Returns:
        The table's column for each of our fields that it has, and for each label.

    Raises:
        ManifestError: A column that is needed or asked for is missing, or two fit one meaning.
    """
    seen, problems = _index_names(names)
    problems += [
        f"`columns.{field}`: unknown field; {nearest(field, FIELDS)}"
        for field in columns
        if field not in FIELDS
    ]

    def find(wanted: str) -> str:
        if _plain(wanted) not in seen:
            problems.append(f"the column `{wanted}` is missing; {nearest(wanted, list(names))}")
        return seen.get(_plain(wanted), "")

    fields = {field: seen[field] for field in FIELDS if field in seen}
    if "report" in seen and "text" not in columns:
        if "text" in fields:
            problems.append("both `report` and `text` are there; choose: --set columns.text=report")
        fields["text"] = seen["report"]
    if "image_path" not in {*fields, *columns}:
        _refuse_data(names, where)
        find("image_path")
    fields |= {field: find(name) for field, name in columns.items()}
    marked = [name for plain, name in seen.items() if plain.startswith(LABEL_PREFIX)]
    found: dict[str, str] = {}
    for column in dict.fromkeys([*marked, *map(find, labels)]):
        other = found.setdefault(_plain(_label_name(column)), column)
        if other != column:
            problems.append(f"the columns `{other}` and `{column}` are the same label")
    if problems:
        raise ManifestError("\n  ".join(problems), where=where, fix=_FIX)
    return fields, {_label_name(column): column for column in found.values()}


def _index_names(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The table's columns by the spelling in which they are compared, and those that clash."""
    seen: dict[str, str] = {}
    problems: list[str] = []
    for name in filter(str.strip, names):
        other = seen.setdefault(_plain(name), name)
        if other != name:
            problems.append(f"the columns `{other}` and `{name}` differ only in case or blanks")
    return seen, problems


def _refuse_data(names: Sequence[str], where: Path) -> None:
    """Refuse a first row that holds an image and not names, without quoting it.

    Raises:
        ManifestError: A cell is too long for a name, a number, or a path.
    """
    for number, name in enumerate(names, 1):
        if len(name) > _MAX_NAME_CHARS or _DATA.fullmatch(name.strip()):
            raise ManifestError(
                f"the first row looks like data, not like names of columns: cell {number}",
                where=where,
                fix="put a row of names on top: image_path, key, subject_id, split, report, ...",
            )


def _label_name(column: str) -> str:
    """A label's name: its column without `label:`."""
    name = column.strip()
    return name[len(LABEL_PREFIX) :].strip() if _plain(name).startswith(LABEL_PREFIX) else name


def _plain(name: str) -> str:
    """A column's name as it is compared."""
    return name.strip().casefold()
