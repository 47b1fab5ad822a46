"""What the data check reads out of single values of a COCO file, whatever stands there: the value, or why not."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swin_dense.datasets.check_findings import shown
from swin_dense.datasets.coco_json import is_id
from swin_dense.datasets.segmentations import crop_of_run_lengths, parse_run_lengths, polygon_run_lengths
from swin_dense.errors import AnnotationError


def read_id(value: object) -> int | None:
    """Reads an id: a whole number of 64 bits, or None."""
    return value if isinstance(value, int) and is_id(value) else None


def id_for_report(value: object) -> int | str | None:
    """An id as it is; anything else as short text."""
    return None if value is None else shown(value) if (found := read_id(value)) is None else found


def read_box(value: object) -> tuple[list[float] | None, str]:
    """Reads a bbox.

    Returns:
        ([x, y, width, height] or None, why it is not usable).
    """
    if not isinstance(value, list) or len(value) != 4:
        return None, f"bbox must be four numbers x, y, width, height, got {shown(value)}"
    try:
        box = array("d", value).tolist()
    except (TypeError, OverflowError):
        return None, f"bbox must hold numbers only, got {shown(value)}"
    if not all(map(math.isfinite, box)):
        return None, f"bbox {shown(value)} is not finite"
    if box[2] < 0 or box[3] < 0:
        return None, f"bbox {shown(value)}: width and height must not be negative"
    return box, ""


def read_area(value: object) -> float | None:
    """Reads an area: a finite number that is not negative, or None."""
    try:
        area = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return area if math.isfinite(area) and area >= 0 else None


@dataclass
class Segmentation:
    """What is usable in the segmentation of one annotation, and what is not.

    Attributes:
        polygons: Each x and y in turn, three points or more, finite and near the image.
        runs: Run lengths that fill the image; None where it has polygons or nothing usable.
        faults: (kind of finding, reason).
    """

    polygons: list[array] = field(default_factory=list)
    runs: np.ndarray | None = None
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        """Whether a mask can be drawn."""
        return bool(self.polygons) or self.runs is not None

    def run_lengths(self, size_hw: tuple[int, int]) -> np.ndarray:
        """Run lengths (R,) of the mask in an image of this (height, width)."""
        if self.runs is not None:
            return self.runs
        return polygon_run_lengths([np.frombuffer(polygon) for polygon in self.polygons], size_hw)


def read_segmentation(value: object, size_hw: tuple[int, int]) -> Segmentation:
    """Reads whatever stands under "segmentation".

    Args:
        value: Any JSON value.
        size_hw: (height, width) of the image.
    """
    if isinstance(value, dict):
        try:
            return Segmentation(runs=parse_run_lengths(value, size_hw))
        except AnnotationError as error:
            is_size = isinstance(value.get("size"), list) and value["size"] != list(size_hw)
            return Segmentation(faults=[("rle-size" if is_size else "rle-invalid", str(error))])
    if not isinstance(value, list) or not value:
        return Segmentation(faults=[("segmentation-missing", f"segmentation is {shown(value)}")])
    found = Segmentation()
    if isinstance(value[0], int | float):
        found.faults.append(("polygon-unnested", f"segmentation is one flat list of {len(value)} numbers"))
        value = [value]
    for number, numbers in enumerate(value):
        polygon, fault = _read_polygon(numbers, size_hw)
        if polygon is not None:
            found.polygons.append(polygon)
        else:
            found.faults.append((fault[0], f"polygon {number}: {fault[1]}"))
    return found


def segmentation_of(annotation: dict[str, Any], size_hw: tuple[int, int]) -> Segmentation:
    """Reads the segmentation of an annotation; a region to ignore may have a box alone, as the loader takes it.

    Args:
        annotation: Any JSON object.
        size_hw: (height, width) of the image.
    """
    value = annotation.get("segmentation")
    if value or annotation.get("ignore") not in (1,):
        return read_segmentation(value, size_hw)
    box, _ = read_box(annotation.get("bbox"))
    if box is None:
        return Segmentation(faults=[("segmentation-missing", "a region to ignore needs a segmentation or a bbox")])
    x, y, w, h = box
    left, right = (min(max(side, 0), size_hw[1]) for side in (x, x + w))
    top, bottom = (min(max(side, 0), size_hw[0]) for side in (y, y + h))
    return Segmentation(polygons=[array("d", [left, top, right, top, right, bottom, left, bottom])])


def mask_box(runs: np.ndarray, height: int) -> np.ndarray:
    """The box (4,) x1, y1, x2, y2 of a mask in run lengths, in pixels; NaN where it has none."""
    mask, (left, top) = crop_of_run_lengths(runs, height)
    return np.array([left, top, left + mask.shape[1], top + mask.shape[0]] if mask.size else [math.nan] * 4, float)


def _read_polygon(value: object, size_hw: tuple[int, int]) -> tuple[array | None, tuple[str, str]]:
    if not isinstance(value, list):
        return None, ("polygon-invalid", f"wanted a list of numbers, got {shown(value)}")
    try:
        polygon = array("d", value)
    except (TypeError, OverflowError):
        return None, ("polygon-invalid", f"holds something else than numbers: {shown(value)}")
    if len(polygon) < 6 or len(polygon) % 2:
        return None, ("polygon-short", f"wanted x and y of at least 3 points, got {len(polygon)} numbers")
    for side, numbers in ((size_hw[1], polygon[0::2]), (size_hw[0], polygon[1::2])):
        # Written so that NaN fails too: it is in no range. min and max alone can pass it by.
        if not (math.isfinite(sum(numbers)) and -side <= min(numbers) and max(numbers) <= 2 * side):
            where = f"the image of height {size_hw[0]} and width {size_hw[1]}"
            return None, ("polygon-invalid", f"a coordinate is not finite or far outside {where}: {shown(value)}")
    return polygon, ("", "")
