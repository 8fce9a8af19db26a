"""Zero-shot classification: an image goes to the class whose sentences it scores highest with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field, JsonValue, PositiveInt
from torch import Tensor

from featcache import __version__
from featcache.adaptor.saved import TrainedAdaptor, build_adaptor, load_adaptor
from featcache.cache.reader import FeatureSet
from featcache.config import Config, to_plain
from featcache.console import note, task
from featcache.device import resolve_device
from featcache.encoders.interface import load_encoder
from featcache.encoders.request import EncoderRequest, locate_all, run_request
from featcache.encoders.text import FrozenTextEncoder
from featcache.errors import UsageError, nearest
from featcache.heads import classify_notes, inputs, protocol, scores
from featcache.heads.answers import Answers, majority_answers, source_answers
from featcache.heads.findings import labelled_findings
from featcache.heads.judge import Judge, Judgement
from featcache.heads.labels import LabelledImages, LabelPolicy, labelled_images
from featcache.heads.prompts import Prompts, encode_prompts, find_prompts, text_spec
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.loader.gather import iterate_rows
from featcache.manifest.table import Manifest, open_manifest
from featcache.workspace import Workspace

COLUMNS = tuple(Column(name, f"{scores.TITLES[name]} %") for name in scores.METRICS)
MAJORITY, SOURCE = "majority class", "source only"
UNTRAINED, FIRST, ADAPTOR = "untrained Adaptor", "Adaptor, first prompt alone", "Adaptor"
DIFFERENCE = "Adaptor minus untrained Adaptor"


class ZeroShotConfig(Config):
    """How zero-shot classification is measured."""

    prompts: Prompts | None = Field(
        None, description="The sentences; none: those of --prompts, else of the data set."
    )
    uncertain: Literal["ignore", "positive", "negative"] = Field(
        "ignore", description="What a finding's label -1 (uncertain) counts as."
    )
    blank: Literal["ignore", "negative"] = Field(
        "ignore", description="What a finding's empty label (not mentioned) counts as."
    )
    untrained: PositiveInt = Field(3, description="Adaptors with random weights in their row.")
    draws: int = Field(1000, ge=100, description="Bootstrap draws of the test patients.")
    batch_size: PositiveInt = Field(32, description="Images scored at a time.")
    seed: int = Field(0, ge=0, description="Seed of the untrained Adaptors and the bootstrap.")

    @property
    def policy(self) -> LabelPolicy:
        """What labels mean that say neither yes nor no."""
        return LabelPolicy(self.uncertain, self.blank)


def labels_of(
    images: FeatureSet, manifest: Manifest, prompts: Prompts, config: ZeroShotConfig
) -> LabelledImages:
    """The labelled images that the prompts are about.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits and patients.
        prompts: Name the label, or the findings.
        config: The policy of labels that say neither yes nor no.

    Raises:
        UsageError: A class has no prompts, or there is no such label.
        ManifestError: A split is empty, a patient is in two, or there is nothing to tell apart.
    """
    if prompts.findings:
        known = [name for name in prompts.findings if name in manifest.label_names]
        if not known:
            raise UsageError(
                "the prompts are about findings that the manifest has no labels of",
                where=manifest.folder,
                fix=f"--prompts FILE; labels: {', '.join(manifest.label_names) or 'none'}",
            )
        return labelled_findings(images, manifest, sorted(known), config.policy)
    found = labelled_images(images, manifest, prompts.label, config.policy)
    lacking = [name for name in found.classes if name not in prompts.classes]
    if lacking:
        raise UsageError(
            f"the class `{lacking[0]}` has no prompts; {nearest(lacking[0], [*prompts.classes])}",
            where="--prompts",
            fix=f"a file whose `classes` are: {', '.join(found.classes)}",
        )
    return found


def probabilities_of(
    logits: Float[np.ndarray, "n J"], groups: Sequence[Sequence[int]], *, of_findings: bool
) -> Float[np.ndarray, "n C"]:
    """Class probabilities from the scores of sentences.

    The score of a class is the mean over its sentences; a finding's is that of its presence minus
    that of its absence.

    Args:
        logits: Score of each image with each sentence.
        groups: Numbers of the sentences of each class, or of present and absent by turns.
        of_findings: Whether groups come in such pairs.
    """
    means = np.stack([logits[:, list(some)].mean(axis=1) for some in groups], axis=1)
    means = means.astype(np.float64)
    if of_findings:
        return np.asarray(1.0 / (1.0 + np.exp(means[:, 1::2] - means[:, ::2])))
    raised = np.exp(means - means.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def zeroshot(
    images: FeatureSet,
    manifest: Manifest,
    run: Path,
    request: EncoderRequest,
    out: Path,
    config: ZeroShotConfig,
    *,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """Classify the test images by sentences, without training on any label, and measure it.

    Rows: majority class, source only (with several sources), Adaptors with random weights, the
    Adaptor with one sentence a class, the Adaptor with all of them, the paired difference to the
    random ones. Nothing is chosen here; the test labels are read once.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits and patients.
        run: Folder of the training run.
        request: The run's text encoder, as asked for.
        out: Gets `results.json`, `results.md` and `test_reads.json`. A finished result of the same
            request is returned untouched.
        config: The sentences and the protocol's numbers.
        device: Where text encoder and Adaptor run.
        again: Allow another request to read the test split of this folder.

    Raises:
        StaleFeatureSetError: The Adaptor was trained on other encoders.
        UsageError: There are no prompts, or a class has none.
        ManifestError: The labels cannot be used.
        TrainingError: The test split was read before, and `again` is False.
    """
    device = resolve_device(device)
    prompts = config.prompts
    if prompts is None:
        raise UsageError("no prompts were given", where="prompts", fix="see `find_prompts`")
    trained = load_adaptor(run, device=device)
    inputs.refuse_foreign(images, trained.image_fingerprint, run)
    labelled = labels_of(images, manifest, prompts, config)
    study = _Study(images, manifest, trained, labelled, prompts, config, device)
    gate = TestGate(out, protocol.request_hash(study.facts()), again=again)
    done = protocol.finished(out, gate.request)
    if done is not None:
        return done
    gate.check()
    (located,) = locate_all([request])
    encoder = cast(FrozenTextEncoder, load_encoder(located, device=device))
    answers = study.answers(encoder, request)
    return _measure(study, answers, gate, out)


def _measure(study: "_Study", answers: Mapping[str, Answers], gate: TestGate, out: Path) -> Results:
    """Hold the answers against the test labels, then write."""
    labelled, manifest, config = study.labelled, study.manifest, study.config
    test = labelled.of("test")
    judge = Judge(
        targets=gate.read({"targets": labelled.targets[test]})["targets"],
        subject_ids=[labelled.subject_ids[number] for number in test],
        classes=labelled.classes,
        draws=config.draws,
        seed=config.seed,
    )
    names = list(labelled.classes) if labelled.of_findings else [study.prompts.label]
    notes = [
        *manifest.meta.notes,
        *study.notes(),
        *classify_notes.about_labels(manifest, labelled, names, config.policy),
        *classify_notes.about_gaps((), judge),
        *inputs.adaptor_notes(study.trained, manifest),
        gate.note(),
    ]
    table = Table(
        title=f"Zero-shot: {manifest.name}, split test",
        columns=COLUMNS[-1:] if labelled.of_findings else COLUMNS,
        rows=tuple(study.rows(answers, judge)),
        notes=tuple(notes),
        configurations=0,
    )
    record = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "classes": list(labelled.classes),
        "left_out": dict(labelled.left_out),
    }
    return protocol.save_results(out, table, record)


@dataclass(frozen=True)
class _Study:
    """What is asked, with everything it is asked of."""

    images: FeatureSet
    manifest: Manifest
    trained: TrainedAdaptor
    labelled: LabelledImages
    prompts: Prompts
    config: ZeroShotConfig
    device: str

    def facts(self) -> dict[str, JsonValue]:
        """Everything that decides the result, without paths."""
        return {
            "head": "zeroshot",
            "split": "test",
            **inputs.source_facts(self.manifest, self.trained, images=self.images),
            "text_features": self.trained.text_fingerprint,
            "config": to_plain(self.config),
        }

    def answers(self, encoder: FrozenTextEncoder, request: EncoderRequest) -> dict[str, Answers]:
        """What every method answers for the test images."""
        labelled = self.labelled
        train = [labelled.of("train")]
        answers = {MAJORITY: majority_answers(labelled, train)}
        if len(set(labelled.sources)) > 1:
            answers[SOURCE] = source_answers(labelled, train)
        spec = text_spec(encoder, request, self.trained)
        seeds = [self.config.seed + number for number in range(self.config.untrained)]
        adaptors = [
            *(untrained_adaptor(self.trained, seed, self.device) for seed in seeds),
            self.trained,
        ]
        groups = self.prompts.groups(labelled.classes)
        sentences = sorted({one for some in groups for one in some})
        texts = [
            encode_prompts(one, encoder, spec, sentences, device=self.device) for one in adaptors
        ]
        logits = self._logits(adaptors, texts)
        place = {sentence: number for number, sentence in enumerate(sentences)}
        ways = {
            ADAPTOR: groups,
            FIRST: self.prompts.first_alone().groups(labelled.classes),
        }
        found = {
            way: [
                probabilities_of(
                    one,
                    [[place[sentence] for sentence in some] for some in chosen],
                    of_findings=labelled.of_findings,
                )
                for one in logits
            ]
            for way, chosen in ways.items()
        }
        remark = f"random weights, the same sentences; {len(seeds)} of them"
        answers[UNTRAINED] = Answers(np.stack(found[ADAPTOR][:-1]), remark=remark)
        if ways[FIRST] != groups:
            answers[FIRST] = Answers(np.stack(found[FIRST][-1:]))
        answers[ADAPTOR] = Answers(np.stack(found[ADAPTOR][-1:]))
        return answers

    @torch.inference_mode()
    def _logits(
        self, adaptors: Sequence[TrainedAdaptor], texts: Sequence[Float[Tensor, "J dim"]]
    ) -> list[Float32[np.ndarray, "n J"]]:
        """Scores of the test images with all sentences by several Adaptors, in one pass."""
        rows = self.labelled.rows[self.labelled.of("test")]
        made: list[list[np.ndarray]] = [[] for _ in adaptors]
        done = 0
        with task(f"score {self.images.spec.title}", len(rows)) as progress:
            blocks = iterate_rows(self.images, rows, self.config.batch_size, **self.trained.reading)
            for some, tokens, _ in blocks:
                moved = tokens.to(self.device, torch.float32)
                for one, asked, parts in zip(adaptors, texts, made, strict=True):
                    encoded = one.objective.encode_images(one.adaptor, moved)
                    parts.append(
                        one.objective.score(encoded, asked, one.adaptor.scale).float().cpu().numpy()
                    )
                done += len(some)
                progress.update(done)
        return [np.concatenate(parts) for parts in made]

    def rows(self, answers: Mapping[str, Answers], judge: Judge) -> Iterator[Row]:
        """The lines of the table."""
        labelled, name = self.labelled, self.manifest.title
        setting = {"images": f"{len(judge.targets):,}"}
        judged: dict[str, Judgement] = {way: judge.judge(one) for way, one in answers.items()}
        judged[DIFFERENCE] = judge.difference(judged[ADAPTOR], judged[UNTRAINED])
        remarks = {way: one.remark for way, one in answers.items()}
        remarks[DIFFERENCE] = "paired: same draws"
        undefined = judge.undefined_classes()
        if labelled.of_findings and len(labelled.classes) > 1:
            setting["finding"] = f"mean of {len(labelled.classes) - len(undefined)}"
        elif labelled.of_findings:
            setting["finding"] = labelled.classes[0]
        for way, found in judged.items():
            shown = scores.metric_names((), of_findings=labelled.of_findings)
            figures = {column: found.figures[column] for column in shown}
            yield Row(name, way, setting, figures, dict(found.details), remarks[way])
        if not labelled.of_findings or len(labelled.classes) == 1:
            return
        for finding in labelled.classes:
            has, known = undefined.get(finding, (0, 0))
            remark = f"undefined ({has} of {known} images)" if finding in undefined else ""
            for way, found in judged.items():
                figures = {"auroc": found.figures[scores.OF_FINDING + finding]}
                yield Row(name, way, {**setting, "finding": finding}, figures, remark=remark)

    def notes(self) -> Iterator[str]:
        """Sentences above the table."""
        groups = self.prompts.groups(self.labelled.classes)
        count = len({sentence for some in groups for sentence in some})
        yield (
            f"No label was trained on and nothing was chosen. {count} sentences; a class scores "
            "the mean of its sentences' logits, a finding that of its presence minus that of its "
            "absence. The majority row alone knows training labels."
        )
        yield (
            f"[95 % interval]: {self.config.draws:,} draws of the test patients. The spread of "
            f"`{UNTRAINED}` is over its random weights."
        )
        for reason, lost in self.labelled.left_out.items():
            yield f"Left out: {lost:,} images {reason}."
        if not self.labelled.of_findings:
            yield (
                "The largest probability is the prediction, of equals the first class by name; no "
                "threshold was tuned. Pairs that tie count half in AUROC."
            )
        unused = sorted({*self.prompts.classes, *self.prompts.findings} - {*self.labelled.classes})
        if unused:
            yield f"Prompts without a label in this manifest: {', '.join(unused)}."


def untrained_adaptor(trained: TrainedAdaptor, seed: int, device: str) -> TrainedAdaptor:
    """The same architecture with random weights.

    Args:
        trained: Whose architecture, features and facts it takes.
        seed: Of the weights; the global generator is left as it was.
        device: Where it goes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adaptor, objective = build_adaptor(
            trained.config, trained.facts.image.dim, trained.facts.text.dim
        )
    for module in (adaptor, objective):
        module.to(device).eval().requires_grad_(False)
    return replace(trained, adaptor=adaptor, objective=objective)


def zeroshot_workspace(
    workspace: Workspace,
    config: ZeroShotConfig,
    *,
    run: str | None = None,
    prompts: str | None = None,
    backbone: str | None = None,
    manifest: str | None = None,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """`zeroshot` on what a workspace holds.

    Args:
        workspace: Where names are looked up, and where the result is written.
        config: The protocol's numbers.
        run: Name or folder of a run; None is the current one.
        prompts: Name or file of prompts; None: those of the manifest's data set.
        backbone: Name or folder of an image set; None is the one the run's Adaptor reads.
        manifest: Name or folder of a manifest; None is the current one.
        device: `auto`, `cpu` or `cuda`.
        again: Allow another request to read the test split of the output folder.
    """
    folder = workspace.run(run)
    table = open_manifest(workspace.manifest(manifest))
    name, sentences = "config", config.prompts
    if sentences is None or prompts is not None:
        name, sentences = find_prompts(prompts, table)
        config = config.model_copy(update={"prompts": sentences})
    reads = load_adaptor(folder).image_fingerprint
    images = FeatureSet.open(inputs.feature_folder(workspace, "image", backbone, reads, folder))
    request = run_request(workspace, str(folder), "text")
    # Other sentences are another request to the same folder: else they could be chosen on test.
    asked = "findings" if sentences.findings else sentences.label
    out = inputs.results_folder(workspace, folder) / "zeroshot"
    out /= f"{table.name}-{asked}-{images.folder.name}"
    note(f"zeroshot: run {folder.name}, {images.spec.title}, {table.title}, prompts `{name}`")
    return zeroshot(images, table, folder, request, out, config, device=device, again=again)
