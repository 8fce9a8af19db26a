"""Several trainings side by side: variants of one config, tuned alike, over several seeds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, JsonValue, PositiveFloat, PositiveInt, field_validator
from scipy.stats import t as student

from featcache import __version__
from featcache.adaptor.run import RunConfig
from featcache.adaptor.train import train_adaptor
from featcache.cache.reader import FeatureSet
from featcache.config import Config, apply_overrides, find_config, load_config, to_plain, validate
from featcache.console import note
from featcache.errors import ConfigError
from featcache.heads import protocol
from featcache.heads.classify import ADAPTOR, RAW, ProbeConfig, finetune
from featcache.heads.protocol import Column, Estimate, Results, Row, Table
from featcache.heads.retrieve import CHANCE, RIDGE, RetrieveConfig, retrieve
from featcache.heads.table import Interval
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace


class SweepConfig(Config):
    """Variants of one training, tuned alike and compared over seeds."""

    kind: Literal["sweep"] = Field(default="sweep", description="What this file configures.")
    base: RunConfig = Field(default=RunConfig(), description="What all variants share.")
    variants: dict[str, tuple[str, ...]] = Field(
        min_length=1,
        description="By name, what each changes: KEY=VALUE texts as for --set of train-adaptor.",
    )
    learning_rates: tuple[PositiveFloat, ...] = Field(
        default=(1e-4, 3e-4, 1e-3),
        min_length=1,
        description="Tried by every variant with the first seed; validation MRR chooses.",
    )
    seeds: PositiveInt = Field(default=5, description="Trainings at the chosen learning rate.")
    label: str | None = Field(
        default=None, description="Label column for linear probes; none = retrieval alone."
    )
    fractions: tuple[PositiveFloat, ...] = Field(
        default=(10, 100), min_length=1, description="Shares of the labels of the probes, percent."
    )

    @field_validator("variants")
    @classmethod
    def _plain_names(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"`{name}` is no plain name: letters, digits, - and _")
        return value

    def run_config(self, variant: str, lr: float, seed: int) -> RunConfig:
        """The config of one training.

        Raises:
            ConfigError: What the variant changes does not fit.
        """
        values = apply_overrides(to_plain(self.base), self.variants[variant])
        values |= {"lr": lr, "seed": self.base.seed + seed}
        return validate(RunConfig, values, where=f"variants.{variant}")


@dataclass(frozen=True)
class _Sweep:
    """What is compared, on what, and where it goes."""

    config: SweepConfig
    images: FeatureSet
    texts: FeatureSet
    manifest: Manifest
    folder: Path
    device: str

    def run_folder(self, variant: str, lr: float, seed: int) -> Path:
        """Folder of one training."""
        return self.folder / "runs" / f"{variant}-lr{lr:g}-seed{seed}"

    def train(self, variant: str, lr: float, seed: int) -> float:
        """Train one run, or find it finished; its validation MRR."""
        config = self.config.run_config(variant, lr, seed)
        folder = self.run_folder(variant, lr, seed)
        done = train_adaptor(
            self.images, self.texts, self.manifest, folder, config, device=self.device
        )
        measured = done.facts.get("validation")
        mrr = measured.get("mrr") if isinstance(measured, dict) else None
        if not isinstance(mrr, float):
            raise ConfigError(
                "no learning rate can be chosen: the split `validate` gave no MRR",
                where=self.manifest.folder,
                fix="a manifest whose split `validate` has pairs",
            )
        return mrr

    def choose(self, variant: str) -> tuple[float, dict[str, float]]:
        """The learning rate with the best validation MRR, and the MRR of each."""
        tried = {lr: self.train(variant, lr, 0) for lr in sorted(set(self.config.learning_rates))}
        best = max(tried, key=lambda lr: (tried[lr], -lr))
        note(f"sweep {variant}: learning rate {best:g}, validation MRR {100 * tried[best]:.1f} %")
        return best, {f"{lr:g}": round(mrr, 6) for lr, mrr in tried.items()}

    def measure(self, folder: Path) -> dict[str, dict[str, float]]:
        """Figures of a run on the split test: by method (Adaptor, chance, ...) and column."""
        figures = self._retrieval(folder, folder / "retrieve", linear_map=False)
        if self.config.label is None:
            return figures
        probes = ProbeConfig(
            label=self.config.label, fractions=self.config.fractions, random_encoder=False
        )
        found = finetune(
            self.images, self.manifest, folder, folder / "finetune", probes, device=self.device
        )
        for name, more in _probe_figures(found.values["rows"]).items():
            figures.setdefault(name, {}).update(more)
        return figures

    def without_adaptor(self, folder: Path) -> dict[str, dict[str, float]]:
        """Figures of the methods that no Adaptor has a part in; any run's folder will do."""
        figures = self.measure(folder)
        linear = self._retrieval(folder, folder / "baseline", linear_map=True)
        for name, more in linear.items():
            figures.setdefault(name, {}).update(more)
        return figures

    def _retrieval(self, run: Path, out: Path, *, linear_map: bool) -> dict[str, dict[str, float]]:
        asked = RetrieveConfig(linear_map=linear_map)
        found = retrieve(
            self.images, self.texts, self.manifest, run, out, asked, device=self.device
        )
        return _retrieval_figures(found.values["rows"])


def _retrieval_figures(rows: Sequence[Mapping[str, JsonValue]]) -> dict[str, dict[str, float]]:
    """By method: MRR over both directions, and R@5 of each."""
    figures: dict[str, dict[str, float]] = {}
    both: dict[str, list[float]] = {}
    for row in rows:
        found = row["figures"]
        if not isinstance(found, dict) or not found:
            continue
        method, way = str(row["method"]), str(row["setting"]["direction"])  # type: ignore[index,call-overload]
        both.setdefault(method, []).append(found["mrr"]["mean"])  # type: ignore[index,call-overload,arg-type]
        name = "i2t_recall_at_5" if way.startswith("image") else "t2i_recall_at_5"
        figures.setdefault(method, {})[name] = found["recall_at_5"]["mean"]  # type: ignore[index,call-overload,assignment]
    for method, values in both.items():
        figures[method]["mrr"] = float(np.mean(values))
    return figures


def _probe_figures(rows: Sequence[Mapping[str, JsonValue]]) -> dict[str, dict[str, float]]:
    """By method: macro AUROC at each share of the labels."""
    figures: dict[str, dict[str, float]] = {}
    for row in rows:
        found = row["figures"]
        if isinstance(found, dict) and found:
            name = f"auroc_{row['percent']:g}"
            figures.setdefault(str(row["method"]), {})[name] = found["auroc"]["mean"]  # type: ignore[index,call-overload,assignment]
    return figures


def interval_over_seeds(values: Sequence[float]) -> Interval | None:
    """Student's 95 % interval of the mean over trainings; None for a single one."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    middle = float(np.mean(values))
    return Interval(middle - half, middle + half, draws=0, undefined=0)


def _estimates(figures: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Each figure over the seeds."""
    columns = {name: [one[name] for one in figures] for name in figures[0]}
    return {
        name: Estimate(tuple(values), interval_over_seeds(values))
        for name, values in columns.items()
    }


def _rows(sweep: _Sweep) -> Iterator[Row]:
    """Train, measure, and give a line per variant, then those to read them against."""
    config, name = sweep.config, sweep.manifest.title
    measured: dict[str, list[dict[str, float]]] = {}
    for variant in config.variants:
        lr, tried = sweep.choose(variant)
        for seed in range(1, config.seeds):
            sweep.train(variant, lr, seed)
        folders = [sweep.run_folder(variant, lr, seed) for seed in range(config.seeds)]
        found = [sweep.measure(folder)[ADAPTOR] for folder in folders]
        measured[variant] = found
        details = {"validation_mrr": tried, "overrides": list(config.variants[variant])}
        yield Row(name, variant, {"lr": f"{lr:g}"}, _estimates(found), details)
    reference = next(iter(measured))
    for variant, found in measured.items():
        if variant != reference:
            gaps = [
                {n: one[n] - other[n] for n in one}
                for one, other in zip(found, measured[reference], strict=True)
            ]
            method = f"{variant} minus {reference}"
            yield Row(name, method, {"lr": ""}, _estimates(gaps), remark="paired by seed")
    others = sweep.without_adaptor(folders[0])
    for method in (RAW, RIDGE, CHANCE):
        if method in others:
            figures = {n: Estimate((value,)) for n, value in others[method].items()}
            yield Row(name, method, {"lr": ""}, figures)


def sweep(
    workspace: Workspace,
    config: SweepConfig,
    name: str,
    *,
    backbone: str | None = None,
    text_encoder: str | None = None,
    manifest: str | None = None,
    device: str = "auto",
) -> Results:
    """Train every variant at every learning rate, choose, repeat over seeds, measure on test.

    Each run lies in a folder of its own, so that an interrupted sweep goes on where it stopped, and
    a variant that is added later trains alone. The learning rate is chosen by validation MRR of
    the first seed; every run reads the test split once, after that.

    Args:
        workspace: Where names are looked up; the sweep goes to `sweeps/NAME`.
        config: What is compared.
        name: Of the sweep.
        backbone: Image set; None is the current one.
        text_encoder: Text set; None is the current one.
        manifest: Manifest; None is the current one.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: A variant does not fit, or nothing can be measured on `validate`.
        TrainingError: See `train_adaptor`.
    """
    for variant in config.variants:  # a typing error in the last one should not show after hours
        config.run_config(variant, config.learning_rates[0], 0)
    made = _Sweep(
        config=config,
        images=FeatureSet.open(workspace.feature_set("image", backbone)),
        texts=FeatureSet.open(workspace.feature_set("text", text_encoder)),
        manifest=open_manifest(workspace.manifest(manifest)),
        folder=workspace.root / "sweeps" / name,
        device=device,
    )
    rows = tuple(_rows(made))
    named = {
        "mrr": "MRR %",
        "i2t_recall_at_5": "image to text R@5 %",
        "t2i_recall_at_5": "text to image R@5 %",
        **{f"auroc_{share:g}": f"AUROC % at {share:g} %" for share in config.fractions},
    }
    shown = [key for key in named if any(key in row.figures for row in rows)]
    table = Table(
        title=f"Sweep {name}: {made.manifest.title}, split test",
        columns=tuple(Column(key, named[key]) for key in shown),
        rows=rows,
        notes=(*made.manifest.meta.notes, *_notes(config)),
        configurations=len(config.variants) * len(set(config.learning_rates)),
    )
    facts: dict[str, JsonValue] = {
        "head": "sweep",
        "config": to_plain(config),
        "images": made.images.fingerprint,
        "texts": made.texts.fingerprint,
        "manifest": made.manifest.meta.hash,
    }
    record = {**facts, "request": protocol.request_hash(facts), "featcache": __version__}
    return protocol.save_results(made.folder, table, record)


def _notes(config: SweepConfig) -> Iterator[str]:
    """How the figures came about."""
    tried = ", ".join(f"{lr:g}" for lr in sorted(set(config.learning_rates)))
    yield f"Learning rate: of {tried}, by validation MRR with the first seed."
    yield (
        f"Mean ± standard deviation over {config.seeds} trainings [Student's 95 % interval of the "
        "mean]; differences are paired by seed. MRR: mean of both directions, unpaired candidates."
    )


def load_sweep_config(name: str, overrides: Sequence[str] = ()) -> tuple[str, SweepConfig]:
    """A sweep by file, or by its name in `configs/sweeps`, with its own name.

    Raises:
        ConfigError: The file, a key or a value does not fit.
        UsageError: There is no such file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else find_config("sweeps", name)
    return path.stem, load_config(SweepConfig, path=path, overrides=overrides)
