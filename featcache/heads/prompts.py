"""Prompts: what a class or a finding is called in words."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from featcache.config import Config, find_config, list_configs, load_config
from featcache.errors import UsageError, nearest
from featcache.manifest.table import Manifest

Sentences = tuple[str, ...]
NEARLY = 0.8
"""Similarity from which on a name is taken for another one misspelt; `Pleural Effusion` and
`Effusion` have 0.67."""
NAMED = 5  # findings that a message names
SHARED = {"mimic-cxr": "chexpert", "mimic-cxr-jpg": "chexpert"}
"""Data sets whose labels, and so prompts, are those of another one."""


class FindingPrompts(Config):
    """Sentences of one finding that is there or not."""

    present: Sentences = Field(min_length=1, description="As a report says that it is there.")
    absent: Sentences = Field(min_length=1, description="As a report says that it is not.")


class Prompts(Config):
    """A file of prompts: for the classes of one label, or for findings that are there or not."""

    kind: Literal["prompts"] = Field("prompts", description="What this file holds.")
    label: str = Field("class", description="Label column of `classes`.")
    classes: dict[str, Sentences] = Field(
        default_factory=dict, description="Name of each class to its sentences."
    )
    findings: dict[str, FindingPrompts] = Field(
        default_factory=dict, description="Label column of each finding to its sentences."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Prompts":
        if bool(self.classes) == bool(self.findings):
            raise ValueError("either `classes` or `findings` is needed, not both")
        empty = [name for name, some in self.classes.items() if not some]
        if len(self.classes) == 1 or empty:
            raise ValueError("`classes` needs two or more, each with a sentence")
        said = [*self.classes.values()]
        said += [some for one in self.findings.values() for some in (one.present, one.absent)]
        if not all(sentence.strip() for some in said for sentence in some):
            raise ValueError("a sentence is empty")
        return self

    def groups(self, names: Sequence[str]) -> list[Sentences]:
        """The sentences whose scores are averaged: a group a class, or present and absent by turns.

        Within a group sentences stand in the order of their letters, so that the order of a file
        changes nothing.

        Args:
            names: Classes or findings, in the order of the answers.
        """
        if self.classes:
            return [tuple(sorted(set(self.classes[name]))) for name in names]
        return [
            tuple(sorted(set(some)))
            for name in names
            for some in (self.findings[name].present, self.findings[name].absent)
        ]

    def first_alone(self) -> "Prompts":
        """The same with one sentence of each group, the first of the file."""
        return self.model_copy(
            update={
                "classes": {name: some[:1] for name, some in self.classes.items()},
                "findings": {
                    name: FindingPrompts(present=one.present[:1], absent=one.absent[:1])
                    for name, one in self.findings.items()
                },
            }
        )


def find_prompts(name: str | None, manifest: Manifest) -> tuple[str, Prompts]:
    """The prompts by name or file, with the name they go by.

    Args:
        name: A shipped name or a YAML file; None: those of the manifest's data set.
        manifest: Its reader's name is that of its prompts.

    Raises:
        UsageError: There are none of that name, no such file, or none for the data set.
        ConfigError: The file does not fit.
    """
    known = [*list_configs("prompts"), *SHARED]
    if name is not None and name not in known:
        path = Path(name)
        if path.is_file():
            return path.stem, load_config(Prompts, path=path)
        is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        raise UsageError(
            "there is no such file of prompts"
            if is_path
            else f"there are no prompts `{name}`; {nearest(name, known)}",
            where=path if is_path else "--prompts",
            fix=f"a YAML file, or one of: {', '.join(sorted(known))}",
        )
    chosen = name or manifest.meta.dataset
    if chosen not in known:
        raise UsageError(
            f"no prompts are known for data set `{chosen}`",
            where=manifest.folder,
            fix=f"--prompts FILE.yaml, or one of: {', '.join(sorted(known))}",
        )
    return chosen, load_config(Prompts, path=find_config("prompts", SHARED.get(chosen, chosen)))


def prompted_findings(
    prompts: Prompts, manifest: Manifest, findings: Sequence[str]
) -> tuple[str, ...]:
    """Findings that have both prompts and labels, sorted.

    Prompts may be about more findings than a manifest has, as those of other data sets are; a name
    that is nearly one of the manifest's is taken for a slip.

    Args:
        prompts: About findings.
        manifest: For messages.
        findings: Its label columns that hold a finding.

    Raises:
        UsageError: There is none, or a name is misspelt.
    """
    open_names = [name for name in findings if name not in prompts.findings]
    folded = {name.casefold(): name for name in open_names}
    for name in sorted(prompts.findings):
        close = get_close_matches(name.casefold(), list(folded), n=3, cutoff=NEARLY)
        if name not in findings and close:
            raise UsageError(
                f"the prompts have `{name}`, the manifest does not; did you mean "
                + " or ".join(f"`{folded[one]}`" for one in close)
                + "?",
                where="--prompts",
                fix="name findings as the manifest's label columns are named: "
                + ", ".join(findings),
            )
    known = tuple(sorted(name for name in prompts.findings if name in findings))
    if not known:
        raise UsageError(
            "the prompts are about findings that the manifest has no labels of: "
            + ", ".join(sorted(prompts.findings)[:NAMED]),
            where=manifest.folder,
            fix=f"--prompts FILE.yaml; findings here: {', '.join(findings) or 'none'}",
        )
    return known


def refuse_other_label(prompts: Prompts, manifest: Manifest) -> None:
    """Prompts for classes need their label in the manifest.

    Args:
        prompts: About classes.
        manifest: Where it should be.

    Raises:
        UsageError: There is no such label.
    """
    names = manifest.label_names
    if prompts.label not in names:
        raise UsageError(
            f"the prompts are about label `{prompts.label}`, which the manifest does not have; "
            f"{nearest(prompts.label, names)}",
            where=manifest.folder,
            fix="`label: NAME` in the prompts' file, or --prompts with sentences for a label that "
            "is there",
        )
