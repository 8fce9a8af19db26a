"""How far a data set is the published one, and what its reader has found in order.

The faults of checks 1, 2, 5, 10, 11 and 15 are errors, so that in a manifest their count is 0. They
are counted here nevertheless: who reads `checks.json` shall see that they were made.
"""

import re
from collections.abc import Iterator

from featcache.manifest.checks import LABEL_PREFIX, MASK_COLUMN
from featcache.manifest.finding import Finding, finding
from featcache.manifest.table import Manifest

# The policy in which a reader says how far the tables are the published ones.
_COMPLETENESS = {
    "chexpert": "tables",
    "covidx": "lists",
    "mimic-cxr": "tables",
    "mimic-cxr-jpg": "tables",
    "nih": "table",
    "openi": "release",
    "rsna": "labels",
    "siim": "table",
}
_WHOLE = re.compile(r"^complete\b|\bas published$|, as in ")
# What would show that labels and images are of different versions.
_VERSIONS = {
    "covidx": "classes of another task",
    "mimic-cxr": "pictures with another study or patient in another table",
    "mimic-cxr-jpg": "pictures with another study or patient in another table",
    "nih": "patients that are not those of the images' names",
    "rsna": "images with two targets, or with a class that contradicts the target",
    "siim": "images with a mask and also none",
}
_PUBLISHED_SPLITS = {"covidx", "rsna"}  # those with known hashes


def conformity_findings(manifest: Manifest) -> Iterator[Finding]:
    """Checks 1, 4, 5 and 15, and of 2, 10, 11 and 13 what the reader itself has counted."""
    dataset, policies = manifest.meta.dataset, manifest.meta.policies
    yield finding(1, 0, "0 needed columns are missing")
    yield finding(2, 0, "0 keys are of another form than published, or stand for two images")
    if policy := policies.get(_COMPLETENESS.get(dataset, "")):
        yield _completeness(manifest, policy)
    if dataset in _VERSIONS:
        yield finding(5, 0, f"0 {_VERSIONS[dataset]}")
    if MASK_COLUMN in manifest.images.column_names:
        yield finding(10, 0, "0 masks leave their image or cannot be read")
    if any(name.startswith(LABEL_PREFIX) for name in manifest.images.column_names):
        yield finding(11, 0, "0 labels have a value that is not allowed")
    for name in ("text_origins", "encoding"):
        if name in policies:
            yield finding(13, manifest.texts.num_rows, f"{name}: {policies[name]}", warn=False)
    if dataset in _PUBLISHED_SPLITS:
        yield _published_split(manifest)


def _completeness(manifest: Manifest, policy: str) -> Finding:
    """Check 4; a stand-in is never complete, which is no warning."""
    is_whole = _WHOLE.search(policy) is not None
    count = 0 if is_whole else manifest.meta.funnel[0].count
    verdict = "looks complete" if is_whole else "a part, or an unknown version"
    text = f"{verdict}: {policy.removeprefix(f'{verdict}: ')}"
    return finding(4, count, text, warn=not manifest.meta.synthetic)


def _published_split(manifest: Manifest) -> Finding:
    """Check 15: which lists were compared with their published hashes."""
    policy = manifest.meta.policies.get("split", "")
    if "recomputed" not in policy:
        return finding(15, 0, "no published split was asked for", warn=False)
    is_equal = "by its hashes" in policy or "by their hashes" in policy
    text = f"{0 if is_equal else 3} of 3 lists could not be held against a published hash: {policy}"
    return finding(15, 0 if is_equal else 3, text, warn=not manifest.meta.synthetic)
