"""What the paper reports, cell by cell, and what is known to be wrong with its protocol."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Literal

from pydantic import Field, model_validator

from featcache.config import Config, read_yaml, validate
from featcache.errors import ConfigError

PAPER_FILE = Path(__file__).with_suffix(".yaml")
DEFECTS_FILE = Path(__file__).with_name("defects.yaml")
SHARES = (1.0, 10.0, 100.0)
"""Shares of the labels, in percent, that the paper's tables have."""
WIDTH = 110
"""Characters of a line of the list of defects."""
PROVED = ("by its hashes", "by their hashes")
"""How readers say that a split is the published one, picture by picture."""
NO_CHECK = "Nothing here would show it"
"""How a defect without any check begins what is here."""

Cells = dict[str, dict[str, tuple[float, ...]]]


class Trivial(Config):
    """What an answer that looks at no picture scores on the paper's test split."""

    method: str = Field(description="What is answered.")
    figure: float = Field(ge=0, le=100, description="Its figure, in percent.")
    source: str = Field(description="How it is known.")


class Difference(Config):
    """One way in which the paper measured otherwise than we do."""

    what: str = Field(description="In words.")
    defects: tuple[str, ...] = Field(min_length=1, description="Names in `defects.yaml`.")
    is_split: bool = Field(
        False, description="Whether it is gone where our manifest has the paper's own split."
    )


class PaperTable(Config):
    """One table of the paper."""

    name: str = Field(pattern=r"^[a-z-]+$", description="Short name.")
    title: str = Field(description="What is measured on what.")
    head: Literal["classify", "segment"] = Field(description="Which head of ours measures it.")
    dataset: str = Field(description="Reader of the data set.")
    label: str | None = Field(None, description="Label column; none for masks.")
    figure: str = Field(description="Column of the head's table.")
    recipe: str = Field(description="Recipe, and `make` target, that gives our result.")
    tree: str = Field(description="Variable with the folder of the real pictures.")
    split: str | None = Field(
        None,
        description="How the policy of a manifest with the paper's own split begins; none: ours "
        "never has it.",
    )
    source: str = Field(description="Where the cells stand.")
    trivial: Trivial = Field(description="What guessing scores on the paper's test split.")
    differs: tuple[Difference, ...] = Field(description="How the protocols differ.")
    cells: Cells = Field(description="Image encoder, text encoder, percent at each share.")
    repeat: Cells = Field(
        default_factory=dict, description="A second export of the same runs, of the first shares."
    )

    def is_split_of(self, policy: str) -> bool:
        """Whether a manifest's split is the one that the paper measured on, proved by its hashes.

        Args:
            policy: How the manifest says that it was split.
        """
        if self.split is None or not policy.startswith(self.split):
            return False
        return any(words in policy for words in PROVED)

    @model_validator(mode="after")
    def _check(self) -> "PaperTable":
        wide = [row for texts in self.cells.values() for row in texts.values()]
        if any(len(row) != len(SHARES) for row in wide):
            raise ValueError("`cells` has a figure for each of 1, 10 and 100 %")
        if any(not 0 < figure <= 100 for row in wide for figure in row):
            raise ValueError("`cells` are in percent")
        return self

    def of_texts(self, image_encoder: str, share: float) -> list[float]:
        """The figures of all text encoders, in percent.

        Args:
            image_encoder: Name in `cells`.
            share: One of `SHARES`.
        """
        place = SHARES.index(share)
        return [row[place] for row in self.cells[image_encoder].values()]

    @property
    def largest_move(self) -> float:
        """How far the same configuration lies apart in two exports, at most; 0 of one export."""
        return max(
            (
                abs(second - first)
                for image_encoder, texts in self.repeat.items()
                for text, again in texts.items()
                for first, second in zip(self.cells[image_encoder][text], again, strict=False)
            ),
            default=0.0,
        )


class Counted(Config):
    """Parameters that one method trains."""

    method: str = Field(description="As the paper calls it.")
    trainable: int = Field(ge=1, description="Trainable parameters.")
    total_millions: float | None = Field(
        None, description="All of them, with frozen encoders, in millions."
    )


class Parameters(Config):
    """What the paper says about the number of parameters."""

    source: str = Field(description="Where they stand.")
    rows: tuple[Counted, ...] = Field(min_length=1, description="Of pre-training.")
    downstream: tuple[Counted, ...] = Field(description="Of heads; the paper does not add them.")


class Paper(Config):
    """The whole file."""

    tables: tuple[PaperTable, ...] = Field(min_length=1, description="In the order shown.")
    parameters: Parameters = Field(description="Numbers of parameters.")


class Defect(Config):
    """One thing that is wrong with the published protocol, and what would have shown it."""

    what: str = Field(description="In our own words.")
    here: str = Field(description="What featcache does about it; or that nothing here shows it.")
    checks: tuple[str, ...] = Field(
        description="`path::name` of rows, refusals and tests; the names exist in these files."
    )

    @model_validator(mode="after")
    def _check(self) -> "Defect":
        if not self.checks and not self.here.startswith(NO_CHECK):
            raise ValueError(f"`here` begins with `{NO_CHECK}` where there is no check")
        return self


class Defects(Config):
    """The whole file."""

    groups: dict[str, dict[str, Defect]] = Field(description="Heading, then name, then defect.")

    @property
    def by_name(self) -> Mapping[str, Defect]:
        """All of them, whatever their group."""
        return {name: one for group in self.groups.values() for name, one in group.items()}

    def lines(self) -> list[str]:
        """The list in Markdown, as `reproduction.md` and docs/replication.md have it."""
        lines: list[str] = []
        for title, group in self.groups.items():
            lines += [f"**{title}**", ""]
            for name, one in group.items():
                checks = ", ".join(f"`{check}`" for check in one.checks) or "none"
                text = f"**{name}** {one.what} *Here:* {one.here} *Checks:* {checks}."
                lines += wrap(
                    text,
                    WIDTH,
                    initial_indent="- ",
                    subsequent_indent="  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            lines.append("")
        return lines[:-1]


def read_paper(file: Path = PAPER_FILE) -> Paper:
    """Read and check the paper's figures.

    Raises:
        ConfigError: The file does not fit its schema.
    """
    return validate(Paper, read_yaml(file), where=file)


def read_defects(file: Path = DEFECTS_FILE) -> Defects:
    """Read and check the list of defects.

    Raises:
        ConfigError: The file does not fit its schema, or a name stands in two groups.
    """
    found = validate(Defects, read_yaml(file), where=file)
    names = [name for group in found.groups.values() for name in group]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the defect `{twice[0]}` stands in two groups", where=file)
    return found


@cache
def shipped_paper() -> Paper:
    """The figures that come with featcache; YAML is slow to read."""
    return read_paper()


@cache
def shipped_defects() -> Defects:
    """The list that comes with featcache."""
    return read_defects()
