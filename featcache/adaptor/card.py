"""The card of an exported Adaptor: what it is, what it was trained on, how it is loaded."""

from collections.abc import Mapping
from typing import Any

from featcache import __version__
from featcache.adaptor.saved import FeaturesRead, TrainedAdaptor
from featcache.adaptor.source import BEST

# Five lines each; they run inside the exported folder.
SNIPPETS = {
    "safetensors": """\
import torch
from featcache import load_adaptor
trained = load_adaptor(".")  # this folder
tokens = torch.zeros(1, 4, {image_dim})  # images, tokens of each, width
vector = trained.objective.image_vector(trained.adaptor, tokens)
""",
    "onnx": """\
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("image.onnx")
tokens = np.zeros((1, 4, {image_dim}), np.float32)  # images, tokens of each, width
(vector,) = session.run(None, {{"tokens": tokens}})
""",
    "parquet": """\
import pyarrow.parquet as pq
table = pq.read_table("images.parquet").combine_chunks()
keys = table["key"].to_pylist()
vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(keys), -1)
row = keys.index(keys[0])
""",
    "numpy": """\
import numpy as np
vectors = np.load("images.npy", mmap_mode="r")
keys = np.load("images_keys.npy").tolist()
row = keys.index(keys[0])
vector = vectors[row]
""",
}

CONTENT = {
    "safetensors": "`adaptor.safetensors` has the weights, `config.json` all that is needed to "
    "build the net around them. There is no pickle.",
    "onnx": "`image.onnx`: `tokens` (rows, length, {image_dim}), float32, to `vector`. "
    "`text.onnx`: `tokens` (rows, length, {text_dim}) and `valid` (rows, length), True = a real "
    "token, to `vector`. Rows and length are free. The encoders are not in it.",
    "parquet": "`images.parquet` and `texts.parquet`: `key` and `vector`. The key of a text is "
    "its `text_id` in the manifest. Rows of every split are in it.",
    "numpy": "`images.npy` and `texts.npy` hold the vectors, `images_keys.npy` and "
    "`texts_keys.npy` the key of each. The key of a text is its `text_id` in the manifest. Rows of "
    "every split are in it.",
}

DERIVED = (
    "These vectors were computed from patients' images and reports, and count as the data they "
    "came from: whoever may not have those may not have these. The same rules and agreements "
    "hold for keeping and for passing them on."
)
LEARNT = (
    "The weights were learnt from the data set above: its terms decide who may use them and pass "
    "them on."
)
NO_DEVICE = "For research. This is no medical device, and nothing here was tested for care."


def model_card(
    name: str, trained: TrainedAdaptor, run: Mapping[str, Any], to: str, outcome: list[str]
) -> str:
    """The text of `README.md`.

    Args:
        name: Of the run.
        trained: What is exported.
        run: Content of the run's `run.json`; empty where there is none.
        to: What was written, a key of `SNIPPETS`.
        outcome: Sentences about this export.
    """
    widths = {"image_dim": trained.facts.image.dim, "text_dim": trained.facts.text.dim}
    vectors = to in ("parquet", "numpy")
    kind = "adapted vectors" if vectors else f"an Adaptor as {to}"
    parts = [
        f"---\nlibrary_name: featcache\ntags: [radiology, {'features' if vectors else to}]\n---",
        f"# {name}: {kind}",
        _table(_facts(trained, run)),
        CONTENT[to].format(**widths),
        *outcome,
        "## Load",
        "In this folder:",
        f"```python\n{SNIPPETS[to].format(**widths)}```",
        how_to_compare(trained),
        "## What must be said",
        "\n".join(f"- {one}" for one in _notes(trained, run, vectors)),
    ]
    return "\n\n".join(parts) + "\n"


def data_title(run: Mapping[str, Any]) -> str:
    """The data set of a run in words; what a program drew is never called by its name alone."""
    manifest = run.get("manifest")
    if not isinstance(manifest, Mapping):
        return "not recorded here"
    is_drawn = bool(manifest.get("synthetic"))
    kind = "synthetic stand-in: drawn by a program" if is_drawn else "not a synthetic stand-in"
    return f"{manifest.get('name')} ({kind})"


def how_to_compare(trained: TrainedAdaptor) -> str:
    """How a score comes about, in words."""
    scale = trained.adaptor.scale.item()
    if trained.objective.has_vectors:
        return (
            f"The score of an image and a text is {scale:.4g} times the cosine of their vectors. "
            "A linear probe reads the image's vector as it is."
        )
    return (
        f"The objective `{trained.config.objective}` scores a text with all tokens of an image: "
        "load the Adaptor for that (`objective.encode_images`, `encode_texts`, `score`). The "
        "image's vector is for probes, its cosine with a text's vector is not the score that was "
        "trained."
    )


def _facts(trained: TrainedAdaptor, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts, config = trained.facts, trained.config
    kinds = {"allpairs": f", pooling {config.pooling}", "paper": f", fusion {config.fusion}"}
    rows = [
        ("objective", f"{config.objective}{kinds.get(config.objective, '')}, loss {config.loss}"),
        ("image encoder", _encoder(facts.image)),
        ("text encoder", _encoder(facts.text)),
        ("data set", data_title(run)),
    ]
    pairs = run.get("pairs")
    if isinstance(pairs, Mapping):
        rows.append(("trained on", f"{pairs.get('train'):,} pairs of the split `train`"))
    rows += _progress(trained, run)
    rows += [
        ("parameters", f"{sum(facts.parameters.values()):,}"),
        ("weights, SHA-256", f"`{facts.weights_sha256}`"),
        ("made with", f"featcache {facts.made_with}, exported with {__version__}"),
    ]
    return rows


def _progress(trained: TrainedAdaptor, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far the training was with these weights; `run.json` measures the last epoch alone."""
    epochs, validation = run.get("epochs"), run.get("validation")
    if epochs is None:
        return []
    if trained.folder.name == BEST:
        return [
            ("weights of", f"epoch {(run.get('best_epoch') or 0) + 1} of {epochs}, the best by MRR")
        ]
    rows = [("weights of", f"the last of {epochs} epochs")]
    if isinstance(validation, Mapping) and validation.get("mrr") is not None:
        rows.append(("on the split `validate`", _validation(validation)))
    return rows


def _validation(found: Mapping[str, Any]) -> str:
    """Retrieval on `validate`, with what guessing gives."""
    name = "image_to_text_recall_at_5"
    recall, chance = found.get(name), found.get("image_to_text_chance_recall_at_5")
    line = f"MRR {found['mrr']:.3f}"
    if recall is None or chance is None:
        return line
    return f"{line}, image to text R@5 {100 * recall:.1f} % (chance {100 * chance:.1f} %)"


def _encoder(read: FeaturesRead) -> str:
    text = f"`{read.encoder}`, width {read.dim}, tokens {read.tokens}"
    limit = "" if read.text_tokens is None else f" (the first {read.text_tokens})"
    return f"{text}{limit}, fingerprint `{read.fingerprint}`"


def _notes(trained: TrainedAdaptor, run: Mapping[str, Any], vectors: bool) -> list[str]:
    """Sentences that must not get lost."""
    notes = [DERIVED] if vectors else [LEARNT]
    manifest = run.get("manifest")
    if isinstance(manifest, Mapping) and manifest.get("synthetic"):
        notes.append("The data set is synthetic: no figure here says anything about patients.")
    return [*notes, *trained.notes, NO_DEVICE]


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
