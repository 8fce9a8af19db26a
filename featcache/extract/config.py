"""The settings of stage one."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from featcache.config import Config

_SIDES = re.compile(r"(\d+)\s*[xX]\s*(\d+)")


class ExtractConfig(Config):
    """How stage one runs. The first group shapes rows and shards, the rest never changes a byte."""

    dtype: Literal["float16", "float32", "int8"] | None = Field(
        None, description="Stored type of tokens: float16, float32 or int8."
    )
    image_size: int | tuple[int, int] | None = Field(
        None, description="Input side in pixels, or HEIGHTxWIDTH; None: the encoder's own."
    )
    max_tokens: int | None = Field(None, gt=2, description="Longest text; None: its own.")
    layers: tuple[int, ...] | None = Field(
        None, description="Blocks whose tokens are stored side by side, from 1; -1 is the last."
    )
    pool_grid: int | None = Field(None, ge=1, description="Average the grid over windows this big.")
    views: int = Field(
        1, ge=1, le=7, description="Named views of each picture: identity, flip, crops."
    )
    decode: Literal["cpu", "gpu"] | None = Field(None, description="Where JPEGs are decoded.")
    batch_size: int | None = Field(None, ge=1, description="Rows of every forward pass.")
    shard_mb: int | None = Field(
        None, ge=1, description="MiB of tokens in a shard (512): the unit of work and of resuming."
    )

    workers: int | None = Field(None, ge=1, description="Local workers; None: one per GPU, or one.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; None: its share.")
    max_failures: float = Field(
        0.01, ge=0, description="Unreadable rows that are no failure: a share below 1, or a count."
    )
    device: str = Field("auto", description="auto, cpu or cuda.")
    scheduler: str | None = Field(None, description="Address of a running Dask scheduler.")
    append: bool = Field(False, description="Take in new rows as shards after the last one.")
    retry_failed: bool = Field(False, description="Make shards with unreadable rows again.")
    dry_run: bool = Field(False, description="Check and plan only.")

    @field_validator("image_size", mode="before")
    @classmethod
    def _read_sides(cls, value: Any) -> Any:
        """Accept `224x448` as it is typed."""
        sides = _SIDES.fullmatch(value) if isinstance(value, str) else None
        return (int(sides.group(1)), int(sides.group(2))) if sides else value

    @field_validator("image_size")
    @classmethod
    def _is_positive(cls, value: "int | tuple[int, int] | None") -> "int | tuple[int, int] | None":
        sides = (value,) if isinstance(value, int) else value or ()
        if any(side < 1 for side in sides):
            raise ValueError("a side is below 1 pixel")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        """Accept one number, and `6,12` as it is typed."""
        if isinstance(value, int):
            return (value,)
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return value
