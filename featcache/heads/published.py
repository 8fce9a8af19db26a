"""Figures that papers report, as rows beside ours: each with its source, none measured here."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from featcache.config import Config, read_yaml, validate
from featcache.errors import ConfigError
from featcache.heads.table import Estimate, Row
from featcache.manifest.table import Manifest

FILE = Path(__file__).with_suffix(".yaml")
NOT_BESIDE_STAND_INS = (
    "Published figures are of the real pictures, so none stand beside this synthetic stand-in."
)


class PublishedRow(Config):
    """One method of one paper."""

    method: str = Field(description="As the paper calls it.")
    source: str = Field(description="Name in `sources`.")
    at: dict[float, float] = Field(description="Share of the labels to the figure, in percent.")


class PublishedTable(Config):
    """What is reported for one head on one data set."""

    head: Literal["classify", "segment", "retrieve", "zeroshot"] = Field(description="Which head.")
    dataset: str = Field(description="Reader whose manifests it belongs to.")
    label: str | None = Field(
        None, description="Label column it is about; none: whatever is asked."
    )
    figure: str = Field(description="Column of the head's table.")
    protocol: str = Field(description="How it was measured, as far as that differs from ours.")
    rows: tuple[PublishedRow, ...] = Field(min_length=1, description="The methods.")


class Published(Config):
    """The whole file."""

    sources: dict[str, str] = Field(description="Short name to where the figure stands.")
    tables: tuple[PublishedTable, ...] = Field(description="One for each head and data set.")


def read_published(file: Path = FILE) -> Published:
    """Read and check the file of published figures.

    Raises:
        ConfigError: It does not fit its schema, or a row names no known source.
    """
    found = validate(Published, read_yaml(file), where=file)
    named = {row.source for table in found.tables for row in table.rows}
    unknown = sorted(named - set(found.sources))
    if unknown:
        raise ConfigError(f"no source is called `{unknown[0]}`", where=file)
    return found


@cache
def _shipped() -> Published:
    """The file that comes with featcache; YAML is slow to read."""
    return read_published()


def published_rows(
    head: str,
    manifest: Manifest,
    percent: float,
    *,
    share: str = "labels",
    label: str | None = None,
) -> Iterator[Row]:
    """The published lines for a share of the labels of a real data set; none for a stand-in.

    Args:
        head: `classify`, `segment`, `retrieve` or `zeroshot`.
        manifest: Its reader says which data set it is.
        percent: Share of the training labels.
        share: Name under which the share stands in the rows' setting.
        label: Label column that was asked for.
    """
    tables = [] if manifest.meta.synthetic else _tables_of(head, manifest.meta.dataset, label)
    for table in tables:
        for row in table.rows:
            if percent in row.at:
                yield Row(
                    f"{table.dataset} (published)",
                    row.method,
                    {share: f"{percent:g} %", "images": "as published"},
                    {table.figure: Estimate((row.at[percent] / 100,))},
                    {"percent": percent, "published": True},
                    f"other protocol; {_shipped().sources[row.source]}",
                )


def published_notes(
    head: str, manifest: Manifest, percents: Iterable[float], *, label: str | None = None
) -> Iterator[str]:
    """What must be said with the published lines, or why a stand-in has none; nothing without any.

    Args:
        head: As for `published_rows`.
        manifest: Its reader says which data set it is.
        percents: Shares of the training labels in the table; empty where no published line can
            stand in it.
        label: Label column that was asked for.
    """
    asked = set(percents)
    tables = [
        table
        for table in _tables_of(head, manifest.meta.dataset, label)
        if any(asked & set(row.at) for row in table.rows)
    ]
    if manifest.meta.synthetic:
        if tables:
            yield NOT_BESIDE_STAND_INS
        return
    for table in tables:
        yield f"Published rows follow another protocol than ours: {table.protocol.strip()}."


def _tables_of(head: str, dataset: str, label: str | None) -> list[PublishedTable]:
    """The tables about a data set, pictures real or not."""
    return [
        one
        for one in _shipped().tables
        if (one.head, one.dataset) == (head, dataset) and one.label in (None, label)
    ]
