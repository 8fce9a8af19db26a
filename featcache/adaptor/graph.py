"""An Adaptor's two sides as ONNX graphs, held against torch after they were written."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.export import Dim

from featcache.adaptor.saved import TrainedAdaptor
from featcache.adaptor.side import ImageSide, TextSide
from featcache.config import explained_refusals
from featcache.errors import TrainingError, UsageError

IMAGE_GRAPH, TEXT_GRAPH = "image.onnx", "text.onnx"
NEEDED = ("onnx", "onnxscript")
RUNTIME = "onnxruntime"
LARGEST_ERROR = 1e-4
"""Of a number, relative to the largest one of its vectors; rounding gives about 1e-6."""
SIZES = ((1, 1), (3, 7))
"""Rows and tokens with which a graph is tried, other than those that it was traced with."""


def require_onnx() -> None:
    """See that graphs can be written here.

    Raises:
        UsageError: A package is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed",
            where="--to onnx",
            fix='pip install "featcache[export]"',
        )


def write_graphs(
    folder: Path, trained: TrainedAdaptor, about: Mapping[str, str]
) -> dict[str, float] | None:
    """Write `image.onnx` and `text.onnx`, each whole in one file, in float32.

    Args:
        folder: Where to.
        trained: On the CPU.
        about: Texts that each graph carries in its metadata.

    Returns:
        The largest relative error of each graph, by file name; None without onnxruntime, when
        they are not checked.

    Raises:
        UsageError: A package is missing.
        TrainingError: A graph gives other vectors than torch.
        CacheError: The disk is full.
    """
    require_onnx()
    facts, errors = trained.facts, {}
    rows, length = Dim("rows"), Dim("length")
    axes = {0: rows, 1: length}
    image, text = (4, 5, facts.image.dim), (4, 5, facts.text.dim)
    for name, side, shapes in (
        (IMAGE_GRAPH, ImageSide(trained), {"tokens": image}),
        (TEXT_GRAPH, TextSide(trained), {"tokens": text, "valid": text[:2]}),
    ):
        given = _draw(shapes)
        _write(folder / name, side, given, dict.fromkeys(given, axes), about)
        if find_spec(RUNTIME) is not None:
            errors[name] = _check(folder / name, side, shapes)
    return errors or None


def _draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Shaped[Tensor, "..."]]:
    """Random tokens; of two axes, which of them are real: the first row has none."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "valid" in drawn:
        drawn["valid"] = drawn["valid"] > 0
        drawn["valid"][0] = False
    return drawn


def _write(
    path: Path,
    side: nn.Module,
    given: dict[str, Shaped[Tensor, "..."]],
    axes: dict[str, dict[int, Dim]],
    about: Mapping[str, str],
) -> None:
    """Trace one side and write it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about names of axes
        program = torch.onnx.export(
            side,
            kwargs=given,
            input_names=list(given),
            output_names=["vector"],
            dynamic_shapes=axes,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise TrainingError("torch gave no ONNX graph", where=path)
    program.model.metadata_props.update(about)
    with explained_refusals(path):
        program.save(path, external_data=False)


def _check(path: Path, side: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The largest relative error of a graph, on rows and lengths that it was not traced with.

    Raises:
        TrainingError: It is too large.
    """
    runtime = import_module(RUNTIME)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for size in SIZES:
        given = _draw({name: (*size, *shape[2:]) for name, shape in shapes.items()})
        with torch.no_grad():
            want = side(**given)
        (found,) = session.run(None, {name: one.numpy() for name, one in given.items()})
        difference = (torch.from_numpy(found) - want).abs().max()
        worst = max(worst, (difference / want.abs().max().clamp(min=1e-6)).item())
    if not worst <= LARGEST_ERROR:
        raise TrainingError(
            f"the graph {path.name} differs from torch by {worst:.1g} of the largest number, at "
            f"most {LARGEST_ERROR:.0e} is allowed",
            where=path.name,
            fix="featcache export --to safetensors, and another version of torch or onnxruntime",
        )
    return worst
