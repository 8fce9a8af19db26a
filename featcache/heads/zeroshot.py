"""Zero-shot classification: an image goes to the class whose sentences it scores highest with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, JsonValue, PositiveInt

from featcache import __version__
from featcache.adaptor.saved import TrainedAdaptor, load_adaptor
from featcache.cache.reader import FeatureSet
from featcache.config import Config, to_plain
from featcache.device import resolve_device
from featcache.encoders.request import run_features
from featcache.errors import UsageError, nearest
from featcache.heads import classify_notes, inputs, protocol, scores
from featcache.heads.answers import Answers, majority_answers, no_answers, source_answers
from featcache.heads.findings import finding_names, labelled_findings
from featcache.heads.judge import Judge, Judgement, differences
from featcache.heads.labels import LabelledImages, LabelPolicy, labelled_images
from featcache.heads.prompt_reader import PromptReader, open_prompt_reader
from featcache.heads.prompts import Prompts, find_prompts, prompted_findings, refuse_other_label
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.heads.sentence_scores import class_scores, sentence_logits, untrained_adaptor
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace

COLUMNS = tuple(Column(name, f"{scores.TITLES[name]} %") for name in scores.METRICS)
MAJORITY, SOURCE = "majority class", "source only"
UNTRAINED, FIRST, ADAPTOR = "untrained Adaptor", "Adaptor, first prompt alone", "Adaptor"
NEEDS = ("test",)
"""Nothing is trained or chosen, so a manifest may be a test set and nothing else."""
MINUS = {
    UNTRAINED: "Adaptor minus untrained Adaptor",
    FIRST: "Adaptor minus first prompt alone",
    MAJORITY: "Adaptor minus majority class",
}
"""Differences that the table shows; `results.json` has them all."""


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
        UsageError: A class has no prompts, or there is no such label, or a name is misspelt.
        ManifestError: No test image can be used, a patient is in two splits, or there is nothing to
            tell apart.
    """
    if prompts.findings:
        names = prompted_findings(prompts, manifest, finding_names(manifest))
        return labelled_findings(images, manifest, names, config.policy, needs=NEEDS)
    refuse_other_label(prompts, manifest)
    found = labelled_images(images, manifest, prompts.label, config.policy, needs=NEEDS)
    lacking = [name for name in found.classes if name not in prompts.classes]
    if lacking:
        raise UsageError(
            f"the class `{lacking[0]}` has no prompts; {nearest(lacking[0], [*prompts.classes])}",
            where="--prompts",
            fix=f"a file whose `classes` are: {', '.join(found.classes)}",
        )
    return found


def zeroshot(
    images: FeatureSet,
    manifest: Manifest,
    run: Path,
    texts: Path,
    out: Path,
    config: ZeroShotConfig,
    *,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """Classify the test images by sentences, without training on any label, and measure it.

    Rows: majority class, source only (with several sources), Adaptors with random weights, the
    Adaptor with one sentence a class, the Adaptor with all of them, and its paired differences to
    those. Nothing is chosen here; the test labels are read once. A manifest of test images alone
    will do: rows that are made of training labels then say that there are none.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits and patients.
        run: Folder of the training run.
        texts: Folder of the text set that the run was trained on, which says how sentences are
            encoded and stored; its shards are not read.
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
    gate = protocol.open_gate(out, study.facts(), again=again)
    if isinstance(gate, Results):
        return gate
    reader = open_prompt_reader(texts, trained, device=device)
    return _measure(study, study.answers(reader), gate, out)


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
    judged = {way: judge.judge(one) for way, one in answers.items() if len(one.probabilities)}
    table = Table(
        title=f"Zero-shot: {manifest.name}, split test",
        columns=COLUMNS[-1:] if labelled.of_findings else COLUMNS,
        rows=tuple(study.rows(answers, judged, judge)),
        notes=tuple(notes),
        configurations=0,
    )
    record = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "classes": list(labelled.classes),
        "left_out": dict(labelled.left_out),
        "differences": list(differences(judged, judge)),
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

    def answers(self, reader: PromptReader) -> dict[str, Answers]:
        """What every method answers for the test images."""
        config, labelled = self.config, self.labelled
        answers = dict(self._trivial())
        seeds = [config.seed + number for number in range(config.untrained)]
        adaptors = [
            *(untrained_adaptor(self.trained, seed, self.device) for seed in seeds),
            self.trained,
        ]
        groups = self.prompts.groups(labelled.classes)
        sentences = sorted({one for some in groups for one in some})
        logits = sentence_logits(
            adaptors,
            reader.vectors(adaptors, sentences),
            self.images,
            labelled.rows[labelled.of("test")],
            device=self.device,
            batch_size=config.batch_size,
        )
        place = {sentence: number for number, sentence in enumerate(sentences)}
        ways = {ADAPTOR: groups, FIRST: self.prompts.first_alone().groups(labelled.classes)}
        found = {
            way: [
                class_scores(
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
        cut = reader.count_cut(sentences)
        remark = f"{cut} of {len(sentences)} sentences are longer than the encoder reads"
        answers[ADAPTOR] = Answers(np.stack(found[ADAPTOR][-1:]), remark=remark if cut else "")
        return answers

    def _trivial(self) -> Iterator[tuple[str, Answers]]:
        """What training labels alone tell about the test images, or why that is not known."""
        labelled = self.labelled
        made = {MAJORITY: majority_answers}
        if len(set(labelled.sources)) > 1:
            made[SOURCE] = source_answers
        train = labelled.of("train")
        constant = "any constant answer has AUROC 50 %" if labelled.of_findings else ""
        reason = "; ".join(["not computable: no training image here has a label", constant])
        for way, answer in made.items():
            if len(train):
                yield way, answer(labelled, [train])
            else:
                yield way, no_answers(reason.removesuffix("; "), len(labelled.classes))

    def rows(
        self, answers: Mapping[str, Answers], judged: Mapping[str, Judgement], judge: Judge
    ) -> Iterator[Row]:
        """The lines of the table."""
        labelled, name = self.labelled, self.manifest.title
        setting = {"images": f"{len(judge.targets):,}"}
        undefined = judge.undefined_classes()
        if labelled.of_findings and len(labelled.classes) > 1:
            setting["finding"] = f"mean of {len(labelled.classes) - len(undefined)}"
        elif labelled.of_findings:
            setting["finding"] = labelled.classes[0]
        shown = scores.metric_names((), of_findings=labelled.of_findings)
        for way, given in answers.items():
            found = judged.get(way)
            figures = {} if found is None else {one: found.figures[one] for one in shown}
            details = {} if found is None else dict(found.details)
            yield Row(name, way, setting, figures, details, given.remark)
        gaps = self._gaps(judged, judge)
        for way, found in gaps.items():
            figures = {one: found.figures[one] for one in shown}
            yield Row(name, way, setting, figures, remark="paired: same draws")
        if not labelled.of_findings or len(labelled.classes) == 1:
            return
        lines = {**judged, MINUS[UNTRAINED]: gaps[MINUS[UNTRAINED]]}
        for finding in labelled.classes:
            has, known = undefined.get(finding, (0, 0))
            remark = f"undefined ({has} of {known} images)" if finding in undefined else ""
            for way, found in lines.items():
                figures = {"auroc": found.figures[scores.OF_FINDING + finding]}
                yield Row(name, way, {**setting, "finding": finding}, figures, remark=remark)

    def _gaps(self, judged: Mapping[str, Judgement], judge: Judge) -> dict[str, Judgement]:
        """The Adaptor minus others, as far as they have figures that could differ."""
        # Of findings there is AUROC alone, and that of the majority row is 50 % whatever happens.
        same = (MAJORITY,) if self.labelled.of_findings else ()
        others = [way for way in MINUS if way in judged and way not in same]
        return {MINUS[way]: judge.difference(judged[ADAPTOR], judged[way]) for way in others}

    def notes(self) -> Iterator[str]:
        """Sentences above the table."""
        groups = self.prompts.groups(self.labelled.classes)
        count = len({sentence for some in groups for sentence in some})
        rule = "score: its log-odds against the others"
        if self.labelled.of_findings:
            rule = "a finding's score: that of its presence minus that of its absence"
        yield (
            f"No label was trained on and nothing was chosen. {count} sentences; logit of a class: "
            f"the mean over its sentences; {rule}. Scores are never squeezed into probabilities."
        )
        if len(self.labelled.of("train")):
            known = " and ".join(f"`{way}`" for way, _ in self._trivial())
            yield f"Training labels are known to {known} alone."
        yield (
            f"[95 % interval]: {self.config.draws:,} draws of the test patients. The spread of "
            f"`{UNTRAINED}` is over its random weights."
        )
        for reason, lost in self.labelled.left_out.items():
            yield f"Left out: {lost:,} images {reason}."
        if not self.labelled.of_findings:
            yield (
                "The largest score is the prediction, of equals the first class by name; no "
                "threshold was tuned. Pairs that tie count half in AUROC."
            )
        unused = sorted({*self.prompts.classes, *self.prompts.findings} - {*self.labelled.classes})
        if unused:
            yield f"Prompts without a label in this manifest: {', '.join(unused)}."


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
    found = inputs.look_up(workspace, folder, backbone=backbone, manifest=manifest)
    images, table = found.images, found.manifest
    name, sentences = "config", config.prompts
    if sentences is None or prompts is not None:
        name, sentences = find_prompts(prompts, table)
        config = config.model_copy(update={"prompts": sentences})
    texts = run_features(workspace, str(folder), "text")
    # Other sentences are another request to the same folder: else they could be chosen on test.
    asked = "findings" if sentences.findings else sentences.label
    out = found.results / "zeroshot" / f"{table.name}-{asked}-{images.folder.name}"
    found.announce("zeroshot", f", prompts `{name}`")
    return zeroshot(images, table, folder, texts, out, config, device=device, again=again)
