"""Decoders of every method on every subset: trained, chosen on validate, kept, and applied."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from featcache.adaptor.saved import TrainedAdaptor
from featcache.cache.format import hash_keys
from featcache.cache.reader import FeatureSet
from featcache.config import canonical_json, replace_file, to_plain
from featcache.console import task
from featcache.errors import FeatcacheError
from featcache.heads import inputs
from featcache.heads.labels import Subset, training_subsets
from featcache.heads.segment_decoder import Decoder, build_decoder
from featcache.heads.segment_masks import MaskedImages, Masks, pixel_size
from featcache.heads.segment_scores import (
    Counts,
    Levels,
    MaskAnswer,
    Operating,
    answer,
    choose_operating,
    empty_counts,
)
from featcache.heads.segment_tokens import CachedGrid, GridTokens, adapted_grid, random_grid
from featcache.heads.segment_train import (
    SegmentConfig,
    count_constant,
    count_masks,
    learning_rates,
    mean_mask,
    train_decoders,
)
from featcache.heads.table import DIGITS
from featcache.manifest.table import Manifest

NOTHING, PRIOR, RANDOM = "all empty", "mean training mask", "random encoder"
RAW, ADAPTOR = "raw backbone", "Adaptor"


@dataclass(frozen=True)
class Fit:
    """The decoders of one method on one subset, after validation has chosen.

    Attributes:
        decoders: One per seed.
        operating: Levels of each.
        facts: For `results.json`.
    """

    decoders: Sequence[Decoder]
    operating: Sequence[Operating]
    facts: dict[str, JsonValue]


@dataclass(frozen=True)
class Known:
    """Masks of train, at the size that trains, and of validate, at the size that counts."""

    train: Masks
    validate: Masks


@dataclass(frozen=True)
class Study:
    """What is asked, with everything it is asked of.

    Attributes:
        images: Features of the images.
        manifest: Their masks, splits, patients.
        trained: The Adaptor, None without one.
        masked: Manifest and features, joined.
        config: The protocol's numbers.
        device: Where everything runs.
        out: Folder of the result.
        size: Height, width of the masks that count.
        loss_size: Of the masks that train.
    """

    images: FeatureSet
    manifest: Manifest
    trained: TrainedAdaptor | None
    masked: MaskedImages
    config: SegmentConfig
    device: str
    out: Path
    size: tuple[int, int] = field(init=False)
    loss_size: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        grid = self.images.spec.grid or (1, 1)
        scale = self.config.loss_scale
        object.__setattr__(self, "size", pixel_size(grid, self.config.size))
        object.__setattr__(self, "loss_size", (grid[0] * scale, grid[1] * scale))

    def facts(self) -> dict[str, JsonValue]:
        """Everything that decides the result, without paths."""
        return {
            "head": "segment",
            "split": "test",
            **inputs.source_facts(self.manifest, self.trained, images=self.images),
            **self.masked.facts(),
            "config": to_plain(self.config),
        }

    def of(self, split: str) -> Int64[np.ndarray, " n"]:
        """Numbers of the images of one split."""
        return self.masked.labelled.of(split)

    def subsets(self) -> list[Subset]:
        """The training subsets, shares ascending."""
        config, labelled = self.config, self.masked.labelled
        return [
            subset
            for percent in sorted(set(config.fractions))
            for subset in training_subsets(
                labelled, percent, count=config.subsets, seed=config.seed
            )
        ]

    def known(self) -> Known:
        """The masks that may be looked at before everything is chosen."""
        return Known(
            self.masked.masks(self.of("train"), self.loss_size),
            self.masked.masks(self.of("validate"), self.size),
        )

    def tokens(self) -> dict[str, GridTokens | str]:
        """Grids of all annotated images by method, or the reason why there are none."""
        labelled, folder = self.masked.labelled, self.out / "tokens"
        found: dict[str, GridTokens | str] = {RANDOM: self._random(folder)}
        found[RAW] = CachedGrid(self.images, labelled.rows)
        if self.trained is not None:
            found[ADAPTOR] = adapted_grid(
                self.images, labelled.rows, self.trained, folder, device=self.device
            )
        return found

    def _random(self, folder: Path) -> GridTokens | str:
        """Grids of the random encoder, or why there are none."""
        if not self.config.random_encoder:
            return "switched off by random_encoder=false"
        keys, seed = self.masked.labelled.keys, self.config.seed
        try:
            return random_grid(
                self.images, self.manifest, keys, folder, seed=seed, device=self.device
            )
        except FeatcacheError as error:
            return f"not computed: {error.what.partition(';')[0]}"


def fit_all(
    study: Study,
    subsets: Sequence[Subset],
    tokens: Mapping[str, GridTokens | str],
    known: Known,
    request: str,
) -> dict[str, list[Fit]]:
    """Decoders of every method on every subset; those that an earlier call finished are kept."""
    methods = [(method, grids) for method, grids in tokens.items() if not isinstance(grids, str)]
    fits: dict[str, list[Fit]] = {method: [] for method, _ in methods}
    with task("train decoders", len(methods) * len(subsets), "subsets") as progress:
        for method, grids in methods:
            for subset in subsets:
                name = f"{method.split()[0].lower()}-{subset.percent:g}-{subset.number}"
                path = study.out / "decoders" / f"{name}.safetensors"
                made_of = _made_of(study, method, subset, request)
                fit = _read_fit(path, made_of, study.config, grids.dim)
                if fit is None:
                    fit = fit_subset(study, subset, grids, known)
                    _write_fit(path, made_of, fit)
                fits[method].append(fit)
                progress.update(sum(len(some) for some in fits.values()), note=method)
    return fits


def fit_subset(study: Study, subset: Subset, tokens: GridTokens, known: Known) -> Fit:
    """Train decoders on a subset; validation chooses a learning rate, and levels for each seed."""
    config, numbers = study.config, study.of("validate")
    rates = learning_rates(config)
    trained: list[list[Decoder]] = []
    chosen: list[list[tuple[Operating, float]]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        decoders = train_decoders(
            tokens, known.train, subset.members, config, seed=seed, device=study.device
        )
        counts = count_masks(tokens, known.validate, numbers, decoders, device=study.device)
        trained.append(decoders)
        chosen.append([choose_operating(one, config.select_by) for one in counts])
    figures = np.array([[figure for _, figure in some] for some in chosen])  # seeds rates
    best = int(np.round(figures.mean(axis=0), DIGITS).argmax())
    facts: dict[str, JsonValue] = {
        "learning_rate": rates[best],
        "validation": np.round(figures[:, best], DIGITS).tolist(),
        "validation_by_rate": np.round(figures.mean(axis=0), DIGITS).tolist(),
    }
    return Fit([some[best] for some in trained], [some[best][0] for some in chosen], facts)


def _made_of(study: Study, method: str, subset: Subset, request: str) -> dict[str, str]:
    """All that decides what decoders are; another value of any makes them anew."""
    keys, trained = study.masked.labelled.keys, study.trained
    weights = trained.facts.weights_sha256 if method == ADAPTOR and trained is not None else ""
    return {
        "request": request,
        "features": f"{method} {study.images.fingerprint} {weights}".strip(),
        "subset": hash_keys([keys[number] for number in subset.members.tolist()]),
        "settings": canonical_json(to_plain(study.config)),
        "masks": f"{study.manifest.meta.hash} {study.masked.files or ''}".strip(),
    }


def _write_fit(path: Path, made_of: Mapping[str, str], fit: Fit) -> None:
    """Keep the chosen decoders with their levels; complete or not there."""
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, decoder in enumerate(fit.decoders)
        for name, tensor in decoder.state_dict().items()
    }
    facts = {"facts": fit.facts, "operating": [vars(one) for one in fit.operating]}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors, {**made_of, "fit": json.dumps(facts, sort_keys=True)})
    replace_file(path, content)


def _read_fit(
    path: Path, made_of: Mapping[str, str], config: SegmentConfig, dim: int
) -> Fit | None:
    """Decoders that an earlier call made of the very same; None when there are none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    if "fit" not in metadata or any(metadata.get(k) != v for k, v in made_of.items()):
        return None
    kept = json.loads(metadata["fit"])
    decoders = []
    for number in range(len(kept["operating"])):
        decoder = build_decoder(config.decoder, dim, 0)
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{number}.")}
        decoder.load_state_dict(own)
        decoders.append(decoder.eval().requires_grad_(False))
    return Fit(decoders, [Operating(**one) for one in kept["operating"]], kept["facts"])


@dataclass(frozen=True)
class Prior:
    """The mean training mask of a subset, with the levels that validate chose.

    Attributes:
        share: How often each pixel is inside.
        operating: Where that counts as a mask.
    """

    share: Float32[np.ndarray, "h w"]
    operating: Operating


def fit_prior(study: Study, subset: Subset, known: Known) -> Prior:
    """The mask that is best where no picture is looked at."""
    share = mean_mask(known.train, subset.members)
    counts = count_constant(share, known.validate, study.of("validate"))
    return Prior(share, choose_operating(counts, study.config.select_by)[0])


def answer_all(
    study: Study,
    tokens: Mapping[str, GridTokens | str],
    fits: Mapping[str, Sequence[Fit]],
    priors: Sequence[Prior],
    test: Masks,
) -> dict[str, list[list[MaskAnswer]]]:
    """Test masks by method, subset and seed; one pass over the test images a method."""
    numbers = study.of("test")
    target = np.array([int(test.of([number]).sum()) for number in numbers.tolist()])
    nothing = empty_counts(target, study.size[0] * study.size[1], Levels())
    unreached = Operating(Levels().count, Levels().count, Levels().count)
    found = {
        NOTHING: [[answer(nothing, unreached)] for _ in priors],
        PRIOR: [
            [answer(count_constant(one.share, test, numbers), one.operating)] for one in priors
        ],
    }
    for method, some in fits.items():
        grids = tokens[method]
        if isinstance(grids, str):
            continue
        decoders = [decoder.to(study.device) for fit in some for decoder in fit.decoders]
        counts: list[Counts] = count_masks(grids, test, numbers, decoders, device=study.device)
        levels = [one for fit in some for one in fit.operating]
        runs = [answer(one, own) for one, own in zip(counts, levels, strict=True)]
        each = len(some[0].decoders)
        found[method] = [runs[at : at + each] for at in range(0, len(runs), each)]
    return found
