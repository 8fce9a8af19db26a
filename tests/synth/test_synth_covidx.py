"""The synthetic COVIDx: its lists with their odd lines, its files, and whether one can learn it."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featcache.config import read_json
from featcache.synth.registry import synthesize

CLASSES = ("normal", "pneumonia", "COVID-19")


@pytest.fixture(scope="module")
def tree(covidx_tree) -> Path:
    return covidx_tree


@pytest.fixture(scope="module")
def truth(tree) -> dict:
    return read_json(tree.with_name("tree.truth.json"))["images"]


def rows(tree: Path, split: str) -> list[tuple[str, str, str, str | None]]:
    """Patient, file, class and source, taken from the right."""
    found = []
    for line in (tree / f"{split}_COVIDx9A.txt").read_text().splitlines():
        fields = line.split(" ")
        source = None if fields[-1] in CLASSES else fields.pop()
        found.append((" ".join(fields[:-2]), fields[-2], fields[-1], source))
    return found


def stored(tree: Path, split: str, file: str) -> Path:
    """A listed file under the name it has on disk."""
    path = tree / split / file
    return path if path.exists() else tree / split / re.sub(r"\((\d+)\)", r"-\1", file)


def test_lists_have_three_four_and_five_fields(tree):
    counts = {
        split: Counter(
            len(line.split(" "))
            for line in (tree / f"{split}_COVIDx9A.txt").read_text().splitlines()
        )
        for split in ("train", "test")
    }
    assert set(counts["train"]) == {4, 5}
    assert set(counts["test"]) == {3, 4}
    assert sum(counts["train"].values()) == 240
    assert sum(counts["test"].values()) == 60
    assert [row[2] for row in rows(tree, "test")] == [c for c in CLASSES for _ in range(20)]


def test_two_percent_of_the_listed_files_are_missing(tree, truth):
    missing = [
        file for _, file, *_ in rows(tree, "train") if not stored(tree, "train", file).exists()
    ]
    assert len(missing) == 5
    assert {f"train/{file}" for file in missing} == {
        name for name, image in truth.items() if "missing" in image["odd"]
    }
    assert all(stored(tree, "test", file).exists() for _, file, *_ in rows(tree, "test"))


def test_slides_are_renamed_and_a_source_is_misspelt(tree):
    train = rows(tree, "train")
    slides = [file for _, file, _, source in train if source == "sirm"]
    assert all(re.fullmatch(r"COVID\(\d+\)\.(png|PNG|JPG)", file) for file in slides)
    assert {(tree / "train" / file).exists() for file in slides} == {True, False}
    assert list((tree / "train").glob("COVID-*.png"))
    sources = Counter(source for *_, source in train)
    assert 0 < sources["rnsa"] < sources["rsna"]


def test_file_kinds(tree):
    modes, endings = set(), set()
    for path in [*(tree / "train").iterdir(), *(tree / "test").iterdir()]:
        endings.add(path.suffix)
        with Image.open(path) as image:
            image.load()
            modes.add((image.format, image.mode))
            assert 128 <= min(image.size) <= max(image.size) <= 160
    assert endings == {".png", ".jpg", ".jpeg", ".JPG", ".PNG"}
    assert modes >= {
        ("PNG", "L"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "I;16"),
        ("JPEG", "L"),
    }


def test_patients_have_several_images_and_stay_in_their_list(tree, truth):
    train, test = ({row[0] for row in rows(tree, split)} for split in ("train", "test"))
    assert not train & test
    several = Counter(row[0] for row in rows(tree, "train"))
    assert sum(count > 1 for count in several.values()) > 20
    people = {}
    for name, image in truth.items():
        people.setdefault(image["person"], set()).add(name.partition("/")[0])
    assert all(len(splits) == 1 for splits in people.values())
    rsna = [image["person"] for image in truth.values() if image["source"] in ("rsna", "rnsa")]
    assert len(set(rsna)) < len(rsna)  # as in the original: its identifiers name images


def test_source_gives_the_class_away_unless_switched_off(tree, tmp_path):
    def sources(root, finding):
        return {source for *_, c, source in rows(root, "train") if c == finding}

    assert not sources(tree, "COVID-19") & sources(tree, "normal")
    mixed = synthesize("covidx", tmp_path / "mixed", switches=["no-confound"]).path
    assert sources(mixed, "COVID-19") & sources(mixed, "normal") >= {"rsna", "stonybrook"}


def pixels(path: Path) -> np.ndarray:
    """32 x 32 grey levels in [0, 1], flat."""
    image = Image.open(path)
    grey = np.asarray(image, dtype=np.float32)
    grey = grey[..., 0] if grey.ndim == 3 else grey
    grey = (grey - grey.min()) / np.ptp(grey)
    return np.asarray(Image.fromarray(grey).resize((32, 32))).ravel()


def test_classes_can_be_learnt_from_pixels_but_not_perfectly(tree):
    features, labels = {}, {}
    for split in ("train", "test"):
        found = [(stored(tree, split, row[1]), row[2]) for row in rows(tree, split)]
        found = [(path, label) for path, label in found if path.exists()]
        features[split] = np.stack([pixels(path) for path, _ in found])
        labels[split] = [label for _, label in found]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    classifier.fit(features["train"], labels["train"])
    score = balanced_accuracy_score(labels["test"], classifier.predict(features["test"]))
    assert 0.55 < score < 0.95  # chance is 0.33
