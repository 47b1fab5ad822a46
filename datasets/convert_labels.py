"""Label pictures on their way into a data set, and COCO objects drawn into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.coco import CocoContent, read_annotations
from swin_dense.datasets.coco_annotations import AnnotationTable
from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_pictures import require_size
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.segmentations import crop_of_run_lengths
from swin_dense.errors import ConfigError, DataError

_BACKGROUND_NAME = "background"


@dataclass(frozen=True)
class ConvertedLabel:
    """One image with its label picture.

    Attributes:
        path: the image in the source.
        file_name: its name in the result; the label picture is called alike and ends with .png.
        values: (H, W) uint8, what the label picture holds.
    """

    path: Path
    file_name: str
    values: np.ndarray


@dataclass(frozen=True)
class DrawingRule:
    """What pixels become.

    Attributes:
        label_map: the classes of the label pictures, background among them where it is one.
        values: value of each COCO category, in the order of the categories' ids.
        uncovered: value of pixels without an object.
        crowd: value of crowd regions, and of those that the file says to ignore, where no object lies on them; None
            draws them as their category.
        order: which of two overlapping objects is seen: the smaller one, or the later one in the file.
    """

    label_map: LabelMap
    values: tuple[int, ...]
    uncovered: int
    crowd: int | None
    order: Literal["area", "file"]


def drawing_rule(
    categories: LabelMap,
    *,
    values: Literal["order", "ids"] = "order",
    uncovered: Literal["background", "ignore"] = "background",
    crowds: Literal["ignore", "background", "class"] = "ignore",
    order: Literal["area", "file"] = "area",
) -> DrawingRule:
    """Gives each category its value.

    Args:
        categories: of the COCO file.
        values: "order" counts the categories in the order of their ids, from 1 where 0 is background, else from 0;
            "ids" takes the ids themselves, and values between them become classes called "unused N".
        uncovered: "background" makes pixels without an object class 0, "ignore" makes them 255.
        crowds: what crowd regions become where no object lies on them.
        order: see `DrawingRule`.

    Raises:
        ConfigError: the values do not fit into 0 to 254 or meet the background's, or a category is called background
            beside the background.
    """
    with_background = uncovered == "background"
    if values == "ids":
        numbers = categories.raw_ids
    else:
        numbers = tuple(range(with_background, len(categories) + with_background))
    if crowds == "background" and not with_background:
        raise ConfigError("--crowds background needs --uncovered background; without it there is no such class.")
    if with_background and 0 in numbers:
        name = categories.names[numbers.index(0)]
        raise ConfigError(f"category {name!r} has the id 0, the background's value; pass --values order.")
    if min(numbers) < 0 or max(numbers) >= IGNORED_LABEL:
        raise ConfigError(
            f"label pictures hold classes from 0 to {IGNORED_LABEL - 1}, the categories' values go from {min(numbers)} "
            f"to {max(numbers)}; pass --values order, or convert fewer categories."
        )
    names = dict(zip(numbers, categories.names, strict=True))
    if with_background:
        if _BACKGROUND_NAME in categories.names:
            raise ConfigError(
                f"a category is called {_BACKGROUND_NAME!r} already; pass --uncovered ignore, or rename the category."
            )
        names[0] = _BACKGROUND_NAME
    used = range(min(names), max(names) + 1)
    label_map = LabelMap(tuple(names.get(value, f"unused {value}") for value in used), tuple(used))
    outside = 0 if with_background else IGNORED_LABEL
    crowd = {"ignore": IGNORED_LABEL, "background": 0, "class": None}[crowds]
    return DrawingRule(label_map, numbers, outside, crowd, order)


def draw_label(
    table: AnnotationTable, rows: np.ndarray, size_hw: tuple[int, int], rule: DrawingRule
) -> tuple[np.ndarray, int]:
    """Draws the objects of one image over each other.

    Args:
        table: annotations of the COCO file.
        rows: (N,) numbers of those of the image.
        size_hw: (height, width) of the image.
        rule: what pixels become.

    Returns:
        (H, W) uint8 values, and how many pixels more than one object claims.
    """
    runs = {row: table.run_lengths(row, size_hw) for row in rows.tolist()}
    areas = {row: int(counts[1::2].sum()) * (rule.order == "area") for row, counts in runs.items()}
    label = np.full(size_hw, rule.uncovered, np.uint8)
    claims = np.zeros(size_hw, np.uint16)
    # What is drawn later is seen: crowd regions lie below all objects, equally large ones stay in the file's order.
    for row in sorted(runs, key=lambda row: (not table.is_crowd[row], -areas[row], row)):
        crop, (left, top) = crop_of_run_lengths(runs[row], size_hw[0])
        window = slice(top, top + crop.shape[0]), slice(left, left + crop.shape[1])
        if table.is_crowd[row] and rule.crowd is not None:
            label[window][crop == 1] = rule.crowd
        else:
            label[window][crop == 1] = rule.values[table.labels[row]]
        if not table.is_crowd[row]:
            claims[window] += crop
    return label, int((claims > 1).sum())


def read_coco_labels(
    annotation_file: Path,
    image_folder: Path,
    make_rule: Callable[[LabelMap], DrawingRule],
    findings: Findings,
    report: Callable[[int, int], None] | None = None,
) -> tuple[LabelMap, Iterator[ConvertedLabel]]:
    """Reads a COCO file as label pictures; folders in its file names become part of the names.

    Args:
        annotation_file: COCO JSON.
        image_folder: folder that its file names start from.
        make_rule: from its categories to what pixels become.
        findings: takes faults and notes.
        report: called as `report(done, in_all)`.

    Returns:
        (classes of the label pictures, the images in file order).

    Raises:
        AnnotationError: the file as a whole cannot be used.
        ConfigError: the categories do not fit the rule.
    """
    content = read_annotations(annotation_file, image_folder)
    findings.faults += content.faults
    rule = make_rule(content.label_map)
    return rule.label_map, _drawn(content, image_folder, rule, findings, report)


def _drawn(
    content: CocoContent,
    image_folder: Path,
    rule: DrawingRule,
    findings: Findings,
    report: Callable[[int, int], None] | None,
) -> Iterator[ConvertedLabel]:
    of_image = content.table.image_rows
    order = np.argsort(of_image, kind="stable")
    starts = np.searchsorted(of_image[order], np.arange(len(content.images.ids) + 1))
    taken: dict[str, str] = {}
    for row, name in enumerate(content.images.file_names):
        flat = name.replace("\\", "/").replace("/", "_")
        stem = PurePosixPath(flat).stem
        height, width = content.images.sizes_hw[row].tolist()
        with findings.collected():
            require_size(image_folder / name, (height, width))
            if stem in taken:
                raise DataError(f"images {taken[stem]!r} and {name!r} would have the same label picture. Rename one.")
            taken[stem] = name
            label, overlap = draw_label(content.table, order[starts[row] : starts[row + 1]], (height, width), rule)
            if overlap:
                findings.notes["pixels that more than one object claims"] += overlap
            yield ConvertedLabel(image_folder / name, flat, label)
        if report is not None:
            report(row + 1, len(content.images.file_names))
