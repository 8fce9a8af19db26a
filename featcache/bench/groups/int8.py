"""What int8 saves, and what it changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pydantic import JsonValue

from featcache.bench.case import Bench, Measured, Setting
from featcache.bench.material import sample_rows, write_sample
from featcache.bench.timing import without_notes
from featcache.cache.feature_set import FeatureSet
from featcache.cache.folder import read_quality
from featcache.extract.command import extract
from featcache.extract.config import ExtractConfig
from featcache.heads.answers import Answers, ProbeGrid, probe_answers
from featcache.heads.classify import ProbeConfig
from featcache.heads.labels import LabelledImages, labelled_images, training_subsets
from featcache.heads.protocol import interval_of, patient_bootstrap
from featcache.heads.vectors import mean_vectors
from featcache.manifest.table import open_manifest
from featcache.workspace import Workspace

ENCODER = "lite0-demo"
TYPES: tuple[Literal["float16"], Literal["int8"]] = ("float16", "int8")


def _make_sets(setting: Setting, rows: Sequence[dict[str, str]]) -> list[Workspace]:
    """The same pictures, by the same encoder, stored in both types."""
    made = []
    for dtype in TYPES:
        setting.say(f"extracting {len(rows):,} radiographs as {dtype}")
        workspace = Workspace(setting.folder / dtype)
        write_sample(workspace, "sample", rows)
        config = ExtractConfig(dtype=dtype, device=setting.device, max_failures=0)
        with without_notes():
            extract(
                workspace,
                config,
                backbones=[ENCODER],
                text_encoders=["none"],
                manifest="sample",
            )
        made.append(workspace)
    return made


def _some_rows(most: int) -> list[dict[str, str]]:
    """The sample, or a few rows of every split."""
    rows = sample_rows()
    splits = dict.fromkeys(row["split"] for row in rows)
    parts = [[row for row in rows if row["split"] == split][:most] for split in splits]
    return [row for part in parts for row in part]


def _folder(workspace: Workspace) -> Path:
    return workspace.features / "image" / ENCODER


def _token_bytes(features: FeatureSet) -> int:
    """Bytes of a set's tokens and of the scales that belong to them."""
    return sum(
        shard.header.places[name].size_bytes
        for shard in features.shards
        for name in ("tokens", "scale_token", "scale_channel")
        if name in shard.header.places
    )


def int8_bytes(setting: Setting) -> Measured:
    """Bytes of the int8 set's tokens and scales over those of the float16 set's tokens."""
    workspaces = _make_sets(setting, _some_rows(setting.choose(100, 16)))
    sets = [FeatureSet.open(_folder(one)) for one in workspaces]
    plain, small = (_token_bytes(one) for one in sets)
    files = [sum(shard.header.file_size for shard in one.shards) for one in sets]
    return Measured(
        [small / plain],
        detail={
            "encoder": ENCODER,
            "rows": sets[1].num_rows,
            "tokens_per_row": sets[1].spec.num_tokens,
            "token_bytes": {"float16": plain, "int8": small},
            "file_bytes": dict(zip(TYPES, files, strict=True)),
            "whole_files": round(files[1] / files[0], 4),
            "int8": read_quality(_folder(workspaces[1])).get("int8"),
        },
    )


@dataclass(frozen=True)
class _Probes:
    """Probes on one feature set, by share of the labels in percent.

    Attributes:
        named: The class that each of R probes names for each of n test pictures.
        decays: The weight decay of each.
    """

    named: dict[float, Int64[np.ndarray, "R n"]]
    decays: dict[float, list[float]]


def _train(
    features: FeatureSet,
    labelled: LabelledImages,
    config: ProbeConfig,
    fixed: dict[float, list[float]] | None = None,
) -> _Probes:
    """Train the protocol's probes.

    Args:
        features: What they read.
        labelled: Pictures with their classes.
        config: The protocol.
        fixed: The weight decay of every probe; None: validation chooses.
    """
    vectors = mean_vectors(features, labelled.rows)
    seeds = [config.seed + number for number in range(config.seeds)]
    named, decays = {}, {}
    for percent in config.fractions:
        subsets = training_subsets(labelled, percent, count=config.subsets, seed=config.seed)
        parts = [
            probe_answers(
                labelled,
                [subset.members],
                {"mean": vectors},
                ProbeGrid(
                    config.weight_decays
                    if fixed is None
                    else [fixed[percent][number * len(seeds)]],
                    seeds,
                    config.select_by,
                    config.tolerance,
                    config.max_steps,
                ),
            )
            for number, subset in enumerate(subsets)
        ]
        named[percent] = np.concatenate([one.probabilities.argmax(axis=2) for one in parts])
        decays[percent] = [decay for one in parts for decay in _chosen(one)]
    return _Probes(named, decays)


def _chosen(answers: Answers) -> list[float]:
    """The weight decays of a method's runs."""
    return list(cast(list[float], answers.details["weight_decays"]))


def _interval(changed: Bool[np.ndarray, "R n"], subject_ids: Sequence[str]) -> JsonValue:
    """The patient-bootstrap 95 % interval of the share that changed, in percent."""
    share = changed.mean(axis=0)

    def metric(weights: Float64[np.ndarray, "W N"]) -> Float64[np.ndarray, "W M"]:
        return 100 * (weights @ share / weights.sum(axis=1))[:, None]  # type: ignore[no-any-return]

    found = interval_of(patient_bootstrap(metric, subject_ids)[:, 0])
    return None if found is None else [round(found.low, 3), round(found.high, 3)]


def _changed(one: _Probes, other: _Probes) -> dict[float, Bool[np.ndarray, "R n"]]:
    """Where two sets of probes name different classes."""
    return {percent: one.named[percent] != other.named[percent] for percent in one.named}


def _shares(changed: dict[float, Bool[np.ndarray, "R n"]], patients: Sequence[str]) -> JsonValue:
    """What changed, in percent, for all probes and for each share of the labels."""
    parts = {"all": np.concatenate(list(changed.values()))}
    parts |= {f"{percent:g} % of the labels": one for percent, one in changed.items()}
    return {
        name: {
            "probes": len(one),
            "changed_percent": round(100 * float(one.mean()), 4),
            "interval_95": _interval(one, patients),
        }
        for name, one in parts.items()
    }


def int8_probe_flips(setting: Setting) -> Measured:
    """Share of test predictions that change when the same probes are trained and tested on int8."""
    workspaces = _make_sets(setting, _some_rows(setting.choose(10_000, 40)))
    plain_set, small_set = (FeatureSet.open(_folder(one)) for one in workspaces)
    config = ProbeConfig()
    manifest = open_manifest(workspaces[0].manifest("sample"))
    labelled = labelled_images(plain_set, manifest, config.label)
    setting.say("training probes on both")
    plain = _train(plain_set, labelled, config)
    small = _train(small_set, labelled, config, plain.decays)
    free = _train(small_set, labelled, config)
    test = labelled.of("test")
    patients = [labelled.subject_ids[number] for number in test]
    changed = _changed(plain, small)
    right = {"float16": plain, "int8": small, "int8_own_choice": free}
    return Measured(
        [100 * float(one.mean()) for one in changed.values()],
        value=100 * float(np.concatenate(list(changed.values())).mean()),
        detail={
            "encoder": ENCODER,
            "test_images": len(patients),
            "same_weight_decay": _shares(changed, patients),
            "own_choice_of_weight_decay": _shares(_changed(plain, free), patients),
            "weight_decays": {
                "float16": {f"{percent:g}": list(d) for percent, d in plain.decays.items()},
                "int8_own_choice": {f"{percent:g}": list(d) for percent, d in free.decays.items()},
            },
            "accuracy_percent": {
                name: {
                    f"{percent:g}": round(100 * float((one == labelled.targets[test]).mean()), 3)
                    for percent, one in probes.named.items()
                }
                for name, probes in right.items()
            },
            "int8": read_quality(_folder(workspaces[1])).get("int8"),
        },
    )


BENCHES = (
    Bench(
        name="int8_bytes",
        goal=0.51,
        better="smaller",
        unit="x",
        what="bytes of int8 tokens and scales over those of float16 tokens, embedded sample",
        measure=int8_bytes,
        repeats=1,
        disk_mb=60,
    ),
    Bench(
        name="int8_probe_flips",
        goal=1.0,
        better="smaller",
        unit="%",
        what="test predictions that change when the same probes read int8, embedded sample",
        measure=int8_probe_flips,
        repeats=1,
        disk_mb=300,
    ),
)
