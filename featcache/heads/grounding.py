"""Zero-shot segmentation: where in a radiograph the Adaptor finds what a phrase says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from pydantic import Field, JsonValue, PositiveInt

from featcache import __version__
from featcache.adaptor.saved import TrainedAdaptor, load_adaptor
from featcache.cache.reader import FeatureSet
from featcache.config import Config, to_plain
from featcache.device import resolve_device
from featcache.encoders.request import run_features
from featcache.errors import UsageError
from featcache.heads import inputs, protocol
from featcache.heads.judge import Judgement, differences
from featcache.heads.phrase_maps import centre_map, map_images
from featcache.heads.phrase_pictures import Pictures
from featcache.heads.prompt_reader import PromptReader, open_prompt_reader
from featcache.heads.prompts import Prompts, find_prompts
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.heads.segment_decoder import upsample
from featcache.heads.segment_masks import (
    MaskedImages,
    Masks,
    masked_images,
    pixel_size,
    refuse_without_grid,
)
from featcache.heads.segment_scores import (
    TITLES,
    Counts,
    Levels,
    MaskAnswer,
    MaskJudge,
    Operating,
    answer,
    choose_operating,
    count_pixels,
    empty_counts,
    join_counts,
)
from featcache.heads.segment_tokens import why_no_places
from featcache.heads.segment_train import count_constant, mean_mask
from featcache.heads.sentence_scores import untrained_adaptor
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace

SHOWN = ("dice", "dice_positive", "presence_auroc", "pointing", "dice_positive_own")
COLUMNS = tuple(Column(name, f"{TITLES[name]} %") for name in SHOWN)
NOTHING, PRIOR, CENTRE = "all empty", "mean training mask", "centre of the picture"
UNTRAINED, ABSENT, ADAPTOR = "untrained Adaptor", "Adaptor, absence", "Adaptor"
MINUS = {
    NOTHING: "Adaptor minus all empty",
    PRIOR: "Adaptor minus mean training mask",
    UNTRAINED: "Adaptor minus untrained",
}
"""Differences that the table shows; `results.json` has them all."""
Maps = Mapping[str, Sequence[Float32[np.ndarray, "N H W"]]]


class GroundConfig(Config):
    """How similarity maps are measured."""

    phrases: tuple[str, ...] = Field(
        (), description="What to look for; none: what the prompts of the data set say is there."
    )
    absent: tuple[str, ...] = Field(
        (), description="A control: phrases that deny it. Maps of both should differ."
    )
    size: PositiveInt = Field(224, description="Longer side of the masks, in pixels.")
    select_by: Literal["dice", "dice_positive", "pixel_dice"] = Field(
        "dice", description="Validation figure that chooses the thresholds."
    )
    untrained: PositiveInt = Field(3, description="Adaptors with random weights in their row.")
    save_maps: int = Field(
        0, ge=0, description="Test images to draw with their maps; changes no figure."
    )
    draws: int = Field(1000, ge=100, description="Bootstrap draws of the test patients.")
    batch_size: PositiveInt = Field(32, description="Images read at a time.")
    seed: int = Field(0, ge=0, description="Seed of the untrained Adaptors and the bootstrap.")


def ground(
    images: FeatureSet,
    manifest: Manifest,
    run: Path,
    texts: Path,
    out: Path,
    config: GroundConfig,
    *,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """Look for phrases in the test images, without training on any mask, and measure it.

    Rows: all empty, mean training mask (the one row that knows training masks), the centre of the
    picture, Adaptors with random weights, the Adaptor with phrases that deny the finding, the
    Adaptor, and its paired differences. Thresholds are chosen on `validate`; the masks of `test`
    are read once.

    Args:
        images: Features of the manifest's images, with a grid.
        manifest: Masks, splits and patients.
        run: Folder of the training run.
        texts: Folder of the text set that the run was trained on, which says how phrases are
            encoded and stored; its shards are not read.
        out: Gets `results.json`, `results.md`, `test_reads.json`, and `maps/` where pictures are
            asked for. A finished result of the same request is returned untouched.
        config: The phrases and the protocol's numbers.
        device: Where text encoder and Adaptor run.
        again: Allow another request to read the test split of this folder.

    Raises:
        CacheError: The set has no grid; nothing was read then.
        StaleFeatureSetError: The Adaptor was trained on other encoders.
        UsageError: There is no phrase, or the Adaptor knows no places.
        ManifestError: There are no masks, a split is empty, or a patient is in two splits.
        TrainingError: The test split was read before, and `again` is False.
    """
    refuse_without_grid(images.spec, images.folder)
    if not config.phrases or not all(one.strip() for one in (*config.phrases, *config.absent)):
        what = "a phrase is empty" if config.phrases else "no phrase was given"
        raise UsageError(what, where="--phrase", fix="--phrase 'lung opacity'")
    device = resolve_device(device)
    trained = load_adaptor(run, device=device)
    inputs.refuse_foreign(images, trained.image_fingerprint, run)
    reason = why_no_places(trained)
    if reason:
        raise UsageError(reason, where=run, fix="--set adaptor.objective=allpairs, and train")
    study = _Study(images, manifest, trained, masked_images(images, manifest), config, device)
    gate = protocol.open_gate(out, study.facts(), again=again)
    if isinstance(gate, Results) and not config.save_maps:
        return gate
    maps = study.maps(open_prompt_reader(texts, trained, device=device))
    results = gate if isinstance(gate, Results) else _measure(study, maps, gate, out)
    if config.save_maps:
        study.draw(maps[ADAPTOR][0], out / "maps")
    return results


@dataclass(frozen=True)
class _Study:
    """What is asked, with everything it is asked of."""

    images: FeatureSet
    manifest: Manifest
    trained: TrainedAdaptor
    masked: MaskedImages
    config: GroundConfig
    device: str

    @property
    def grid(self) -> tuple[int, int]:
        """Height, width in tokens."""
        return self.images.spec.grid or (1, 1)

    @property
    def numbers(self) -> Int64[np.ndarray, " N"]:
        """Images that maps are made of: those of validate, then those of test."""
        of = self.masked.labelled.of
        return np.concatenate([of("validate"), of("test")])

    def facts(self) -> dict[str, JsonValue]:
        """Everything that decides the result, without paths."""
        return {
            "head": "ground",
            "split": "test",
            **inputs.source_facts(self.manifest, self.trained, images=self.images),
            "text_features": self.trained.text_fingerprint,
            **self.masked.facts(),
            "config": {k: v for k, v in to_plain(self.config).items() if k != "save_maps"},
        }

    def maps(self, reader: PromptReader) -> Maps:
        """Similarity maps by method and run, on the grid, in one pass over the images."""
        config = self.config
        seeds = range(config.seed, config.seed + config.untrained)
        asked: list[tuple[str, TrainedAdaptor, tuple[str, ...]]] = [
            *(
                (UNTRAINED, untrained_adaptor(self.trained, seed, self.device), config.phrases)
                for seed in seeds
            ),
            (ADAPTOR, self.trained, config.phrases),
        ]
        if config.absent:
            asked.insert(-1, (ABSENT, self.trained, config.absent))
        sentences = sorted({*config.phrases, *config.absent})
        vectors = reader.vectors([adaptor for _, adaptor, _ in asked], sentences)
        texts = [
            vector[[sentences.index(phrase) for phrase in phrases]]
            for vector, (_, _, phrases) in zip(vectors, asked, strict=True)
        ]
        made = map_images(
            [adaptor for _, adaptor, _ in asked],
            texts,
            self.images,
            self.masked.labelled.rows[self.numbers],
            device=self.device,
            batch_size=config.batch_size,
        )
        found: dict[str, list[Float32[np.ndarray, "N H W"]]] = {}
        for (method, _, _), one in zip(asked, made, strict=True):
            found.setdefault(method, []).append(one)
        return found

    def draw(self, maps: Float32[np.ndarray, "N H W"], folder: Path) -> None:
        """Pictures of some test images with their maps."""
        size = pixel_size(self.grid, self.config.size)
        pictures = Pictures(self.manifest, self.masked, size)
        place = {number: at for at, number in enumerate(self.numbers.tolist())}
        chosen = pictures.choose(self.config.save_maps)
        pictures.save(folder, chosen, maps[[place[number] for number in chosen]])


def _measure(study: _Study, maps: Maps, gate: TestGate, out: Path) -> Results:
    """Choose thresholds on validate, then read the test masks, then write."""
    masked, config, manifest = study.masked, study.config, study.manifest
    labelled, size = masked.labelled, pixel_size(study.grid, config.size)
    maps = {CENTRE: [np.stack([centre_map(study.grid)] * len(study.numbers))], **maps}
    validate, test = labelled.of("validate"), labelled.of("test")
    known = masked.masks(validate, size)
    chosen = {
        method: [_choose(one[: len(validate)], known, validate, config) for one in runs]
        for method, runs in maps.items()
    }
    members = labelled.of("train")
    share = mean_mask(masked.masks(members, size), members)
    prior, _ = choose_operating(count_constant(share, known, validate), config.select_by)
    truth = gate.read({"masks": masked.masks(test, size)})["masks"]
    answers: dict[str, list[MaskAnswer]] = {
        NOTHING: [_nothing(truth, test)],
        PRIOR: [answer(count_constant(share, truth, test), prior)],
    }
    for method, runs in maps.items():
        pairs = zip(runs, chosen[method], strict=True)
        answers[method] = [
            answer(_count(one[len(validate) :], truth, test, levels), operating)
            for one, (levels, operating) in pairs
        ]
    judge = MaskJudge(
        subject_ids=[labelled.subject_ids[number] for number in test],
        positive=masked.positive[test],
        draws=config.draws,
        seed=config.seed,
    )
    judged = {way: judge.judge(runs) for way, runs in answers.items()}
    table = Table(
        title=f"Grounding: {manifest.name}, split test",
        columns=COLUMNS,
        rows=tuple(_rows(study, judged, judge)),
        notes=(
            *manifest.meta.notes,
            *_notes(study, size, judge),
            *inputs.adaptor_notes(study.trained, manifest),
            gate.note(),
        ),
        configurations=0,
    )
    record = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "mask_size": list(size),
        "left_out": dict(labelled.left_out),
        "differences": list(differences(judged, judge)),
    }
    return protocol.save_results(out, table, record)


def _choose(
    maps: Float32[np.ndarray, "n H W"],
    masks: Masks,
    numbers: Int64[np.ndarray, " n"],
    config: GroundConfig,
) -> tuple[Levels, Operating]:
    """Levels between the smallest and the largest similarity of validate, and the best of them."""
    low, high = float(maps.min()), float(maps.max())
    levels = Levels(low, max(high, low + 1e-6))
    return levels, choose_operating(_count(maps, masks, numbers, levels), config.select_by)[0]


def _count(
    maps: Float32[np.ndarray, "n H W"],
    masks: Masks,
    numbers: Int64[np.ndarray, " n"],
    levels: Levels,
    batch_size: int = 32,
) -> Counts:
    """Maps enlarged to the masks' size, held against them."""
    parts = []
    for start in range(0, len(numbers), batch_size):
        some = slice(start, start + batch_size)
        wanted: Bool[np.ndarray, "B H W"] = masks.of(numbers[some].tolist())
        values = upsample(torch.from_numpy(maps[some]), masks.size)
        parts.append(count_pixels(values, torch.from_numpy(wanted), levels))
    return join_counts(parts)


def _nothing(masks: Masks, numbers: Int64[np.ndarray, " n"]) -> MaskAnswer:
    """The empty mask for every image."""
    target = np.array([int(masks.of([number]).sum()) for number in numbers.tolist()])
    levels = Levels()
    none = Operating(levels.count, levels.count, levels.count)
    return answer(empty_counts(target, masks.size[0] * masks.size[1], levels), none)


def _rows(study: _Study, judged: Mapping[str, Judgement], judge: MaskJudge) -> Iterator[Row]:
    """The lines of the table."""
    remarks = {
        NOTHING: "sees no pixel; points anywhere",
        PRIOR: "knows training masks, sees no pixel; points where most of them lie",
        CENTRE: "sees no pixel; a disc whose size validate chose",
        UNTRAINED: f"random weights, the same phrases; {study.config.untrained} of them",
        ABSENT: "phrases that deny it; a control, as the map should follow the phrase",
    }
    gaps = {MINUS[way]: judge.difference(judged[ADAPTOR], judged[way]) for way in MINUS}
    remarks |= dict.fromkeys(gaps, "paired: same draws")
    name, setting = study.manifest.title, {"images": f"{len(judge.positive):,}"}
    for way, found in {**judged, **gaps}.items():
        yield Row(
            name, way, setting, dict(found.figures), dict(found.details), remarks.get(way, "")
        )


def _notes(study: _Study, size: tuple[int, int], judge: MaskJudge) -> Iterator[str]:
    """Sentences above the table."""
    config, masked, spec = study.config, study.masked, study.images.spec
    yield (
        f"No mask was trained on. Map: mean cosine of the adapted patch tokens of `{spec.title}` "
        f"({spec.fingerprint[:12]}) with {len(config.phrases)} phrase(s), enlarged from "
        f"{study.grid[0]} x {study.grid[1]} to {size[0]} x {size[1]} pixels. The masks of validate "
        f"chose two thresholds a row, by {TITLES[config.select_by]}: for pixels, and for the "
        "highest value below which an image gets the empty mask."
    )
    yield (
        "Dice, all: empty on empty = 1; read it beside the row `all empty`. Pointing game: images "
        "with a mask whose highest pixel lies inside. Presence AUROC: an image's highest value. "
        "Positive, own t: Dice, positive at the threshold that is best for it on validate."
    )
    yield (
        f"[95 % interval]: {config.draws:,} draws of the test patients. The spread of "
        f"`{UNTRAINED}` is over its random weights."
    )
    for reason, count in masked.labelled.left_out.items():
        yield f"Left out: {count:,} images {reason}."
    yield f"Split test: {len(judge.positive):,} images, {int(judge.positive.sum()):,} with a mask."


def ground_workspace(
    workspace: Workspace,
    config: GroundConfig,
    *,
    run: str | None = None,
    prompts: str | None = None,
    backbone: str | None = None,
    manifest: str | None = None,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """`ground` on what a workspace holds.

    Args:
        workspace: Where names are looked up, and where the result is written.
        config: The phrases and the protocol's numbers.
        run: Name or folder of a run; None is the current one.
        prompts: Name or file of prompts, used where the config names no phrase; None: those of the
            manifest's data set.
        backbone: Name or folder of an image set; None is the one the run's Adaptor reads.
        manifest: Name or folder of a manifest; None is the current one.
        device: `auto`, `cpu` or `cuda`.
        again: Allow another request to read the test split of the output folder.

    Raises:
        UsageError: No phrase is known, or the prompts are about several findings.
    """
    folder = workspace.run(run)
    found = inputs.look_up(workspace, folder, backbone=backbone, manifest=manifest, needs_grid=True)
    images, table, name = found.images, found.manifest, "phrase"
    if not config.phrases:
        name, sentences = find_prompts(prompts, table)
        config = _with_phrases(config, sentences, name)
    texts = run_features(workspace, str(folder), "text")
    # Other phrases are another request to the same folder: else they could be chosen on test.
    out = found.results / "ground" / f"{table.name}-{images.folder.name}"
    found.announce("ground", f", phrases of `{name}`")
    return ground(images, table, folder, texts, out, config, device=device, again=again)


def _with_phrases(config: GroundConfig, prompts: Prompts, name: str) -> GroundConfig:
    """Phrases of presence, and of absence unless they were asked for, of a single finding."""
    if len(prompts.findings) != 1:
        raise UsageError(
            f"the prompts `{name}` are not about one finding, so it is not clear what to look for",
            where="--prompts",
            fix="--phrase 'lung opacity', or prompts with a single entry under `findings`",
        )
    [finding] = prompts.findings.values()
    absent = config.absent or finding.absent
    return config.model_copy(update={"phrases": finding.present, "absent": absent})
