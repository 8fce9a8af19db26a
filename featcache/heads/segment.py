"""Segmentation from cached tokens, beside the rows that any such result must be read against."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import JsonValue

from featcache import __version__
from featcache.adaptor.saved import load_adaptor
from featcache.cache.reader import FeatureSet
from featcache.device import resolve_device
from featcache.heads import inputs, protocol
from featcache.heads.judge import Judgement, differences
from featcache.heads.labels import Subset, write_subsets
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.heads.published import published_notes, published_rows
from featcache.heads.segment_masks import masked_images, refuse_without_grid
from featcache.heads.segment_scores import (
    METRICS,
    TITLES,
    Levels,
    MaskAnswer,
    MaskJudge,
)
from featcache.heads.segment_study import (
    ADAPTOR,
    NOTHING,
    PRIOR,
    RAW,
    Fit,
    Study,
    answer_all,
    fit_all,
    fit_prior,
)
from featcache.heads.segment_tokens import GridTokens
from featcache.heads.segment_train import SegmentConfig, learning_rates
from featcache.heads.table import DIGITS
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace

__all__ = ["SegmentConfig", "segment", "segment_workspace"]

COLUMNS = tuple(Column(name, f"{TITLES[name]} %") for name in METRICS if name != "pointing")
Judged = Mapping[float, Mapping[str, Judgement]]


def segment(
    images: FeatureSet,
    manifest: Manifest,
    run: Path | None,
    out: Path,
    config: SegmentConfig,
    *,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """Train light decoders on grids of frozen tokens at several shares of the labels.

    Every share has the rows all empty, mean training mask, random encoder, raw backbone, Adaptor,
    its paired differences to the raw backbone and to the trivial mask, and published figures.
    Learning rates and thresholds are chosen on `validate`; the masks of `test` are read once,
    through a gate that writes it down. A stopped call goes on after the decoders that it finished.
    The rules in words: docs/protocol.md.

    Args:
        images: Features of the manifest's images, with a grid.
        manifest: Masks, splits and patients.
        run: Folder of a training run, for the Adaptor; None leaves its rows out.
        out: Gets `results.json`, `results.md`, `subsets/`, `decoders/` and `test_reads.json`, and
            while it runs `tokens/`. A finished result of the same request is returned untouched.
        config: The protocol's numbers.
        device: Where the Adaptor, the random encoder and the decoders run.
        again: Allow another request to read the test split of this folder.

    Raises:
        CacheError: The set has no grid; nothing was read then.
        StaleFeatureSetError: The Adaptor was trained on another encoder's features.
        ManifestError: There are no masks, a split is empty, or a patient is in two splits.
        TrainingError: The test split was read before, and `again` is False.
    """
    refuse_without_grid(images.spec, images.folder)
    device = resolve_device(device)
    trained = None if run is None else load_adaptor(run, device=device)
    if trained is not None and run is not None:
        inputs.refuse_foreign(images, trained.image_fingerprint, run)
    masked = masked_images(images, manifest)
    study = Study(images, manifest, trained, masked, config, device, out)
    gate = protocol.open_gate(out, study.facts(), again=again)
    if isinstance(gate, Results):
        return gate
    results = _measure(study, gate)
    shutil.rmtree(out / "tokens", ignore_errors=True)
    return results


def _measure(study: Study, gate: TestGate) -> Results:
    """Train and choose everything, then read the test masks, then write."""
    masked, config, manifest = study.masked, study.config, study.manifest
    labelled = masked.labelled
    subsets = study.subsets()
    listed = write_subsets(study.out / "subsets", labelled, subsets)
    known = study.known()
    tokens = study.tokens()
    fits = fit_all(study, subsets, tokens, known, gate.request)
    priors = [fit_prior(study, subset, known) for subset in subsets]
    numbers = study.of("test")
    test = gate.read({"masks": masked.masks(numbers, study.size)})["masks"]
    answers = answer_all(study, tokens, fits, priors, test)
    judge = MaskJudge(
        subject_ids=[labelled.subject_ids[number] for number in numbers],
        positive=masked.positive[numbers],
        draws=config.draws,
        seed=config.seed,
    )
    judged = _judge_all(subsets, answers, judge)
    rows = list(_rows(study, subsets, tokens, fits, judged, judge))
    notes = [
        *manifest.meta.notes,
        *_input_notes(study, known.validate.thin + test.thin),
        *_rule_notes(study, judge),
        *published_notes("segment", manifest, config.fractions),
        *inputs.adaptor_notes(study.trained, manifest),
        gate.note(),
    ]
    table = Table(
        title=f"Segmentation: {manifest.name}, decoder `{config.decoder}`, split test",
        columns=COLUMNS,
        rows=tuple(rows),
        notes=tuple(notes),
        configurations=sum(int(row.details.get("configurations_tried", 0)) for row in rows),
    )
    record = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "mask_size": list(study.size),
        "left_out": dict(labelled.left_out),
        "subsets": listed,
        "differences": [
            {"labels": f"{percent:g} %", **one}
            for percent, some in judged.items()
            for one in differences(some, judge)
        ],
    }
    return protocol.save_results(study.out, table, record)


def _judge_all(
    subsets: Sequence[Subset],
    answers: Mapping[str, Sequence[Sequence[MaskAnswer]]],
    judge: MaskJudge,
) -> dict[float, dict[str, Judgement]]:
    """Figures of every share and method, the trivial ones first."""
    judged: dict[float, dict[str, Judgement]] = {}
    for percent in sorted({subset.percent for subset in subsets}):
        places = [at for at, subset in enumerate(subsets) if subset.percent == percent]
        judged[percent] = {}
        for method, runs in answers.items():
            some = places[:1] if method == NOTHING else places  # the same for every subset
            judged[percent][method] = judge.judge([run for at in some for run in runs[at]])
    return judged


def _rows(
    study: Study,
    subsets: Sequence[Subset],
    tokens: Mapping[str, GridTokens | str],
    fits: Mapping[str, Sequence[Fit]],
    judged: Judged,
    judge: MaskJudge,
) -> Iterator[Row]:
    """The lines of every share."""
    name, methods = study.manifest.title, [NOTHING, PRIOR, *tokens]
    for percent, some in judged.items():
        places = [at for at, subset in enumerate(subsets) if subset.percent == percent]
        sizes = sorted({len(subsets[at].members) for at in places})
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"
        setting = {"labels": f"{percent:g} %", "images": span}
        common = {"percent": percent, "subsets": len(places)}
        for method in methods:
            reason = tokens.get(method)
            if isinstance(reason, str):
                yield Row(name, method, setting, details=dict(common), remark=reason)
                continue
            found = some[method]
            details = {**common, "runs": found.runs, **found.details}
            remark = "sees no pixel" if method in (NOTHING, PRIOR) else ""
            if method in fits:
                details |= _fit_details(study.config, [fits[method][at] for at in places])
                remark = _gave_up(found, len(judge.positive))
            yield Row(name, method, setting, dict(found.figures), details, remark)
        for other in (RAW, _trivial(study)):
            if ADAPTOR not in some:
                break
            found = judge.difference(some[ADAPTOR], some[other])
            remark = "paired: same subsets, seeds and draws"
            details = {**common, "runs": found.runs}
            yield Row(
                name, f"{ADAPTOR} minus {other}", setting, dict(found.figures), details, remark
            )
        yield from published_rows("segment", study.manifest, percent)


def _trivial(study: Study) -> str:
    """The mask to beat: the empty one, or where no image is without a mask the mean one."""
    return PRIOR if study.masked.positive.all() else NOTHING


def _fit_details(config: SegmentConfig, fits: Sequence[Fit]) -> dict[str, JsonValue]:
    """What was tried and chosen, for `results.json`."""
    levels = Levels()
    return {
        "configurations_tried": len(fits) * config.seeds * len(learning_rates(config)),
        "parameters": sum(one.numel() for one in fits[0].decoders[0].parameters()),
        "chosen": [fit.facts for fit in fits],
        "thresholds": [
            {name: _probability(levels.value(level)) for name, level in vars(one).items()}
            for fit in fits
            for one in fit.operating
        ],
    }


def _probability(logit: float | None) -> float | None:
    """A level as a probability; None for the one that nothing reaches."""
    return None if logit is None else round(float(torch.tensor(logit).sigmoid()), DIGITS)


def _gave_up(found: Judgement, images: int) -> str:
    """How many runs give every test image the empty mask."""
    empty = found.details["empty_predictions"]
    count = sum(one == images for one in empty) if isinstance(empty, list) else 0
    return f"{count} of {found.runs} runs predict nothing on test" if count else ""


def _input_notes(study: Study, thin: int) -> Iterator[str]:
    """Sentences about what the decoders read and what counts as right."""
    masked, spec, config = study.masked, study.images.spec, study.config
    labelled, (height, width) = masked.labelled, study.size
    grid = spec.grid or (0, 0)
    yield (
        f"Features: patch tokens of `{spec.title}` ({spec.fingerprint[:12]}), a grid of "
        f"{grid[0]} x {grid[1]}; Adaptor: its adapted tokens at the same places. "
        f"Masks: {height} x {width} pixels, fit `{masked.fit}` like the pictures, inside = at "
        "least half covered."
    )
    if thin:
        yield (
            f"{thin} mask(s) of validate and test cover no pixel by half: their best covered "
            "pixels stand for them, so that no image with a finding counts as empty."
        )
    for reason, count in labelled.left_out.items():
        yield f"Left out: {count:,} images {reason}."
    for split in ("train", "validate", "test"):
        numbers = labelled.of(split)
        patients = len({labelled.subject_ids[number] for number in numbers})
        yield (
            f"Split {split}: {len(numbers):,} images of {patients:,} patients, "
            f"{int(masked.positive[numbers].sum()):,} with a mask."
        )
    if config.select_by == "dice" and not masked.positive[labelled.of("test")].all():
        yield (
            "Dice over all images rewards the empty mask: it is what the published protocol "
            "counts; read it beside the row `all empty` and Dice over positives."
        )
    if study.trained is None:
        yield "No run was given, so there is no row of an Adaptor."


def _rule_notes(study: Study, judge: MaskJudge) -> Iterator[str]:
    """Sentences about how the figures were made, and what they do not say."""
    config = study.config
    yield (
        "Dice, all: mean over images, empty on empty = 1. Dice, positive: images with a mask "
        "alone. Pixel Dice: pixels of all images pooled. Presence AUROC: an image's highest value. "
        "Positive, own t: Dice, positive at the threshold that is best for it on validate."
    )
    yield (
        f"Learning rate (for each subset), threshold and presence threshold (for each decoder): "
        f"chosen on validate by {TITLES[config.select_by]}. An image whose highest value stays "
        "below the presence threshold gets the empty mask."
    )
    yield (
        f"Mean ± standard deviation over {config.subsets} subsets x {config.seeds} seeds (one "
        f"subset at 100 %). [95 % interval]: {config.draws:,} draws of test patients, each scored "
        "by all runs and averaged; a draw in which a figure does not exist is left out."
    )
    missing = [TITLES[name] for name, has in judge.has_interval().items() if not has]
    if missing:
        yield f"No interval for {', '.join(missing)}: too few test patients of one kind."


def segment_workspace(
    workspace: Workspace,
    config: SegmentConfig,
    *,
    run: str | None = None,
    backbone: str | None = None,
    manifest: str | None = None,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """`segment` on what a workspace holds.

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
    found = inputs.look_up(workspace, folder, backbone=backbone, manifest=manifest, needs_grid=True)
    images, table = found.images, found.manifest
    out = found.results / "segment" / f"{table.name}-{config.decoder}-{images.folder.name}"
    found.announce("segment")
    return segment(images, table, folder, out, config, device=device, again=again)
