"""What a user can do wrong.

    FeatcacheError            exit 1
    ├── UsageError            exit 2   an option, a name or a value that cannot be
    │   └── ConfigError               a YAML file or `--set` that does not fit its schema
    ├── WorkspaceError                nothing current, several candidates, a name that is not there
    ├── ManifestError                 a table that cannot be trusted
    ├── ImageError                    one picture that cannot be decoded (its row is quarantined)
    ├── EncoderError                  an encoder that cannot be built or gives what it should not
    │   └── WeightsError              weights that are missing or are not what they claim to be
    ├── CacheError                    a feature set that cannot be used
    │   ├── ShardError                a shard that is damaged or lies
    │   └── StaleFeatureSetError      a feature set made otherwise than asked for
    ├── TrainingError                 a run that cannot start or must stop
    ├── InterruptedByUserError  exit 130   Ctrl-C, with the command that goes on
    └── TerminatedError         exit 143   SIGTERM, e.g. of Slurm, with the command that goes on

Every error has three parts: what happened (with both values), where, and what to do. None of them
ever holds report text, a patient's identifier or a value of a DICOM header.
"""

from difflib import get_close_matches
from pathlib import Path


class FeatcacheError(Exception):
    """A failure that is explained to the user in three lines, without a traceback.

    Args:
        what: One sentence: what is wrong, with the value found and the value expected.
        where: File, row, key or option that it is about.
        fix: What the user can type or change.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: "str | Path | None" = None, fix: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        """The three lines as they are printed after `error: `."""
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  at: {self.where}")
        if self.fix is not None:
            lines.append(f"  try: {self.fix}")
        return "\n".join(lines)


def _rebuild(
    kind: type[FeatcacheError], what: str, where: str | None, fix: str | None
) -> FeatcacheError:
    """Unpickle an error that crossed a process border with all three parts."""
    return kind(what, where=where, fix=fix)


class UsageError(FeatcacheError):
    """An option, a name or a value that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """A YAML file or `--set` that does not fit its schema."""


class WorkspaceError(FeatcacheError):
    """Nothing is current, or a name is not there."""


class ManifestError(FeatcacheError):
    """A table that cannot be trusted."""


class ImageError(FeatcacheError):
    """One picture that cannot be decoded; its row is quarantined."""


class EncoderError(FeatcacheError):
    """An encoder that cannot be built, or that gives what it should not."""


class WeightsError(EncoderError):
    """Weights that are missing, or are not what they claim to be."""


class CacheError(FeatcacheError):
    """A feature set that cannot be used."""


class ShardError(CacheError):
    """A shard that is damaged, or whose header lies."""


class StaleFeatureSetError(CacheError):
    """A feature set that was made otherwise than this run asks for."""


class TrainingError(FeatcacheError):
    """A run that cannot start, or must stop."""


class InterruptedByUserError(FeatcacheError):
    """Ctrl-C; the message says how to go on."""

    exit_code = 130


class TerminatedError(FeatcacheError):
    """The system asked to stop (SIGTERM); the message says how to go on."""

    exit_code = 143


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """A clause that offers the closest spellings, or lists what there is.

    Args:
        name: What the user wrote.
        known: What would have been right.

    Returns:
        `did you mean ...?` when something is close, else `known: ...`.
    """
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    return "known: " + ", ".join(sorted(known)) if known else "there is none"
