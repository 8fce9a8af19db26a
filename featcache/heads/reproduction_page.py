"""The page of the reproduction: what stands beside what, in Markdown and in plain values."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from featcache.heads.paper import SHARES, PaperTable, shipped_defects, shipped_paper
from featcache.heads.reproduction_results import (
    ADAPTOR,
    DIFFERENCE,
    RAW,
    Measured,
    Section,
    TrainedRun,
    missing_shares,
)
from featcache.heads.table import Row

MAIN_ENCODER = "DINOv2-B"
"""Image encoder of the row that the paper prints."""
MARK = "†"
SHORT = {DIFFERENCE: "Adaptor minus raw"}
DICE_POSITIVE = "dice_positive"
RECIPE = "make reproduce-paper"
STAND_IN = (
    "**Synthetic stand-in**: a program drew these pictures. Our figures show that the recipe works "
    "and nothing else; the paper's figures are of real pictures and stand below, not beside them. "
    "With the real pictures: `{tree}=/path {recipe}`."
)

BESIDE = (
    "paper, best and mean: over its five text encoders with {encoder}; paper's trivial: {trivial}, "
    "on its own test split."
)


def page(run: TrainedRun, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The whole page in Markdown.

    Args:
        run: Whose Adaptor was measured.
        sections: The paper's tables with our results.
        notes: Sentences about what was left out.
    """
    lines = [
        f"# The paper's tables beside run `{run.name}`",
        "",
        "Qin et al. 2024, arXiv 2401.01179. In %; [95 % interval over test patients]; means over "
        "subsets and seeds. Nothing was trained or measured for this page: it reads finished "
        "results, whose `results.md` has all rows and rules (docs/protocol.md).",
        "",
        f"- Adaptor: objective {run.objective}, image encoder `{run.image_encoder}`, text encoder "
        f"`{run.text_encoder}`. The paper's encoders are {', '.join(_image_encoders())}, each with "
        "five text encoders.",
        *(f"- {one}" for one in (*run.notes, *notes)),
    ]
    for section in sections:
        lines += ["", *_section(section)]
    lines += ["", *_parameters(run, sections)]
    lines += ["", "## Known defects of the published protocol", "", *shipped_defects().lines()]
    return "\n".join(lines) + "\n"


def _image_encoders() -> list[str]:
    """The paper's image encoders."""
    return list(shipped_paper().tables[0].cells)


def _section(section: Section) -> Iterator[str]:
    """One table of the paper."""
    paper = section.paper
    yield f"## {paper.title}"
    yield ""
    if not section.ours:
        yield f"**Not made yet**: `make {paper.recipe}` ({paper.tree}=/path for the real pictures)."
        yield ""
    for measured in section.ours:
        yield from _ours(measured, paper)
        yield ""
    yield f"The paper's figures {MARK}, of the real pictures:"
    yield ""
    yield from _papers(paper)
    yield ""
    yield f"- Source: {paper.source}. All: the highest value that was logged on test, one seed."
    yield f"- {paper.trivial.method}: {paper.trivial.source}."
    if paper.largest_move:
        yield (
            f"- A second export of the same runs lies up to {paper.largest_move:.1f} points away "
            "from the first."
        )
    yield f"- {MARK} The protocols differ: {_differences(paper, section.ours)}."


def _differences(paper: PaperTable, ours: Sequence[Measured]) -> str:
    """In what the paper measured otherwise than we do, with the defects' names."""
    same_split = bool(ours) and all(paper.is_split_of(one.split) for one in ours)
    parts = [
        f"{one.what} ({', '.join(one.defects)})"
        for one in paper.differs
        if not (one.is_split and same_split)
    ]
    return "; ".join(parts)


def _ours(measured: Measured, paper: PaperTable) -> Iterator[str]:
    """Our result, beside the paper's where the pictures are real."""
    is_drawn = measured.meta.synthetic
    name = f"`{measured.meta.name}`" + (" (synthetic stand-in)" if is_drawn else "")
    config = measured.config
    yield (
        f"Ours: {name}, {measured.variant}, {config.get('subsets')} subsets x "
        f"{config.get('seeds')} seeds, from `{measured.folder}`. Split: {measured.split}."
    )
    yield ""
    if is_drawn:
        yield f"- {STAND_IN.format(tree=paper.tree, recipe=RECIPE)}"
    yield from (f"- {one}" for one in _notes(measured))
    yield ""
    yield from _table([_head(measured, paper), *_lines(measured, paper)])
    remarks = (
        [] if is_drawn else [BESIDE.format(encoder=MAIN_ENCODER, trivial=paper.trivial.method)]
    )
    remarks += _remarks(measured)
    if remarks:
        yield ""
        yield from (f"- {one}" for one in remarks)


def _notes(measured: Measured) -> Iterator[str]:
    """Sentences that must be said with a result, and what it lacks."""
    yield from measured.meta.notes
    said = ("Split test: ", "--again was used")
    yield from (one for one in measured.table.notes if any(words in one for words in said))
    missing = missing_shares(measured)
    if missing:
        shares = ", ".join(f"{share:g} %" for share in missing)
        yield f"Not measured: {shares} of the labels; `--set fractions=[1,10,100] --again` does."


def _head(measured: Measured, paper: PaperTable) -> list[str]:
    """The columns of our table."""
    head = ["labels", "trained on", *(SHORT.get(one, one) for one in measured.methods)]
    if measured.head == "segment":
        head.append("Adaptor, positives")
    if not measured.meta.synthetic:
        head += [f"paper, best {MARK}", f"paper, mean {MARK}", "paper's trivial"]
    return head


def _lines(measured: Measured, paper: PaperTable) -> Iterator[list[str]]:
    """A line for each share of the labels."""
    for share in SHARES:
        rows = {method: measured.row(share, method) for method in measured.methods}
        any_row = next((row for row in rows.values() if row is not None), None)
        trained_on = any_row.setting.get("images", "") if any_row else "-"
        cells = [_cell(rows[method], paper.figure) for method in measured.methods]
        line = [f"{share:g} %", trained_on, *cells]
        if measured.head == "segment":
            line.append(_cell(rows.get(ADAPTOR), DICE_POSITIVE))
        if not measured.meta.synthetic:
            figures = paper.of_texts(MAIN_ENCODER, share)
            line += [f"{max(figures):.1f}", f"{_mean(figures):.1f}", f"{paper.trivial.figure:.1f}"]
        yield line


def _cell(row: Row | None, figure: str) -> str:
    """One figure with its interval; the spread over subsets stands in the result itself."""
    if row is None:
        return "not measured"
    if figure not in row.figures:
        return "-"
    estimate = row.figures[figure]
    return replace(estimate, values=(estimate.mean,)).text(100.0)


def _remarks(measured: Measured) -> Iterator[str]:
    """What our lines say beside their figures."""
    for method in (RAW, ADAPTOR):
        for share in SHARES:
            row = measured.row(share, method)
            if row is not None and row.remark:
                yield f"{method}, {share:g} %: {row.remark}."


def _papers(paper: PaperTable) -> Iterator[str]:
    """The paper's figures, over its text encoders."""
    table = [["", *(f"{share:g} %" for share in SHARES)]]
    for encoder in reversed(paper.cells):
        each = [paper.of_texts(encoder, share) for share in SHARES]
        table.append(
            [f"{encoder}, best of 5 text encoders on test", *(f"{max(one):.1f}" for one in each)]
        )
        spans = [f"{_mean(one):.1f} ({min(one):.1f}-{max(one):.1f})" for one in each]
        table.append([f"{encoder}, mean of the 5 (lowest-highest)", *spans])
    table.append([paper.trivial.method, *[f"{paper.trivial.figure:.1f}"] * len(SHARES)])
    yield from _table(table)


def _parameters(run: TrainedRun, sections: Sequence[Section]) -> Iterator[str]:
    """How many parameters are trained."""
    paper = shipped_paper().parameters
    yield "## Trainable parameters"
    yield ""
    total = "not recorded" if run.total is None else _millions(run.total / 1e6)
    rows = [["pre-training", "trainable", "all, with frozen encoders", "source"]]
    rows.append([f"ours: run `{run.name}`", f"{run.trainable:,}", total, "run"])
    rows += [
        [one.method, f"{one.trainable:,}", _millions(one.total_millions), "paper's notebook"]
        for one in paper.rows
    ]
    yield from _table(rows)
    yield ""
    yield f"- Source: {paper.source}."
    yield (
        "- Heads come on top: "
        + "; ".join(f"{one.method} {one.trainable:,}" for one in paper.downstream)
        + ". The paper's share of trained parameters leaves them out."
    )
    for section in sections:
        yield from (f"- Ours: {one}" for one in _head_sizes(section))


def _head_sizes(section: Section) -> Iterator[str]:
    """Parameters of one of our heads on adapted features."""
    for measured in section.ours:
        row = measured.row(SHARES[-1], ADAPTOR)
        if row is not None and "parameters" in row.details:
            yield f"{section.paper.name}, {measured.variant} {row.details['parameters']:,}."


def _millions(count: float | None) -> str:
    return "-" if count is None else f"{count:.1f} M"


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown whose columns are lined up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"


def plain_section(section: Section) -> dict[str, Any]:
    """One table of the paper with what we have for it, in plain values.

    Args:
        section: The table.
    """
    paper = section.paper
    return {
        "name": paper.name,
        "title": paper.title,
        "figure": paper.figure,
        "paper": paper.model_dump(mode="json", include={"cells", "repeat", "trivial", "source"}),
        "protocols_differ": [one.model_dump(mode="json") for one in paper.differs],
        "ours": [_plain_measured(one, paper) for one in section.ours],
        "missing": None if section.ours else f"make {paper.recipe}",
    }


def _plain_measured(measured: Measured, paper: PaperTable) -> dict[str, Any]:
    """A result of ours: every shown row of every share, as `results.json` has it."""
    rows = [
        {"percent": share, **row.to_plain()}
        for share in SHARES
        for method in measured.methods
        if (row := measured.row(share, method)) is not None
    ]
    return {
        "results": measured.folder,
        "dataset": measured.meta.dataset,
        "synthetic": measured.meta.synthetic,
        "split": measured.split,
        "has_papers_split": paper.is_split_of(measured.split),
        "variant": measured.variant,
        "figure": paper.figure,
        "rows": rows,
        "missing_shares": missing_shares(measured),
        "notes": list(_notes(measured)),
    }
