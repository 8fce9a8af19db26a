"""Probes on cached features, beside the rows that any such result must be read against."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import JsonValue

from featcache import __version__
from featcache.adaptor.saved import TrainedAdaptor, load_adaptor
from featcache.cache.reader import FeatureSet
from featcache.config import to_plain
from featcache.device import resolve_device
from featcache.errors import FeatcacheError
from featcache.heads import classify_notes, inputs, protocol, scores, vectors
from featcache.heads.answers import (
    Answers,
    ProbeGrid,
    majority_answers,
    no_answers,
    probe_answers,
    source_answers,
)
from featcache.heads.attention import TokenRows
from featcache.heads.classify_config import (
    ProbeConfig,
    labels_of,
    refuse_blind_choice,
    refuse_placeless,
)
from featcache.heads.judge import Judge, Judgement, differences
from featcache.heads.labels import LabelledImages, Subset, training_subsets, write_subsets
from featcache.heads.mlp import Schedule
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.heads.published import published_notes, published_rows
from featcache.heads.segment_tokens import CachedGrid, adapted_grid, random_grid
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace

__all__ = ["ADAPTOR", "RAW", "ProbeConfig", "finetune", "finetune_workspace"]

COLUMNS = tuple(Column(name, f"{scores.TITLES[name]} %") for name in scores.METRICS)
MAJORITY, SOURCE, RANDOM = "majority class", "source only", "random encoder"
RAW, ADAPTOR, DIFFERENCE = "raw backbone", "Adaptor", "Adaptor minus raw backbone"

Vectors = Mapping[str, Float32[np.ndarray, "N _"] | TokenRows]


def finetune(
    images: FeatureSet,
    manifest: Manifest,
    run: Path | None,
    out: Path,
    config: ProbeConfig,
    *,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """Train probes on frozen features at several shares of the labels, and measure them.

    Every share has the rows majority class, source only (with several sources), random encoder,
    raw backbone, Adaptor, the paired difference of the last two, and what papers report for the
    data set. The cache is read once for all of them. Everything is chosen on
    `validate`; the answers of `test` are read once, through a gate that writes it down. Backbone
    and Adaptor stay frozen. The rules in words: docs/protocol.md.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits and patients.
        run: Folder of a training run, for the Adaptor; None leaves its rows out.
        out: Gets `results.json`, `results.md`, `subsets/` and `test_reads.json`, and holds what
            heads read while they train. A finished result of the same request is returned
            untouched.
        config: The protocol's numbers.
        device: Where the Adaptor and the random encoder run; probes are trained on the CPU.
        again: Allow another request to read the test split of this folder.

    Raises:
        StaleFeatureSetError: The Adaptor was trained on another encoder's features.
        ManifestError: A split is empty, a patient is in two splits, or there is one class only.
        TrainingError: The test split was read before, and `again` is False; or every head of a
            kind diverged.
        UsageError: Attention heads are asked of a set without patch tokens.
    """
    device = resolve_device(device)
    trained = None if run is None else load_adaptor(run, device=device)
    if trained is not None and run is not None:
        inputs.refuse_foreign(images, trained.image_fingerprint, run)
    labelled = labels_of(images, manifest, config)
    refuse_blind_choice(labelled, config)
    refuse_placeless(images.spec, config)
    study = _Study(images, manifest, trained, labelled, config, device)
    gate = protocol.open_gate(out, study.facts(), again=again)
    if isinstance(gate, Results):
        return gate
    return _measure(study, gate, out)


def _measure(study: "_Study", gate: TestGate, out: Path) -> Results:
    """Train and choose everything, then read the test labels, then write."""
    labelled, config, manifest = study.labelled, study.config, study.manifest
    shares = study.subsets()
    subsets = [subset for some in shares.values() for subset in some]
    listed = write_subsets(out / "subsets", labelled, subsets)
    given = study.inputs(out)
    answers = {percent: study.answers(some, given) for percent, some in shares.items()}
    test = labelled.of("test")
    judge = Judge(
        targets=gate.read({"targets": labelled.targets[test]})["targets"],
        subject_ids=[labelled.subject_ids[number] for number in test],
        classes=labelled.classes,
        draws=config.draws,
        seed=config.seed,
    )
    judged = {share: judge_all(answers[share], judge) for share in shares}
    rows = [
        row
        for share, some in shares.items()
        for row in study.rows(some, answers[share], judged[share], judge)
    ]
    if labelled.of_findings:
        last = list(shares)[-1]
        rows += study.finding_rows(shares[last], judged[last], judge)
    notes = [
        *manifest.meta.notes,
        *classify_notes.about_inputs(study.images.spec, labelled, config),
        *classify_notes.about_labels(manifest, labelled, config.names(manifest), config.policy),
        *classify_notes.about_rules(config, labelled, judge),
        *classify_notes.about_gaps(subsets, judge),
        *inputs.adaptor_notes(study.trained, manifest),
        *published_notes("classify", manifest, study.published_shares(shares), label=config.label),
        gate.note(),
    ]
    if study.trained is None:
        notes.insert(-1, "No run was given, so there is no row of an Adaptor.")
    asked = "findings" if config.findings else f"label `{config.label}`"
    table = Table(
        title=f"{classify_notes.HEADS[config.head]}: {manifest.name}, {asked}, split test",
        columns=study.columns,
        rows=tuple(rows),
        notes=tuple(notes),
        configurations=sum(int(row.details.get("configurations_tried", 0)) for row in rows),
    )
    record: dict[str, Any] = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "classes": list(labelled.classes),
        "left_out": dict(labelled.left_out),
        "subsets": listed,
        "differences": [
            {"labels": shares[share][0].title, **one}
            for share in shares
            for one in differences(judged[share], judge)
        ],
    }
    shutil.rmtree(out / "tokens", ignore_errors=True)
    return protocol.save_results(out, table, record)


def judge_all(answers: Mapping[str, Answers], judge: Judge) -> dict[str, Judgement]:
    """Figures of every method that has answers.

    Args:
        answers: By method.
        judge: Holds the test labels.
    """
    return {name: judge.judge(one) for name, one in answers.items() if len(one.probabilities)}


@dataclass(frozen=True)
class _Study:
    """What is asked, with everything it is asked of."""

    images: FeatureSet
    manifest: Manifest
    trained: TrainedAdaptor | None
    labelled: LabelledImages
    config: ProbeConfig
    device: str

    def facts(self) -> dict[str, JsonValue]:
        """Everything that decides the result, without paths."""
        return {
            "head": "classify",
            "split": "test",
            **inputs.source_facts(self.manifest, self.trained, images=self.images),
            "config": to_plain(self.config),
        }

    @property
    def columns(self) -> tuple[Column, ...]:
        """The figures of the table."""
        return COLUMNS[-1:] if self.labelled.of_findings else COLUMNS

    @property
    def grid(self) -> ProbeGrid:
        """Which heads are trained."""
        config, has_rates = self.config, self.config.head != "linear"
        return ProbeGrid(
            decays=sorted(set(config.mlp_weight_decays if has_rates else config.weight_decays)),
            seeds=[config.seed + number for number in range(config.seeds)],
            select_by=config.select_by,
            tolerance=config.tolerance,
            max_steps=config.max_steps,
            rates=sorted(set(config.learning_rates)) if has_rates else (),
            schedule=Schedule(config.hidden, config.epochs, device=self.device),
        )

    def subsets(self) -> dict[float, list[Subset]]:
        """The training subsets of every share (of the shots)."""
        config = self.config
        shares = sorted(set(config.fractions)) if config.shots is None else [config.shots]
        return {
            share: training_subsets(
                self.labelled, share, count=config.subsets, seed=config.seed, shots=config.shots
            )
            for share in shares
        }

    def inputs(self, folder: Path) -> dict[str, Vectors | str]:
        """What heads read of all labelled images, by method and pooling, or why there is nothing.

        Args:
            folder: Where it lies as long as it is used: vectors in files without a name, tokens of
                Adaptor and random encoder in `tokens/`.
        """
        if self.config.head == "attention":
            return self._tokens(folder / "tokens")
        made = vectors.image_vectors(
            self.images,
            self.labelled.rows,
            self.trained,
            poolings=self.config.poolings,
            device=self.device,
            batch_size=self.config.batch_size,
            folder=folder,
        )
        found: dict[str, Vectors | str] = {RANDOM: self._random(self._random_vectors)}
        found[RAW] = {str(pooling): one for pooling, one in made.raw.items()}
        if made.adaptor is not None:
            found[ADAPTOR] = {"objective": made.adaptor}
        return found

    def _tokens(self, folder: Path) -> dict[str, Vectors | str]:
        """Patch tokens by method, read from the cache or from files in a folder."""
        images, rows, keys = self.images, self.labelled.rows, self.labelled.keys
        numbers, device, seed = np.arange(len(rows)), self.device, self.config.seed

        def random() -> Vectors:
            made = random_grid(images, self.manifest, keys, folder, seed=seed, device=device)
            return {"attention": TokenRows(made, numbers)}

        found: dict[str, Vectors | str] = {RANDOM: self._random(random)}
        found[RAW] = {"attention": TokenRows(CachedGrid(images, rows), numbers)}
        if self.trained is not None:
            own = adapted_grid(images, rows, self.trained, folder, device=device)
            found[ADAPTOR] = own if isinstance(own, str) else {"attention": TokenRows(own, numbers)}
        return found

    def _random_vectors(self) -> Vectors:
        """Vectors of the random encoder, by pooling."""
        made = vectors.random_vectors(
            self.images,
            self.manifest,
            self.labelled.keys,
            seed=self.config.seed,
            poolings=self.config.poolings,
            device=self.device,
        )
        return {str(pooling): one for pooling, one in made.items()}

    def _random(self, make: Callable[[], Vectors]) -> Vectors | str:
        """What the random encoder gives, or why it gives nothing."""
        if not self.config.random_encoder:
            return "switched off by random_encoder=false"
        try:
            return make()
        except FeatcacheError as error:
            return f"not computed: {error.what.partition(';')[0]}"

    def answers(
        self, subsets: Sequence[Subset], inputs: Mapping[str, Vectors | str]
    ) -> dict[str, Answers]:
        """What every method answers for the test images after training on these subsets."""
        labelled = self.labelled
        members = [subset.members for subset in subsets]
        answers = {MAJORITY: majority_answers(labelled, members)}
        if len(set(labelled.sources)) > 1:
            answers[SOURCE] = source_answers(labelled, members)
        for method, given in inputs.items():
            if isinstance(given, str):
                answers[method] = no_answers(given, len(labelled.classes))
            else:
                answers[method] = probe_answers(labelled, members, given, self.grid)
        return answers

    def setting(self, subsets: Sequence[Subset]) -> dict[str, str]:
        """What tells the lines of a share from others."""
        sizes = sorted({len(subset.members) for subset in subsets})
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"
        return {"labels": subsets[0].title, "images": span}

    def rows(
        self,
        subsets: Sequence[Subset],
        answers: Mapping[str, Answers],
        judged: Mapping[str, Judgement],
        judge: Judge,
    ) -> Iterator[Row]:
        """The lines of one share."""
        name, setting = self.manifest.title, self.setting(subsets)
        if self.labelled.of_findings:
            defined = len(self.labelled.classes) - len(judge.undefined_classes())
            setting["finding"] = f"mean of {defined}"
        common = {"percent": subsets[0].percent, "subsets": len(subsets)}
        for method, given in answers.items():
            if method not in judged:
                yield Row(name, method, setting, details=dict(common), remark=given.remark)
                continue
            found = judged[method]
            details = {**common, "runs": len(given.probabilities), **found.details}
            yield Row(name, method, setting, self._shown(found), details, given.remark)
        if ADAPTOR in judged:
            found = judge.difference(judged[ADAPTOR], judged[RAW])
            details = {**common, "runs": len(answers[RAW].probabilities)}
            remark = "paired: same subsets, seeds and draws"
            yield Row(name, DIFFERENCE, setting, self._shown(found), details, remark)
        for percent in self.published_shares([subsets[0].percent]):
            yield from published_rows("classify", self.manifest, percent, label=self.config.label)

    def published_shares(self, shares: Iterable[float]) -> list[float]:
        """Those of the shares that published lines may stand beside; none of shots or findings."""
        beside = self.config.shots is None and not self.labelled.of_findings
        return list(shares) if beside else []

    def _shown(self, found: Judgement) -> dict[str, protocol.Estimate]:
        """The figures that the table has columns for."""
        return {column.name: found.figures[column.name] for column in self.columns}

    def finding_rows(
        self, subsets: Sequence[Subset], judged: Mapping[str, Judgement], judge: Judge
    ) -> Iterator[Row]:
        """The lines of each finding, for the largest share alone."""
        undefined = judge.undefined_classes()
        found = dict(judged)
        if ADAPTOR in judged:
            found[DIFFERENCE] = judge.difference(judged[ADAPTOR], judged[RAW])
        for finding in self.labelled.classes:
            setting = {**self.setting(subsets), "finding": finding}
            has, known = undefined.get(finding, (0, 0))
            remark = f"undefined ({has} of {known} images)" if finding in undefined else ""
            for method, one in found.items():
                figures = {"auroc": one.figures[scores.OF_FINDING + finding]}
                details = {"percent": subsets[0].percent, "subsets": len(subsets)}
                yield Row(self.manifest.title, method, setting, figures, details, remark)


def finetune_workspace(
    workspace: Workspace,
    config: ProbeConfig,
    *,
    run: str | None = None,
    backbone: str | None = None,
    manifest: str | None = None,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """`finetune` on what a workspace holds.

    Args:
        workspace: Where names are looked up, and where the result is written.
        config: The protocol's numbers.
        run: Name or folder of a run; None is the current one, or none where there is no run.
        backbone: Name or folder of an image set; None is the one the run's Adaptor reads, else the
            current one.
        manifest: Name or folder of a manifest; None is the current one.
        device: `auto`, `cpu` or `cuda`.
        again: Allow another request to read the test split of the output folder.
    """
    folder = inputs.run_if_any(workspace, run)
    found = inputs.look_up(workspace, folder, backbone=backbone, manifest=manifest)
    images, table = found.images, found.manifest
    out = found.results / "finetune" / f"{table.name}-{config.asked}-{images.folder.name}"
    found.announce("finetune")
    return finetune(images, table, folder, out, config, device=device, again=again)
