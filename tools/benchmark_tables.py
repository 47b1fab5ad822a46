"""Measured rows and sweeps as tables, for the terminal and for their section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swin_dense.tools.benchmark_contest import COMPILED, OURS
from swin_dense.tools.benchmark_page import section_start
from swin_dense.tools.markdown_page import markdown_list, markdown_table, wrapped
from swin_dense.tools.tables import counted, print_sentences, print_table

Figures = Mapping[str, Any]
IMAGES_PER_S = "images/s"
_ABSENT = "n/a"


def print_row(row: Figures) -> None:
    """Print a row, and what was compared before."""
    table = row_table(row)
    for cells in table.values():
        del cells[IMAGES_PER_S]  # a terminal is narrow, and the times say it
    print_table(row["title"], table)
    print_sentences(_sentences(row))


def print_sweep(sweep: Figures) -> None:
    """Print a sweep."""
    print(f"scaling with {sweep['title']}")
    for title, table in sweep_tables(sweep).items():
        print_table(title, table)
    print_sentences(_exponents(sweep))


def row_table(row: Figures) -> dict[str, dict[str, str]]:
    """A line for each contestant."""
    ours = [name for name in (OURS, OURS + COMPILED) if name in row["contestants"]]
    return {
        name: {
            "ms": _milliseconds(figures["time_s"]),
            IMAGES_PER_S: f"{figures['images_per_s']:,.2f}",
            **{f"x {own}": _ratio(name, own, figures["ratios"].get(own)) for own in ours},
            "peak memory": _mebibytes(figures["peak_bytes"]),
            "of the floor": f"{figures['share_of_floor']:.0%}",
        }
        for name, figures in row["contestants"].items()
    }


def sweep_tables(sweep: Figures) -> dict[str, dict[str, dict[str, str]]]:
    """Two tables, each with a line for each point and a column for each contestant."""
    points = sweep["points"].items()
    return {
        title: {name: {other: cell(each) for other, each in point["contestants"].items()} for name, point in points}
        for title, cell in (("Milliseconds", _point_milliseconds), ("Peak memory", _point_memory))
    }


def section_parts(figures: Figures, machine: Mapping[str, str]) -> list[str]:
    """The section of the figures of `measure_models`; every number in it is measured or a setting."""
    rounds, threads = counted(figures["repeats"], "round", "rounds"), counted(figures["threads"], "thread", "threads")
    parts = [
        *section_start(figures["command"], {**machine, **figures["versions"]}),
        wrapped(f"Measured on {figures['device']}, {rounds}, {threads}."),
        *(wrapped(note) for note in figures["notes"]),
    ]
    for row in figures["rows"]:
        parts += [f"### {row['title']}", markdown_table(row_table(row)), markdown_list(_sentences(row))]
    for sweep in figures.get("scaling", []):
        tables = [f"{title}:\n\n{markdown_table(table)}" for title, table in sweep_tables(sweep).items()]
        parts += [f"### Scaling with {sweep['title']}", *tables, *_exponents(sweep)]
    return parts


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


def _exponents(sweep: Figures) -> list[str]:
    fitted = [f"{value:.2f} ({name})" for name, value in sweep["exponents"].items() if value is not None]
    return [f"Time grows with the pixels to the power of {', '.join(fitted)}."] if fitted else []


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


def _point_milliseconds(figures: Figures) -> str:
    return figures["left_out"] or f"{1000 * figures['time_s']['median']:,.1f}"


def _point_memory(figures: Figures) -> str:
    return _ABSENT if figures["left_out"] else _mebibytes(figures["peak_bytes"])
