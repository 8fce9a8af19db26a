"""The folder of one training run: what was asked for, how far it came, what came out."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator

from featcache import __version__
from featcache.adaptor.model import AdaptorConfig
from featcache.config import (
    Config,
    canonical_json,
    find_config,
    load_config,
    read_json,
    replace_file,
    save_config,
    to_plain,
    write_json,
)
from featcache.errors import TrainingError
from featcache.loader.rows import TOKENS_PATTERN

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
# Settings that do not shape the result: names of inputs, whose content counts, and means. What only
# rounds otherwise (`devices`, `compile`, `gradient_cache`) counts as means.
NO_IDENTITY = (
    "images",
    "texts",
    "manifest",
    "logger",
    "threads",
    "buffer_mb",
    "io",
    "resident",
    "devices",
    "compile",
    "gradient_cache",
    "checkpoint_every",
)


class RunConfig(Config):
    """One training of an Adaptor."""

    kind: Literal["run"] = Field(default="run", description="What this file configures.")
    images: str | None = Field(
        default=None, description="Image feature set; none = the current one."
    )
    texts: str | None = Field(default=None, description="Text feature set; none = the current one.")
    manifest: str | None = Field(default=None, description="Manifest; none = the current one.")
    adaptor: AdaptorConfig = Field(default=AdaptorConfig(), description="The Adaptor.")
    epochs: int = Field(default=20, ge=1, description="Passes over the training pairs.")
    batch_size: int = Field(
        default=256, description="Pairs of a step; each is contrasted with all others."
    )
    lr: float = Field(default=1e-4, gt=0, description="Highest learning rate.")
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="AdamW's, on matrices only: never on norms, biases, logit_scale.",
    )
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps with a rising rate."
    )
    schedule: Literal["cosine", "linear"] = Field(
        default="cosine", description="How the learning rate falls to 0 after the warm-up."
    )
    gradient_clip: float | None = Field(
        default=1.0, gt=0, description="Largest norm of the gradient; none = no limit."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of weights, dropout and the order of pairs."
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        default="auto",
        description="Of the arithmetic; auto = bf16-mixed on CUDA, 32-true on a CPU. 16-mixed "
        "needs CUDA.",
    )
    tokens: str = Field(
        default="all",
        pattern=TOKENS_PATTERN,
        description="Tokens read of each row: all, prefix, grid, pooled, or random:N (prefix and N "
        "others, drawn anew each step; measured and used with all).",
    )
    text_tokens: int | None = Field(
        default=None, ge=1, description="Tokens read of each text, the first ones; none = all."
    )
    length_window: int | None = Field(
        default=None,
        ge=1,
        description="Batches sorted by text length together, so that less is padding; none = off.",
    )
    queue: int = Field(
        default=0, ge=0, description="Earlier pairs kept as further negatives; 0 = none."
    )
    gradient_cache: int | None = Field(
        default=None,
        ge=1,
        description="Pairs that are encoded at a time; the loss still sees the whole batch. Less "
        "memory, about a third more time. none = all at once.",
    )
    devices: int = Field(
        default=1,
        ge=1,
        description="Processes that share each batch, on a GPU each (or on this machine's cores).",
    )
    compile: bool = Field(
        default=False, description="Compile the Adaptor's blocks first; needs a C++ compiler."
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints; none = at the end of an epoch, at most once a "
        "minute. The same command goes on from the last one.",
    )
    logger: Literal["none", "csv"] = Field(
        default="csv",
        description="Lightning logger beside metrics.jsonl, which is always written.",
    )
    threads: int = Field(default=2, ge=1, le=256, description="Threads that read tokens.")
    buffer_mb: int = Field(
        default=512, ge=1, description="Bound of the loader's buffers, in 2**20 bytes."
    )
    io: Literal["auto", "mmap", "pread"] = Field(
        default="auto", description="How tokens are read; auto = maps as long as they fit."
    )
    resident: bool = Field(
        default=False, description="Hold the tokens in memory, on the GPU where they fit."
    )

    @field_validator("batch_size")
    @classmethod
    def _has_negatives(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                f"{value} pairs in a batch leave nothing to contrast a pair with; at least 2"
            )
        return value


@dataclass(frozen=True)
class RunResult:
    """What a training left behind.

    Attributes:
        folder: The run's folder.
        status: `unchanged` when the same training had been finished there before.
        facts: Content of `run.json`.
    """

    folder: Path
    status: Literal["trained", "unchanged"]
    facts: dict[str, JsonValue]

    @property
    def adaptor_folder(self) -> Path:
        """Where the trained Adaptor lies."""
        return self.folder / "adaptor"

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values."""
        return {"folder": str(self.folder), "did": self.status, **self.facts}

    def to_text(self) -> str:
        """What was written, and what comes next."""
        did = "wrote" if self.status == "trained" else "nothing to do, finished before:"
        loss = self.facts.get("final_loss")
        return (
            f"{did} {self.folder}   {self.facts.get('epochs')} epochs, last loss {loss:.3f}\n"
            "next: featcache retrieve, featcache finetune"
        )


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, flushed, so a killed run keeps what it wrote.

    Args:
        path: The file.
        keep_steps: Lines of the steps up to this one stay; everything later is cut off.
        keep_validations: So many validations stay.

    Attributes:
        kept: What stayed, line by line.
    """

    def __init__(self, path: Path, *, keep_steps: int = 0, keep_validations: int = 0):
        self._path = path
        self._limits = {"step": keep_steps, "validate": keep_validations}
        self._file: TextIOWrapper | None = None
        self.kept: list[dict[str, Any]] = []

    def __enter__(self) -> "MetricsLog":
        self.kept = self._cut()
        text = "".join(_metrics_line(values) for values in self.kept)
        replace_file(self._path, text.encode())
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, kind: str, **values: JsonValue) -> None:
        """Append one line.

        Args:
            kind: `step` or `validate`.
            values: Finite numbers, names and None.
        """
        if self._file is None:
            raise TrainingError("the metrics log is not open", where=self._path)
        self._file.write(_metrics_line({"kind": kind, **values}))
        self._file.flush()

    def _cut(self) -> list[dict[str, Any]]:
        """The lines that stay; one that a killed run left half is none."""
        kept: list[dict[str, Any]] = []
        counts = dict.fromkeys(self._limits, 0)
        if not any(self._limits.values()) or not self._path.is_file():
            return kept
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                values = json.loads(line)
                kind = values.get("kind")
                counts[kind] = values["step"] if kind == "step" else counts[kind] + 1
                if counts[kind] <= self._limits[kind]:
                    kept.append(values)
        return kept


def _metrics_line(values: Mapping[str, JsonValue]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def load_run_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's config from a YAML file, or from `configs/runs/default.yaml`, and overrides.

    Raises:
        ConfigError: The file, a key or a value does not fit.
    """
    path = find_config("runs", "default") if path is None else path
    return load_config(RunConfig, path=path, overrides=overrides)


def run_identity(config: RunConfig, **inputs: str) -> dict[str, Any]:
    """What makes two runs the same: the settings that shape the result, and what they read."""
    settings = to_plain(config)
    for name in NO_IDENTITY:
        del settings[name]
    return {"config": settings, "inputs": dict(inputs)}


def free_folder(runs: Path, name: str, identity: Mapping[str, Any]) -> Path:
    """A folder for a run that was given no name.

    Args:
        runs: Folder of all runs.
        name: What it is called if no other run has that name.
        identity: See `run_identity`.

    Returns:
        `runs/name`; if another run lies there, `runs/name-<6 hex digits of the identity>`.
    """
    path = runs / name / RUN_FILE
    if not path.is_file() or differences(_identity_in(path), identity) == []:
        return path.parent
    digest = hashlib.sha256(canonical_json(dict(identity)).encode()).hexdigest()
    return runs / f"{name}-{digest[:6]}"


def finished_facts(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Content of `run.json` when this very training was finished in the folder, else None.

    Raises:
        TrainingError: The folder holds another run; all differences are named.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    others = differences(_identity_in(path), identity)
    if others:
        raise TrainingError(
            "another run lies in this folder:\n  " + "\n  ".join(others),
            where=folder,
            fix="give this run a name of its own, or delete the folder",
        )
    facts: dict[str, Any] = read_json(path)
    return facts if facts.get("status") == "finished" else None


def _identity_in(path: Path) -> Mapping[str, Any]:
    """The identity that a `run.json` records."""
    facts = read_json(path)
    identity = facts.get("identity") if isinstance(facts, dict) else None
    if not isinstance(identity, dict):
        raise TrainingError(
            "the file does not describe a run", where=path, fix="choose another name for the run"
        )
    return identity


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """A sentence for each value in which two identities differ, `have` being on disk."""
    old, new = _flat(have), _flat(want)
    return [
        f"`{name}`: the folder has {old.get(name, 'none')}, this run asks for "
        f"{new.get(name, 'none')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def start_folder(
    folder: Path,
    config: RunConfig,
    identity: Mapping[str, Any],
    facts: Mapping[str, JsonValue] | None = None,
) -> None:
    """Make a run's folder and write down what is about to happen in it.

    Args:
        folder: Of the run.
        config: Resolved.
        identity: See `run_identity`.
        facts: What else `run.json` says from the start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG_FILE, comment="featcache train-adaptor --config THIS_FILE")
    write_facts(folder, {**(facts or {}), "status": "started", "identity": dict(identity)})


def write_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `run.json`, and return what it says."""
    whole = {"version": 1, "made_with": __version__, **facts}
    write_json(folder / RUN_FILE, whole)
    return whole


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, each as canonical JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = canonical_json(value)
    return flat
