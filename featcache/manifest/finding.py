"""What one check found: a sentence with a count, and a few examples kept apart from it."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from featcache.config import Config

NUM_EXAMPLES = 5


class Finding(Config):
    """What one check found.

    Attributes:
        check: Its number in `docs/datasets.md`.
        level: `info`, or `warning` for what may spoil a result.
        count: The number that it is about.
        text: A sentence with the number, without identifiers.
        examples: A few keys or paths that it is about.
    """

    check: int = Field(description="Number of the check in docs/datasets.md.")
    level: Literal["info", "warning"] = Field(description="`warning` may spoil a result.")
    count: int = Field(description="The number that it is about.")
    text: str = Field(description="A sentence with the number, without identifiers.")
    examples: list[str] = Field(default_factory=list, description="A few keys or paths.")

    def to_text(self, *, show_ids: bool = False) -> str:
        """One line for a person.

        Args:
            show_ids: Whether to name the examples.
        """
        mark = "!" if self.level == "warning" else " "
        shown = f" ({', '.join(self.examples)})" if show_ids and self.examples else ""
        return f"{mark} check {self.check:>2}: {self.text}{shown}"


def finding(
    check: int, count: int, text: str, examples: Iterable[str] = (), *, warn: bool = True
) -> Finding:
    """A finding; a warning when its count is not 0, unless it is information.

    Args:
        check: Its number in `docs/datasets.md`.
        count: The number that it is about.
        text: A sentence with the number, without identifiers.
        examples: Keys or paths; the first few by name are kept.
        warn: Whether a count above 0 may spoil a result.
    """
    level: Literal["info", "warning"] = "warning" if warn and count else "info"
    return Finding(
        check=check, level=level, count=count, text=text, examples=sorted(examples)[:NUM_EXAMPLES]
    )
