"""Find what is wrong with a data set before training does, and write a cleaned copy.

`--json` writes {"data": path, "cleaned": path or null, and what `Report.to_dict` returns: "errors", "notes", "kinds",
"findings", "statistics", "remarks"}. A cleaned copy lists what was changed in its changes.json, as `check_copy.Change`.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_dense.tools.label_arguments import add_label_arguments, label_map_of

if TYPE_CHECKING:
    from swin_dense.datasets.check_coco import CocoCheck
    from swin_dense.datasets.check_findings import Finding, Report
    from swin_dense.datasets.check_semantic import SemanticCheck

_SHOWN = 4
_PLACE_LENGTH = 90

HELP = "Find faults in a data set: COCO annotations, or images with label pictures. Exit code 1 if one hurts training."
EXAMPLE = """  swin-dense check /data/coco --html faults.html
  swin-dense check instances_val.json --images val/ --fix /data/cleaned
  swin-dense check /data/ade --classes ade20k --json faults.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "data", metavar="DATA", type=Path, help="a data folder, or a COCO annotation file with --images"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of an annotation file")
    parser.add_argument(
        "--labels", type=Path, metavar="DIR", help="folder of label pictures; DATA is that of the images"
    )
    add_label_arguments(parser)
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned copy; the data itself stays as it is")
    parser.add_argument("--copy", action="store_true", help="with --fix: copy pictures instead of linking to them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every finding")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows examples of each kind")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read pictures; default: one a core")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="read pictures of up to N pixels; default: 89 million"
    )
    parser.add_argument(
        "--headers-only",
        action="store_true",
        help="do not decode images: faster, but blind for damaged and repeated ones",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, print, write what was asked for."""
    from swin_dense.datasets.images import pixel_limit

    _require_fitting(arguments)
    with pixel_limit(arguments.max_pixels):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from swin_dense.tools.tables import write_json

    with _Bars() as bars:
        check = _check(arguments, bars)
    _print_report(str(arguments.data), check.report)
    cleaned = None if arguments.fix is None else str(arguments.fix)
    write_json(arguments.json, {"data": str(arguments.data), "cleaned": cleaned, **check.report.to_dict()})
    if arguments.html is not None:
        from swin_dense.datasets.check_drawing import draw_finding
        from swin_dense.tools.check_page import write_page

        write_page(arguments.html, str(arguments.data), check.report, lambda finding: draw_finding(finding, check))
        print(f"examples of each kind: {arguments.html}")
    if arguments.fix is not None:
        _write_cleaned(arguments, check)
    return 1 if check.report.num_errors else 0


class _Bars:
    """One progress bar after the other."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, title: str) -> Callable[[int, int], None]:
        from swin_dense.tools.progress_bar import progress_bar

        self._stack.close()
        return self._stack.enter_context(progress_bar(title))


def _require_fitting(arguments: argparse.Namespace) -> None:
    from swin_dense.datasets.check_copy import require_new_folder
    from swin_dense.errors import ConfigError, DataError

    if not arguments.data.exists():
        raise DataError(f"{arguments.data}: there is no such file or folder.")
    if arguments.data.is_dir() and arguments.images is not None:
        raise ConfigError(
            "--images goes with an annotation file; for a folder of images name the labels with --labels."
        )
    if not arguments.data.is_dir() and arguments.images is None:
        raise ConfigError(f"{arguments.data}: name the folder of its images with --images DIR.")
    if not arguments.data.is_dir() and (arguments.labels is not None or arguments.classes is not None):
        raise ConfigError("--labels and --classes go with folders of label pictures, not with an annotation file.")
    if arguments.labels is not None and arguments.labels.resolve() == arguments.data.resolve():
        raise ConfigError(
            f"--labels {arguments.labels}: that is the folder of the images; labels need one of their own."
        )
    if arguments.copy and arguments.fix is None:
        raise ConfigError("--copy goes with --fix OUT.")
    if arguments.fix is not None:
        require_new_folder(arguments.fix, [])  # now, not after an hour of reading


def _check(arguments: argparse.Namespace, bars: _Bars) -> CocoCheck | SemanticCheck:
    from swin_dense.datasets.check_coco import check_coco, find_coco_files
    from swin_dense.datasets.check_semantic import check_semantic, find_semantic_folders
    from swin_dense.errors import DataError

    workers = arguments.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    how: Mapping[str, Any] = {"decode": not arguments.headers_only, "workers": workers, "progress": bars}
    if not arguments.data.is_dir():
        return check_coco([("all", arguments.data, arguments.images)], **how)
    if arguments.labels is None and arguments.classes is None:
        files = find_coco_files(arguments.data)
        if files:
            return check_coco(files, **how)
    label_map = label_map_of(arguments)
    if arguments.labels is not None:
        return check_semantic([("all", arguments.data, arguments.labels)], label_map, **how)
    try:
        folders = find_semantic_folders(arguments.data)
    except DataError as error:
        if arguments.classes is not None:
            raise
        ways = _other_ways(arguments.data)
        raise DataError(
            f"{error} Nor is there an annotation file, annotations/instances_<split>.json. {ways}"
        ) from None
    return check_semantic(folders, label_map, **how)


def _other_ways(root: Path) -> str:
    """How to name data that lies in other folders, with an annotation file of another name where there is one."""
    files = [path for folder in (root / "annotations", root) for path in sorted(folder.glob("*.json"))]
    file = files[0] if files else "FILE.json"
    return f"Other folders are named so: check {file} --images DIR, or check IMAGES --labels LABELS."


def _write_cleaned(arguments: argparse.Namespace, check: CocoCheck | SemanticCheck) -> None:
    from collections import Counter

    from swin_dense.datasets.check_coco import CocoCheck
    from swin_dense.datasets.check_fix_coco import fix_coco
    from swin_dense.datasets.check_fix_semantic import fix_semantic

    if isinstance(check, CocoCheck):
        root = arguments.data if arguments.data.is_dir() else None
        changes = fix_coco(check, arguments.fix, root, copy_pictures=arguments.copy)
    else:
        changes = fix_semantic(check, arguments.fix, copy_pictures=arguments.copy)
    counts = Counter(change.kind for change in changes)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "none was needed"
    print(f"cleaned copy: {arguments.fix} ({len(changes):,} changes: {listed}; see changes.json there)")


def _print_report(title: str, report: Report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from swin_dense.datasets.check_findings import KINDS, printable
    from swin_dense.tools.tables import counted

    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kind", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("first one", overflow="fold")
    counts = report.counts()
    for kind, count in counts.items():
        table.add_row(kind, KINDS[kind].severity, f"{count:,}", _place(report.first(kind)))
    faults = f"{counted(report.num_errors, 'error', 'errors')}, {counted(report.num_notes, 'note', 'notes')}"
    console.print(f"{title}: {faults}", soft_wrap=True)
    if counts:
        console.print(table)
    for name, statistics in report.statistics.items():
        for line in _statistics_lines(name, statistics):
            print(textwrap.fill(printable(line), console.width, subsequent_indent="    "))
    for remark in report.remarks:
        print(textwrap.fill(remark, console.width))


def _place(finding: Finding) -> str:
    from swin_dense.datasets.check_findings import printable

    place = printable(Path(finding.file).name)
    if finding.annotation_id is not None:
        place = f"{finding.split}, annotation {finding.annotation_id}"
    elif finding.image_id is not None:
        place += f" (image {finding.image_id})"
    text = f"{place}: {finding.reason}"
    return text if len(text) <= _PLACE_LENGTH else f"{text[:_PLACE_LENGTH]}…"


def _statistics_lines(name: str, statistics: Mapping[str, Any]) -> list[str]:
    sides = statistics["image_sides_px"]
    ranges = [_range(sides["min"][axis], sides["max"][axis]) for axis in (0, 1)] if sides else ["?", "?"]
    lines = [f"{name}: {statistics['images']:,} images, {ranges[0]} px high, {ranges[1]} px wide"]
    if "annotations" in statistics:
        per_image, crowd = statistics["annotations_per_image"], statistics["crowd"]
        lines.append(
            f"  {statistics['annotations']:,} annotations, {per_image['mean']:.1f} an image, {per_image['max']} at most"
        )
        lines.append(f"  sizes: {_shares(statistics['sizes'])}")
        lines.append(
            f"  crowd: {crowd['annotations']:,}, {crowd['share_of_annotations']:.1%} of the annotations, "
            f"in {crowd['share_of_images']:.1%} of the images"
        )
    if "unlabelled_share" in statistics:
        lines.append(f"  unlabelled: {statistics['unlabelled_share']:.1%} of the pixels")
    histogram = statistics.get("classes") or statistics.get("values") or {}
    if histogram:
        ordered = sorted(histogram.items(), key=lambda item: -item[1])
        what = ("class", "classes") if "classes" in statistics else ("value", "values")
        unit = "" if "annotations" in statistics else " px"
        total = sum(histogram.values())
        most = _shares(dict(ordered[:_SHOWN]), total, unit)
        lines.append(f"  {len(ordered)} {what[len(ordered) != 1]}, most: {most}")
        rarest = [f"{key}: {count:,}{unit}" for key, count in ordered[_SHOWN:] if count][-_SHOWN:]
        if rarest:
            lines.append(f"  least: {', '.join(rarest)}")
    return lines


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _shares(counts: Mapping[str, int], total: int | None = None, unit: str = "") -> str:
    total = max(1, sum(counts.values()) if total is None else total)
    return ", ".join(f"{name}: {count:,}{unit} ({count / total:.0%})" for name, count in counts.items())


if __name__ == "__main__":
    from swin_dense.tools.main import leave, main

    leave(main(["check", *sys.argv[1:]]))
