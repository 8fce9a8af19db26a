"""Linear probes on cached features, beside the rows that any such result must be read against."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32
from pydantic import Field, JsonValue, PositiveFloat, PositiveInt

from featcache import __version__
from featcache.adaptor.saved import TrainedAdaptor, load_adaptor
from featcache.cache.reader import FeatureSet
from featcache.config import Config, to_plain
from featcache.console import note
from featcache.device import resolve_device
from featcache.errors import FeatcacheError, ManifestError
from featcache.heads import inputs, protocol, scores, vectors
from featcache.heads.answers import (
    Answers,
    majority_answers,
    no_answers,
    probe_answers,
    source_answers,
)
from featcache.heads.judge import Judge, Judgement
from featcache.heads.labels import (
    LabelledImages,
    Subset,
    labelled_images,
    training_subsets,
    write_subsets,
)
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

COLUMNS = tuple(Column(name, f"{scores.TITLES[name]} %") for name in scores.METRICS)
MAJORITY, SOURCE, RANDOM = "majority class", "source only", "random encoder"
RAW, ADAPTOR, DIFFERENCE = "raw backbone", "Adaptor", "Adaptor minus raw backbone"


class ProbeConfig(Config):
    """How linear probes are trained, chosen and measured."""

    label: str = Field("class", description="Label column, without `label:`.")
    fractions: tuple[PositiveFloat, ...] = Field(
        (1, 10, 100), min_length=1, description="Shares of the training labels, in percent."
    )
    subsets: PositiveInt = Field(3, description="Subsets drawn of each share below 100 %.")
    seeds: PositiveInt = Field(3, description="Probes per subset, from different first weights.")
    weight_decays: tuple[PositiveFloat, ...] = Field(
        (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
        min_length=1,
        description="Weight decays; validation chooses one for each subset.",
    )
    select_by: Literal["auroc", "accuracy", "balanced_accuracy"] = Field(
        "auroc", description="Validation figure that chooses; ties go to the smaller decay."
    )
    random_encoder: bool = Field(True, description="Whether to compute the random encoder's row.")
    draws: int = Field(1000, ge=100, description="Bootstrap draws of the test patients.")
    tolerance: PositiveFloat = Field(1e-5, description="Largest gradient of a converged probe.")
    max_steps: PositiveInt = Field(1000, description="Steps after which a probe is left as it is.")
    batch_size: PositiveInt = Field(64, description="Images read at a time.")
    seed: int = Field(0, ge=0, description="Seed of subsets, weights and bootstrap.")


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
    """Train linear probes on frozen features at several shares of the labels, and measure them.

    Every share has the rows majority class, source only (with several sources), random encoder,
    raw backbone, Adaptor, and the paired difference of the last two. Everything is chosen on
    `validate`; the answers of `test` are read once, through a gate that writes it down. Backbone
    and Adaptor stay frozen. The rules in words: docs/protocol.md.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits and patients.
        run: Folder of a training run, for the Adaptor; None leaves its rows out.
        out: Gets `results.json`, `results.md`, `subsets/` and `test_reads.json`. A finished result
            of the same request is returned untouched.
        config: The protocol's numbers.
        device: Where the Adaptor and the random encoder run; probes are trained on the CPU.
        again: Allow another request to read the test split of this folder.

    Raises:
        StaleFeatureSetError: The Adaptor was trained on another encoder's features.
        ManifestError: A split is empty, a patient is in two splits, or there is one class only.
        TrainingError: The test split was read before, and `again` is False.
    """
    device = resolve_device(device)
    trained = None if run is None else load_adaptor(run, device=device)
    if trained is not None and run is not None:
        inputs.refuse_foreign(images, trained.image_fingerprint, run)
    labelled = labelled_images(images, manifest, config.label)
    _refuse_blind_choice(labelled, config)
    study = _Study(images, manifest, trained, labelled, config, device)
    request = protocol.request_hash(study.facts())
    done = protocol.finished(out, request)
    if done is not None:
        return done
    gate = TestGate(out, request, again=again)
    gate.check()
    return _measure(study, gate, out)


def _measure(study: "_Study", gate: TestGate, out: Path) -> Results:
    """Train and choose everything, then read the test labels, then write."""
    labelled, config, manifest = study.labelled, study.config, study.manifest
    shares = study.subsets()
    subsets = [subset for some in shares.values() for subset in some]
    listed = write_subsets(out / "subsets", labelled, subsets)
    given = study.inputs()
    answers = {percent: study.answers(some, given) for percent, some in shares.items()}
    test = labelled.of("test")
    judge = Judge(
        targets=gate.read({"targets": labelled.targets[test]})["targets"],
        subject_ids=[labelled.subject_ids[number] for number in test],
        classes=labelled.classes,
        draws=config.draws,
        seed=config.seed,
    )
    rows = [
        row for percent, some in shares.items() for row in study.rows(some, answers[percent], judge)
    ]
    notes = [
        *manifest.meta.notes,
        *_input_notes(study),
        *_rule_notes(study, subsets, judge),
        *inputs.adaptor_notes(study.trained, manifest),
        gate.note(),
    ]
    table = Table(
        title=f"Linear probes: {manifest.name}, label `{config.label}`, split test",
        columns=COLUMNS,
        rows=tuple(rows),
        notes=tuple(notes),
        configurations=sum(int(row.details.get("configurations_tried", 0)) for row in rows),
    )
    record = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "classes": list(labelled.classes),
        "left_out": dict(labelled.left_out),
        "subsets": listed,
    }
    return protocol.save_results(out, table, record)


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

    def subsets(self) -> dict[float, list[Subset]]:
        """The training subsets of every share."""
        config = self.config
        return {
            percent: training_subsets(
                self.labelled, percent, count=config.subsets, seed=config.seed
            )
            for percent in sorted(set(config.fractions))
        }

    def inputs(self) -> dict[str, Float32[np.ndarray, "N F"] | str]:
        """Vectors of all labelled images by method, or the reason why there are none."""
        made = vectors.image_vectors(
            self.images,
            self.labelled.rows,
            self.trained,
            device=self.device,
            batch_size=self.config.batch_size,
        )
        found: dict[str, Float32[np.ndarray, "N F"] | str] = {RANDOM: self._random(), RAW: made.raw}
        if made.adaptor is not None:
            found[ADAPTOR] = made.adaptor
        return found

    def _random(self) -> Float32[np.ndarray, "N F"] | str:
        """Vectors of the random encoder, or why there are none."""
        if not self.config.random_encoder:
            return "switched off by random_encoder=false"
        try:
            return vectors.random_vectors(
                self.images,
                self.manifest,
                self.labelled.keys,
                seed=self.config.seed,
                device=self.device,
            )
        except FeatcacheError as error:
            return f"not computed: {error.what.partition(';')[0]}"

    def answers(
        self, subsets: Sequence[Subset], inputs: Mapping[str, Float32[np.ndarray, "N F"] | str]
    ) -> dict[str, Answers]:
        """What every method answers for the test images after training on these subsets."""
        labelled, config = self.labelled, self.config
        members = [subset.members for subset in subsets]
        answers = {MAJORITY: majority_answers(labelled, members)}
        if len(set(labelled.sources)) > 1:
            answers[SOURCE] = source_answers(labelled, members)
        for method, given in inputs.items():
            if isinstance(given, str):
                answers[method] = no_answers(given, len(labelled.classes))
                continue
            answers[method] = probe_answers(
                labelled,
                members,
                given,
                decays=sorted(set(config.weight_decays)),
                seeds=[config.seed + number for number in range(config.seeds)],
                select_by=config.select_by,
                tolerance=config.tolerance,
                max_steps=config.max_steps,
            )
        return answers

    def rows(
        self, subsets: Sequence[Subset], answers: Mapping[str, Answers], judge: Judge
    ) -> Iterator[Row]:
        """The lines of one share."""
        sizes = sorted({len(subset.members) for subset in subsets})
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"
        setting = {"labels": f"{subsets[0].percent:g} %", "images": span}
        common = {"percent": subsets[0].percent, "subsets": len(subsets)}
        judged: dict[str, Judgement] = {}
        name = self.manifest.title
        for method, given in answers.items():
            if len(given.probabilities) == 0:
                yield Row(name, method, setting, details=dict(common), remark=given.remark)
                continue
            found = judged[method] = judge.judge(given)
            details = {**common, "runs": len(given.probabilities), **found.details}
            yield Row(name, method, setting, dict(found.figures), details, given.remark)
        if ADAPTOR in judged:
            found = judge.difference(judged[ADAPTOR], judged[RAW])
            details = {**common, "runs": len(answers[RAW].probabilities)}
            remark = "paired: same subsets, seeds and draws"
            yield Row(name, DIFFERENCE, setting, dict(found.figures), details, remark)


def _input_notes(study: _Study) -> Iterator[str]:
    """Sentences about what the probes read."""
    labelled, spec = study.labelled, study.images.spec
    yield (
        f"Features: `{spec.title}` ({spec.fingerprint[:12]}). Raw and random encoder: "
        f"{vectors.mean_rule(spec)}; Adaptor: the vector of its objective; all standardised by the "
        "training subset itself."
    )
    for reason, count in labelled.left_out.items():
        yield f"Left out: {count:,} images {reason}."
    for split in ("train", "validate", "test"):
        numbers = labelled.of(split)
        counts = ", ".join(f"{n} {c:,}" for n, c in labelled.class_counts(numbers).items())
        patients = len({labelled.subject_ids[number] for number in numbers})
        yield f"Split {split}: {len(numbers):,} images of {patients:,} patients ({counts})."
    if study.trained is None:
        yield "No run was given, so there is no row of an Adaptor."


def _rule_notes(study: _Study, subsets: Sequence[Subset], judge: Judge) -> Iterator[str]:
    """Sentences about how the figures were made, and what they do not say."""
    config = study.config
    yield (
        f"Mean ± standard deviation over {config.subsets} subsets x {config.seeds} seeds (at 100 % "
        "there is one subset, and probes that converged hardly depend on their seed: read the "
        f"interval). [95 % interval]: {config.draws:,} draws of test patients, each scored by all "
        "probes and averaged; a draw that lacks a class is left out."
    )
    yield (
        "Weight decay: chosen for each subset on validate by "
        f"{scores.TITLES[config.select_by]} (mean over its seeds; the smaller of equals)."
    )
    for name, count in judge.undefined_classes().items():
        yield (
            f"AUROC of class {name} is undefined ({count} of {len(judge.targets)} test images): "
            "macro AUROC is the mean over the other classes."
        )
    rare = judge.rare_classes()
    if rare:
        yield (
            "No interval for balanced accuracy and macro AUROC: in test, "
            f"{' and '.join(rare)} (or the rest) comes from a single patient."
        )
    for subset in subsets:
        if subset.missing:
            missing = ", ".join(subset.missing)
            yield f"{subset.percent:g} %, subset {subset.number}: no training image of {missing}."


def _refuse_blind_choice(labelled: LabelledImages, config: ProbeConfig) -> None:
    """Validation must be able to tell probes apart by the figure that chooses."""
    present = [n for n, count in labelled.class_counts(labelled.of("validate")).items() if count]
    if config.select_by == "auroc" and len(present) < 2:
        raise ManifestError(
            f"split `validate` holds one class only, `{present[0]}`: AUROC cannot choose there",
            fix="--set select_by=accuracy, or a manifest with a larger validate split",
        )


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
    asked = run is not None or workspace.current("run") is not None
    folder = workspace.run(run) if asked else None
    table = open_manifest(workspace.manifest(manifest))
    reads = load_adaptor(folder).image_fingerprint if folder is not None else None
    images = FeatureSet.open(inputs.feature_folder(workspace, "image", backbone, reads, folder))
    name = f"{table.name}-{config.label}-{images.folder.name}"
    out = inputs.results_folder(workspace, folder) / "finetune" / name
    note(f"finetune: {images.spec.title}, run {folder.name if folder else '-'}, {table.title}")
    return finetune(images, table, folder, out, config, device=device, again=again)
