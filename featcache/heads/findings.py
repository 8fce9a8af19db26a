"""Several findings of each image at once, such as the label columns of CheXpert and MIMIC-CXR."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from featcache.cache.reader import FeatureSet
from featcache.errors import ManifestError, UsageError
from featcache.heads.labels import (
    PREFIX,
    LabelledImages,
    LabelPolicy,
    join_targets,
    label_column,
)
from featcache.manifest.splits import SPLIT_NAMES
from featcache.manifest.table import Manifest


def finding_names(manifest: Manifest) -> tuple[str, ...]:
    """Label columns that hold a finding: whole numbers 1, 0, -1 and null.

    Args:
        manifest: Where to look.
    """
    return tuple(
        name
        for name in manifest.label_names
        if pa.types.is_integer(manifest.images.column(PREFIX + name).type)
    )


def labelled_findings(
    images: FeatureSet,
    manifest: Manifest,
    names: Sequence[str],
    policy: LabelPolicy,
    *,
    needs: Sequence[str] = SPLIT_NAMES,
) -> LabelledImages:
    """Join several findings to the rows of a feature set, by key.

    An image is kept when at least one of them is known.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits, patients.
        names: Of the findings, with or without `label:`.
        policy: What labels mean that say neither yes nor no.
        needs: Splits that must have images; one that trains must have `train` among them.

    Raises:
        UsageError: A name is unknown, stands twice, or is that of a column of class names.
        ManifestError: A patient is in two splits, a split is empty, or no finding is both present
            and absent among the training images, where those are needed.
    """
    plain = [name.removeprefix(PREFIX) for name in names]
    columns = [label_column(manifest, name) for name in plain]
    of_words = [
        name
        for name, column in zip(plain, columns, strict=True)
        if not pa.types.is_integer(column.type)
    ]
    if of_words or len(set(plain)) < len(plain):
        raise UsageError(
            f"`{of_words[0]}` holds class names, not a finding"
            if of_words
            else "a finding is named twice",
            where="--set findings",
            fix=f"findings: {', '.join(finding_names(manifest)) or 'none in this manifest'}",
        )
    targets = np.stack([policy.settle(column) for column in columns], axis=1)
    found = join_targets(
        images, manifest, targets, plain, unnamed="without a known finding", needs=needs
    )
    train = found.targets[found.of("train")]
    if "train" in needs and not ((train == 1).any(axis=0) & (train == 0).any(axis=0)).any():
        raise ManifestError(
            "no finding is present in some training images and absent in others",
            where=manifest.folder,
            fix="--set blank=negative counts images that do not mention a finding as without it",
        )
    return found


def count_unsettled(manifest: Manifest, names: Sequence[str]) -> tuple[int, int]:
    """How many labels are uncertain (-1), and how many blank.

    Args:
        manifest: Labels.
        names: Of label columns; those of class names count their blanks alone.
    """
    uncertain = blank = 0
    for name in names:
        column = label_column(manifest, name)
        blank += column.null_count
        if pa.types.is_integer(column.type):
            values = column.drop_null().to_numpy()
            uncertain += int((values < 0).sum())
    return uncertain, blank
