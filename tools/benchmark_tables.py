"""Measured rows and sweeps as tables, for the terminal and for a page of `docs/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swin_dense.tools.benchmark_contest import COMPILED, OURS
from swin_dense.tools.machine import machine_line
from swin_dense.tools.markdown_page import markdown_page, markdown_table, wrapped, write_markdown
from swin_dense.tools.tables import print_sentences, print_table

Figures = Mapping[str, Any]
_ABSENT = "n/a"


def print_row(row: Figures) -> None:
    """Print a row, and what was compared before."""
    print_table(row["title"], row_table(row))
    print_sentences(_sentences(row))


def print_sweep(sweep: Figures) -> None:
    """Print a sweep."""
    print_table(f"scaling with {sweep['title']}", sweep_table(sweep))
    print_sentences(_exponent(sweep))


def row_table(row: Figures) -> dict[str, dict[str, str]]:
    """A line for each contestant."""
    ours = [name for name in (OURS, OURS + COMPILED) if name in row["contestants"]]
    return {
        name: {
            "ms": _milliseconds(figures["time_s"]),
            **{f"x {own}": _ratio(name, own, figures["ratios"].get(own)) for own in ours},
            "peak memory": _mebibytes(figures["peak_bytes"]),
            "of the floor": f"{figures['share_of_floor']:.0%}",
        }
        for name, figures in row["contestants"].items()
    }


def sweep_table(sweep: Figures) -> dict[str, dict[str, str]]:
    """A line for each point."""
    return {
        name: {
            "ms": point["left_out"] or _milliseconds(point["time_s"]),
            "megapixels a second": _ABSENT if point["left_out"] else _megapixels_per_s(point),
            "peak memory": _ABSENT if point["left_out"] else _mebibytes(point["peak_bytes"]),
        }
        for name, point in sweep["points"].items()
    }


def write_document(path: Path, figures: Figures, machine: Mapping[str, str]) -> None:
    """Write the figures of `measure_models` as a page with its command and machine."""
    write_markdown(path, document(figures, machine))


def document(figures: Figures, machine: Mapping[str, str]) -> str:
    """That page, Markdown; every number in it is measured or a setting."""
    versions = {**machine, **figures["versions"]}
    parts = [
        "This page is written by this command:",
        f"```sh\n{figures['command']}\n```",
        wrapped(f"Machine: {machine_line(versions)}  measured on {figures['device']}  threads {figures['threads']}"),
        wrapped(
            "All contestants have the same random weights and get the same batch; no path and no channel is dropped. "
            f"They take turns in one process, {figures['repeats']} rounds after the warm-up: times are medians "
            "and their range; a ratio is the median, and the range, of the ratios of the rounds, above 1 where ours "
            "is faster. Peak memory is what torch's allocator hands out at most, with weights and optimiser. Before "
            "that, their outputs for one image are compared in float32, and their maps once more in the precision of "
            "the row; a peer whose outputs differ by more than is allowed has no ratio. Differences are relative, in "
            "the L2 norm."
        ),
        wrapped(
            "The floor is the time that the matrix products and convolutions of the published network need alone, "
            "three times those of the forward pass in training, at the rate of one large product, which takes part in "
            "every round; a share of it is that time over the one measured, and above 100% where fewer are computed."
        ),
        *(wrapped(note) for note in figures["notes"]),
    ]
    for row in figures["rows"]:
        parts += [f"## {row['title']}", markdown_table(row_table(row)), _list(_sentences(row))]
    for sweep in figures.get("scaling", []):
        parts += [f"## Scaling with {sweep['title']}", markdown_table(sweep_table(sweep)), *_exponent(sweep)]
    return markdown_page(f"Benchmark: {figures['title']}", [part for part in parts if part])


def _sentences(row: Figures) -> list[str]:
    sentences = [_agreement(name, found) for name, found in row["agreement"].items()]
    rate = f"{row['products_per_s'] / 1e9:,.0f} billion operations a second"
    return [*sentences, f"Floor: {row['flops'] / 1e9:,.0f} billion operations; one large product reaches {rate}."]


def _agreement(name: str, found: list[Figures]) -> str:
    """What was compared, in one sentence for a peer."""
    relation = "equals" if all(one["holds"] for one in found) else "does not equal"
    differences = "; ".join(
        f"{', '.join(one['compared'])} in {one['precision']} to {one['difference']:.1e} ({one['tolerance']:g} allowed)"
        for one in found
    )
    return f"{name} {relation} {found[0]['reference']}: {differences}."


def _exponent(sweep: Figures) -> list[str]:
    exponent = sweep["exponent"]
    return [] if exponent is None else [f"Time grows with the pixels to the power of {exponent:.2f}."]


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _milliseconds(times_s: Figures) -> str:
    digits = 0 if times_s["median"] >= 1 else 1
    median, least, most = (f"{1000 * times_s[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _ratio(name: str, own: str, ratio: Figures | None) -> str:
    if ratio is None:
        return "1" if name == own else "outputs differ"
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _megapixels_per_s(point: Figures) -> str:
    return f"{point['pixels'] / point['time_s']['median'] / 1e6:.2f}"
