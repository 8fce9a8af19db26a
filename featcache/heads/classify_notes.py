"""Sentences above a table of probes: what they read, by which rules, and what is missing."""

from collections.abc import Iterator, Sequence

from featcache.cache.format import FeatureSetSpec
from featcache.heads import scores
from featcache.heads.classify_config import ProbeConfig
from featcache.heads.findings import count_unsettled
from featcache.heads.judge import Judge
from featcache.heads.labels import LabelledImages, LabelPolicy, Subset
from featcache.heads.vectors import pooling_rule, possible_poolings
from featcache.manifest.table import Manifest

HEADS = {"linear": "Linear probes", "mlp": "MLP heads", "attention": "Attention heads"}


def about_inputs(
    spec: FeatureSetSpec, labelled: LabelledImages, config: ProbeConfig
) -> Iterator[str]:
    """What the heads read, and how many images there are.

    Args:
        spec: Of the image set.
        labelled: All labelled images.
        config: How vectors are made.
    """
    if config.head == "attention":
        yield (
            f"Features: `{spec.title}` ({spec.fingerprint[:12]}). Raw and random encoder: patch "
            "tokens (prefix tokens left out), pooled by a trained query; Adaptor: its adapted "
            "tokens at the same places; all standardised by the training subset itself."
        )
    else:
        yield _about_vectors(spec, config)
    for reason, count in labelled.left_out.items():
        yield f"Left out: {count:,} images {reason}."
    for split in ("train", "validate", "test"):
        numbers = labelled.of(split)
        counts = ", ".join(f"{n} {c:,}" for n, c in labelled.class_counts(numbers).items())
        patients = len({labelled.subject_ids[number] for number in numbers})
        yield f"Split {split}: {len(numbers):,} images of {patients:,} patients ({counts})."


def _about_vectors(spec: FeatureSetSpec, config: ProbeConfig) -> str:
    """Which vectors heads read."""
    ways = [pooling_rule(spec, one) for one in possible_poolings(spec, config.poolings)]
    chosen = "; validate chooses" if len(ways) > 1 else ""
    return (
        f"Features: `{spec.title}` ({spec.fingerprint[:12]}). Raw and random encoder: "
        f"{', or '.join(ways)}{chosen}; Adaptor: the vector of its objective; all standardised by "
        "the training subset itself."
    )


def about_labels(
    manifest: Manifest, labelled: LabelledImages, names: Sequence[str], policy: LabelPolicy
) -> Iterator[str]:
    """What was done with labels that say neither yes nor no.

    Args:
        manifest: Labels.
        labelled: What was made of them.
        names: Of the label columns.
        policy: What was done.
    """
    uncertain, blank = count_unsettled(manifest, names)
    if labelled.of_findings or uncertain:
        yield policy.note(uncertain, blank)


def about_rules(config: ProbeConfig, labelled: LabelledImages, judge: Judge) -> Iterator[str]:
    """How the figures were made.

    Args:
        config: Of the heads.
        labelled: All labelled images.
        judge: Of the test labels.
    """
    seeds = "probes that converged hardly depend on their seed"
    if config.head != "linear":
        seeds = "these heads depend on theirs"
    if config.head == "attention":
        yield (
            "Head: one trained query weighs an image's patch tokens, a linear layer reads their "
            "weighted mean; every image enters each epoch. Published probes are linear."
        )
    if config.head == "mlp":
        yield (
            f"Head: an MLP with one hidden layer of {config.hidden} units (GELU), without batch "
            "norm and dropout; batches are of equal size within one row, so that no row is "
            "dropped. Published probes are linear."
        )
    yield (
        f"Mean ± standard deviation over {config.subsets} subsets x {config.seeds} seeds (at 100 % "
        f"there is one subset, and {seeds}: read the "
        f"interval). [95 % interval]: {config.draws:,} draws of test patients, each scored by all "
        "probes and averaged; a draw that lacks a class is left out."
    )
    rates = " and learning rate" if config.head != "linear" else ""
    yield (
        f"Weight decay{rates}: chosen for each subset on validate by "
        f"{scores.TITLES[config.select_by]} (mean over its seeds; the smaller of equals)."
    )
    if labelled.of_findings:
        own = "a probe" if config.head == "linear" else "an output"
        yield (
            f"Each finding is {own} of its own, trained and measured on the images where it is "
            "known; one weight decay for all of them. Subsets are drawn by an image's rarest "
            "finding. Single findings stand below, for the largest share of the labels alone."
        )
    else:
        yield (
            "The largest probability is the prediction, of equals the first class by name. Pairs "
            "that tie count half in AUROC."
        )
    blind: list[bool] = []
    if labelled.of_findings:
        blind = scores.defined_findings(labelled.targets[labelled.of("validate")]).tolist()
    unseen = [name for name, seen in zip(labelled.classes, blind, strict=False) if not seen]
    if unseen:
        yield f"Without a say in the choice, being undefined on validate: {', '.join(unseen)}."


def about_gaps(subsets: Sequence[Subset], judge: Judge) -> Iterator[str]:
    """What does not exist, or cannot be known.

    Args:
        subsets: The training subsets.
        judge: Of the test labels.
    """
    undefined = judge.undefined_classes()
    if judge.of_findings and undefined:
        named = ", ".join(f"{name} ({has} of {known})" for name, (has, known) in undefined.items())
        yield (
            f"AUROC is undefined, none or all of the test images having it, for {named}: macro "
            "AUROC is the mean over the other findings."
        )
    elif undefined:
        for name, (has, known) in undefined.items():
            yield (
                f"AUROC of class {name} is undefined ({has} of {known} test images): "
                "macro AUROC is the mean over the other classes."
            )
    rare = judge.rare_classes()
    if rare:
        figures = "macro AUROC and" if judge.of_findings else "balanced accuracy and macro AUROC:"
        figures += " those findings:" if judge.of_findings else ""
        yield (
            f"No interval for {figures} in test, "
            f"{' and '.join(rare)} (or the rest) comes from a single patient."
        )
    lacking: dict[tuple[str, str], list[str]] = {}
    for subset in subsets:
        if subset.missing:
            place = (subset.title, ", ".join(subset.missing))
            lacking.setdefault(place, []).append(str(subset.number))
    for (share, missing), numbers in lacking.items():
        yield f"{share}, subset {', '.join(numbers)}: no training image of {missing}."
