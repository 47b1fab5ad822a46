"""The one page that holds the figures of all benchmarks: a section for what was measured and the device it ran on.

A command replaces its own section and leaves the others as they are, so that several commands on several machines make
the page, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from swin_dense.errors import ConfigError
from swin_dense.tools.machine import machine_line
from swin_dense.tools.markdown_page import markdown_page, wrapped, write_markdown

TITLE = "Benchmarks"
_BEGINNING = f"# {TITLE}\n\nEach section of this page was written by the command in it"
_INTRODUCTION = wrapped(
    f"{_BEGINNING.splitlines()[-1]}, on the device in its title. A ratio, in a column that begins with x, is the "
    "time of another model over ours in the same run, so above 1 ours is faster; times of two devices or days do not "
    "compare. What no machine has confirmed is not here."
)
_METHOD_TITLE = "How models are measured"
_METHOD = (
    "All contestants of a table have the same random weights and get the same batch; no path and no channel is "
    "dropped. They take turns in one process: times are medians and their range over the rounds after the warm-up; a "
    "ratio is the median, and the range, of the ratios of the rounds. Images/s are the batch over the median. "
    "Peak memory is what torch's allocator hands out at most, with weights and optimiser. Before that, their outputs "
    "for one image are compared in float32, and their maps once more in the precision of the table; a peer whose "
    "outputs differ by more than is allowed has no ratio. Differences are relative, in the L2 norm.",
    "Compiled means `swin_dense.compile` for ours and `torch.compile` for the others, for the sizes of the table.",
    "Tables of scaling hold medians; there, outputs are not compared again. What would need more than the limit of the "
    "command for a single step is left out. Exponents are fitted to the points that all have in common.",
    "The floor is the time that the matrix products and convolutions of the published network need alone, three times "
    "those of the forward pass in training, at the rate of one large product, which takes part in every round; a share "
    "of it is that time over the one measured, and above 100% where fewer are computed.",
)


def read_sections(path: Path) -> dict[str, str]:
    """The sections of the page by title; none where there is no page yet.

    Raises:
        ConfigError: Something else wrote the file.
    """
    page = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not page.strip():
        return {}
    if not page.startswith(_BEGINNING) or "\ufffd" in page:  # which stands for bytes that are no text
        raise ConfigError(
            f"--document {path}: something else wrote this file, as it does not begin with '# {TITLE}' and the "
            "sentence that this command writes; it stays as it is. Name another file, or move this one."
        )
    _, *sections = page.split("\n## ")
    by_title = {title: text.strip("\n") for title, _, text in (section.partition("\n") for section in sections)}
    return {title: text for title, text in by_title.items() if title != _METHOD_TITLE}


def write_section(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a section, in the place of the one with the same title where there is one, and at the end where not.

    Args:
        path: The page; created where there is none.
        title: What was measured, and on which kind of device.
        parts: Paragraphs, tables, lists and headings of the third order.

    Raises:
        ConfigError: Something else wrote the file.
    """
    sections = {**read_sections(path), title: "\n\n".join(parts), _METHOD_TITLE: "\n\n".join(map(wrapped, _METHOD))}
    written = [f"## {name}\n\n{text}" for name, text in sections.items()]
    write_markdown(path, markdown_page(TITLE, [_INTRODUCTION, *written]))


def section_start(command: str, machine: Mapping[str, str]) -> list[str]:
    """What every section begins with: machine and command."""
    return [wrapped(f"Machine: {machine_line(machine)}"), f"```sh\n{command}\n```"]
