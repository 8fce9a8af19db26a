"""Retrieval on held-out patients: the text of an image among all texts, the image of a text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field, JsonValue, PositiveFloat, PositiveInt

from featcache import __version__
from featcache.adaptor.saved import TrainedAdaptor, load_adaptor
from featcache.cache.reader import Cache, FeatureSet, open_cache
from featcache.config import Config, to_plain
from featcache.console import task
from featcache.device import resolve_device
from featcache.errors import FeatcacheError
from featcache.heads import inputs, protocol, vectors
from featcache.heads.judge import Judgement, differences
from featcache.heads.protocol import Column, Results, Row, Table, TestGate
from featcache.heads.ranking import Candidates, RankJudge, ranks_both_ways
from featcache.heads.ridge import LinearMap, fit_linear_map
from featcache.loader.gather import iterate_rows
from featcache.manifest.table import Manifest
from featcache.workspace import Workspace

COLUMNS = (
    *(Column(f"recall_at_{k}", f"R@{k} %") for k in (1, 5, 10)),
    Column("median_rank", "median rank", percent=False),
    Column("mrr", "MRR %"),
)
DIRECTIONS = ("image to text", "text to image")
CHANCE, RIDGE, ADAPTOR = "chance (exact)", "linear map (ridge) on raw features", "Adaptor"
DIFFERENCES = {RIDGE: "Adaptor minus linear map", CHANCE: "Adaptor minus chance"}
TEXTS_AT_ONCE = 4096

Ranks = tuple[Int64[np.ndarray, " I"], Int64[np.ndarray, " J"]]


class RetrieveConfig(Config):
    """How retrieval is measured."""

    split: Literal["test", "validate"] = Field("test", description="Where the candidates are from.")
    linear_map: bool = Field(True, description="Whether to fit the linear map's row.")
    penalties: tuple[PositiveFloat, ...] = Field(
        (0.1, 1.0, 10.0, 100.0, 1e3, 1e4),
        min_length=1,
        description="Ridge penalties of the linear map; validate chooses one by MRR.",
    )
    draws: int = Field(1000, ge=100, description="Bootstrap draws of the patients who ask.")
    batch_size: PositiveInt = Field(32, description="Images scored at a time.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")


def candidates_of(cache: Cache, manifest: Manifest) -> Candidates:
    """Every image and every text of a cache's pairs, once."""
    image_rows, image_of = np.unique(cache.image_rows, return_inverse=True)
    text_rows, first, text_of = np.unique(cache.text_rows, return_index=True, return_inverse=True)
    subject_of = dict(
        zip(manifest.keys, manifest.images.column("subject_id").to_pylist(), strict=True)
    )
    subjects = [subject_of[cache.images.keys[row]] for row in image_rows]
    askers = [subjects[number] for number in image_of[first]]
    return Candidates(image_rows, text_rows, image_of, text_of, subjects, askers)


@torch.inference_mode()
def adaptor_scores(
    trained: TrainedAdaptor,
    cache: Cache,
    candidates: Candidates,
    *,
    device: str,
    batch_size: int,
) -> Iterator[Float32[np.ndarray, "_ J"]]:
    """Scores of blocks of images with all texts, no image knowing which text is its own.

    Args:
        trained: Adaptor and objective.
        cache: Where the tokens are.
        candidates: Images and texts.
        device: Where the Adaptor runs.
        batch_size: Images per block.
    """
    adaptor, objective, reading = trained.adaptor, trained.objective, trained.reading
    encoded = []
    for _, tokens, valid in iterate_rows(cache.texts, candidates.text_rows, batch_size, **reading):
        real = torch.ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid
        moved = tokens.to(device, torch.float32)
        encoded.append(objective.encode_texts(adaptor, moved, real.to(device)))
    texts, done = torch.cat(encoded), 0
    with task("score all pairs", len(candidates.image_rows)) as progress:
        blocks = iterate_rows(cache.images, candidates.image_rows, batch_size, **reading)
        for rows, tokens, _ in blocks:
            images = objective.encode_images(adaptor, tokens.to(device, torch.float32))
            parts = [
                objective.score(images, some, adaptor.scale).float().cpu()
                for some in torch.split(texts, TEXTS_AT_ONCE)
            ]
            yield torch.cat(parts, dim=1).numpy()
            done += len(rows)
            progress.update(done)


def retrieve(
    images: FeatureSet,
    texts: FeatureSet,
    manifest: Manifest,
    run: Path,
    out: Path,
    config: RetrieveConfig,
    *,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """Rank all texts for each image, and all images for each text, on held-out patients.

    Candidates are every image and every text of the split, once. All texts of an image are right
    for it, as is any text that equals one of them. Rows: chance, computed exactly; a linear map
    between the raw features, fitted on the training pairs; the Adaptor; its paired differences to
    both. The rules in words: docs/protocol.md.

    Args:
        images: Features of the manifest's images.
        texts: Features of its texts.
        manifest: Pairs, splits and patients.
        run: Folder of the training run.
        out: Gets `results.json`, `results.md` and `test_reads.json`. A finished result of the same
            request is returned untouched.
        config: The protocol's numbers.
        device: Where the Adaptor runs.
        again: Allow another request to read the test split of this folder.

    Raises:
        StaleFeatureSetError: The Adaptor was trained on other encoders' features.
        CacheError: The split has no pair.
        TrainingError: The test split was read before, and `again` is False.
    """
    device = resolve_device(device)
    trained = load_adaptor(run, device=device)
    inputs.refuse_foreign(images, trained.image_fingerprint, run)
    inputs.refuse_foreign(texts, trained.text_fingerprint, run)
    cache = open_cache(images, texts, manifest, split=config.split)
    study = _Study(cache, candidates_of(cache, manifest), manifest, trained, config, device)
    gate = protocol.open_gate(out, study.facts(), again=again, reads_test=config.split == "test")
    if isinstance(gate, Results):
        return gate
    return _measure(study, gate, out)


def _measure(study: "_Study", gate: TestGate, out: Path) -> Results:
    """Fit and choose the linear map, then rank, then write."""
    config, manifest = study.config, study.manifest
    linear = study.linear_map() if config.linear_map else "switched off by linear_map=false"
    gate_notes = []
    if config.split == "test":
        gate.read({})
        gate_notes.append(gate.note())
    found: dict[str, Ranks | str] = {
        RIDGE: linear if isinstance(linear, str) else study.linear_ranks(linear),
        ADAPTOR: study.adaptor_ranks(),
    }
    judged = [study.judged(way, found) for way in range(2)]
    rows = [row for way in range(2) for row in study.rows(way, found, judged[way], linear)]
    table = Table(
        title=f"Retrieval: {manifest.name}, split {config.split}",
        columns=COLUMNS,
        rows=tuple(rows),
        notes=(
            *manifest.meta.notes,
            *study.notes(),
            *inputs.adaptor_notes(study.trained, manifest),
            *gate_notes,
        ),
        configurations=0 if isinstance(linear, str) else len(config.penalties),
    )
    record = {
        **study.facts(),
        "request": gate.request,
        "featcache": __version__,
        "differences": [
            {"direction": DIRECTIONS[way], **one}
            for way, some in enumerate(judged)
            for one in differences(some, study.judge(way))
        ],
    }
    return protocol.save_results(out, table, record)


@dataclass(frozen=True)
class _Fitted:
    """A linear map, with how its penalty was chosen."""

    map: LinearMap
    penalty: int
    remark: str


@dataclass(frozen=True)
class _Study:
    """What is asked, with everything it is asked of."""

    cache: Cache
    candidates: Candidates
    manifest: Manifest
    trained: TrainedAdaptor
    config: RetrieveConfig
    device: str

    def facts(self) -> dict[str, JsonValue]:
        """Everything that decides the result, without paths."""
        return {
            "head": "retrieve",
            "split": self.config.split,
            **inputs.source_facts(
                self.manifest, self.trained, images=self.cache.images, texts=self.cache.texts
            ),
            "config": to_plain(self.config),
        }

    def adaptor_ranks(self) -> Ranks:
        """Ranks by the Adaptor's objective."""

        def score() -> Iterator[Float32[np.ndarray, "_ J"]]:
            return adaptor_scores(
                self.trained,
                self.cache,
                self.candidates,
                device=self.device,
                batch_size=self.config.batch_size,
            )

        return ranks_both_ways(score, self.candidates)

    def _means(
        self, candidates: Candidates
    ) -> tuple[Float32[np.ndarray, "I D"], Float32[np.ndarray, "J E"]]:
        """Mean tokens of images and texts."""
        size = self.config.batch_size
        return (
            vectors.mean_vectors(self.cache.images, candidates.image_rows, batch_size=size),
            vectors.mean_vectors(self.cache.texts, candidates.text_rows, batch_size=size),
        )

    def linear_map(self) -> _Fitted | str:
        """The map fitted on train and chosen on validate, or why there is none."""
        images, texts = self.cache.images, self.cache.texts
        try:
            train = candidates_of(
                open_cache(images, texts, self.manifest, split="train"), self.manifest
            )
            fitted = fit_linear_map(
                *self._means(train), train.image_of, train.text_of, self.config.penalties
            )
        except FeatcacheError as error:
            return f"not computed: {error.what}"
        try:
            validate = candidates_of(
                open_cache(images, texts, self.manifest, split="validate"), self.manifest
            )
        except FeatcacheError as error:
            middle = len(self.config.penalties) // 2
            return _Fitted(fitted, middle, f"penalty not chosen: {error.what}")
        means = self._means(validate)
        reciprocal = []
        for penalty in range(len(self.config.penalties)):
            ranks = ranks_both_ways(partial(fitted.scores, *means, penalty), validate)
            reciprocal.append(np.mean([np.mean(1.0 / one) for one in ranks]))
        best = int(np.argmax(np.round(reciprocal, 9)))
        return _Fitted(fitted, best, f"penalty {self.config.penalties[best]:g} chosen on validate")

    def linear_ranks(self, fitted: _Fitted) -> Ranks:
        """Ranks by the linear map."""
        means = self._means(self.candidates)
        return ranks_both_ways(partial(fitted.map.scores, *means, fitted.penalty), self.candidates)

    def judge(self, way: int) -> RankJudge:
        """The rule for one direction: who asks there."""
        askers = (self.candidates.image_subjects, self.candidates.text_subjects)[way]
        return RankJudge(askers, self.config.draws, self.config.seed)

    def judged(self, way: int, found: Mapping[str, Ranks | str]) -> dict[str, Judgement]:
        """Figures of one direction by method, chance first."""
        judge, candidates = self.judge(way), self.candidates
        right = np.bincount((candidates.image_of, candidates.text_of)[way])
        judged = {CHANCE: judge.chance(right, self.sizes[1 - way])}
        for method, ranks in found.items():
            if not isinstance(ranks, str):
                judged[method] = judge.judge(ranks[way])
        return judged

    @property
    def sizes(self) -> tuple[int, int]:
        """How many images and texts there are."""
        return len(self.candidates.image_rows), len(self.candidates.text_rows)

    def rows(
        self,
        way: int,
        found: Mapping[str, Ranks | str],
        judged: Mapping[str, Judgement],
        linear: _Fitted | str,
    ) -> Iterator[Row]:
        """The lines of one direction."""
        setting = {
            "direction": DIRECTIONS[way],
            "queries": f"{self.sizes[way]:,}",
            "candidates": f"{self.sizes[1 - way]:,}",
        }
        name = self.manifest.title
        remarks = {CHANCE: "expected value of a random order"}
        if isinstance(linear, _Fitted):
            remarks[RIDGE] = linear.remark
        for method in (CHANCE, *found):
            figures = dict(judged[method].figures) if method in judged else {}
            reason = found.get(method)
            remark = reason if isinstance(reason, str) else remarks.get(method, "")
            yield Row(name, method, setting, figures, remark=remark)
        judge = self.judge(way)
        for other, title in DIFFERENCES.items():
            if other in judged:
                gap = judge.difference(judged[ADAPTOR], judged[other])
                yield Row(name, title, setting, dict(gap.figures), remark="paired: same draws")

    def notes(self) -> Iterator[str]:
        """Sentences above the table."""
        candidates, cache = self.candidates, self.cache
        patients = len(set(candidates.image_subjects))
        shared = int((np.bincount(candidates.text_of) > 1).sum())
        several = int((np.bincount(candidates.image_of) > 1).sum())
        yield (
            f"Candidates: all {len(candidates.image_rows):,} images and "
            f"{len(candidates.text_rows):,} different texts of split {self.config.split}, "
            f"{patients:,} patients. {shared:,} texts belong to several images, {several:,} images "
            "have several texts: each of them counts as right."
        )
        yield (
            "Ranks count wrong candidates only; whatever ties with the right one stands before it. "
            "Scored without knowing pairs."
        )
        yield (
            f"[95 % interval]: {self.config.draws:,} draws of the patients whose images or texts "
            "ask; the candidates stay. A text that patients share asks for the first of them."
        )
        yield (
            f"Features: `{cache.images.spec.title}` ({cache.images.fingerprint[:12]}) and "
            f"`{cache.texts.spec.title}` ({cache.texts.fingerprint[:12]}). Raw vectors of both "
            "sides differ in width or meaning and cannot be compared as they are: a linear map "
            "between their mean tokens, fitted on the training pairs, stands in their place."
        )
        for reason, count in sorted(cache.dropped.items()):
            if reason != "in another split":
                yield f"Left out: {count:,} pairs of this split, {reason}."


def retrieve_workspace(
    workspace: Workspace,
    config: RetrieveConfig,
    *,
    run: str | None = None,
    manifest: str | None = None,
    device: str = "auto",
    again: bool = False,
) -> Results:
    """`retrieve` on what a workspace holds.

    Args:
        workspace: Where names are looked up, and where the result is written.
        config: The protocol's numbers.
        run: Name or folder of a run; None is the current one.
        manifest: Name or folder of a manifest; None is the current one.
        device: `auto`, `cpu` or `cuda`.
        again: Allow another request to read the test split of the output folder.
    """
    folder = workspace.run(run)
    found = inputs.look_up(workspace, folder, manifest=manifest)
    images, table = found.images, found.manifest
    reads = found.trained.text_fingerprint if found.trained is not None else None
    texts = FeatureSet.open(inputs.feature_folder(workspace, "text", None, reads, folder))
    out = found.results / "retrieve" / f"{table.name}-{config.split}"
    found.announce("retrieve", f", {texts.spec.title}")
    return retrieve(images, texts, table, folder, out, config, device=device, again=again)
