"""The annotations of a COCO file, checked once and then kept in flat arrays: small, and shared by worker processes."""

import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.coco_json import CocoImages, collection_paused, is_id, repeated_values
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.outlines import Outline
from swin_dense.datasets.segmentations import crop_of_run_lengths, parse_run_lengths, polygon_run_lengths
from swin_dense.datasets.shared_arrays import SharedArrays
from swin_dense.errors import AnnotationError

_MAX_FAULTS = 100
# Rounded coordinates may stand a little outside without being worth a word.
_TOLERANCE_PX = 0.01
_MATCH_TOLERANCE_PX = 2.0
_BOX_NUMBERS = ("x", "y", "width", "height")


@dataclass
class AnnotationTable(SharedArrays):
    """All annotations of a file; row r of every per-annotation array is one of them, in file order.

    Attributes:
        ids: (A,) int64 as in the file.
        image_rows: (A,) int64, row of its image.
        labels: (A,) int64 class indices.
        is_crowd: (A,) bool, `iscrowd` or `ignore`: a region that takes no part, neither as an object nor as background.
        boxes_xywh: (A, 4) float64 as in the file; from the segmentation where the file has none.
        areas: (A,) float64; NaN where the file has none.
        points: float64, x and y of all polygon corners in turn.
        polygon_ends: (P,) int64, where each polygon ends in `points`.
        polygon_counts: (A,) int64, polygons of each annotation; 0 where it has run lengths.
        runs: uint32, run lengths of all annotations that have them.
        run_ends: (A,) int64, where each annotation's run lengths end in `runs`.
    """

    ids: np.ndarray
    image_rows: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    points: np.ndarray
    polygon_ends: np.ndarray
    polygon_counts: np.ndarray
    runs: np.ndarray
    run_ends: np.ndarray

    def __post_init__(self) -> None:
        self._polygon_starts = np.concatenate([[0], np.cumsum(self.polygon_counts)])
        self._point_starts = np.concatenate([[0], self.polygon_ends])
        self._run_starts = np.concatenate([[0], self.run_ends])

    def __len__(self) -> int:
        return len(self.ids)

    def polygons(self, row: int) -> list[np.ndarray]:
        """Returns the polygons of an annotation, each (2 P,) x and y in turn; none where it has run lengths."""
        numbers = range(self._polygon_starts[row], self._polygon_starts[row + 1])
        return [self.points[self._point_starts[n] : self._point_starts[n + 1]] for n in numbers]

    def run_lengths(self, row: int, size_hw: tuple[int, int]) -> np.ndarray:
        """Returns the run lengths of an annotation's mask, drawn from its polygons where it has those.

        Args:
            row: number of the annotation.
            size_hw: (height, width) of its image.
        """
        polygons = self.polygons(row)
        if polygons:
            return polygon_run_lengths(polygons, size_hw)
        return self.runs[self._run_starts[row] : self._run_starts[row + 1]]

    def outline(self, row: int) -> Outline:
        """Returns an annotation's polygons or run lengths as they are, without a copy."""
        return Outline(tuple(self.polygons(row)), self.runs[self._run_starts[row] : self._run_starts[row + 1]])

    def polygon_extents(self) -> np.ndarray:
        """Returns (A, 4) x1, y1, x2, y2 around the polygons of each annotation; NaN where it has run lengths."""
        extents = np.full((len(self), 4), np.nan)
        has_polygons = self.polygon_counts > 0
        if has_polygons.any():
            points = self.points.reshape(-1, 2)
            first = self._point_starts[self._polygon_starts[:-1][has_polygons]] // 2
            extents[has_polygons, :2] = np.minimum.reduceat(points, first)
            extents[has_polygons, 2:] = np.maximum.reduceat(points, first)
        return extents


class AnnotationReader:
    """Reads and checks the annotations of one file, and keeps count of what it met.

    Args:
        path: the annotation file, for messages.
        images: its images.
        label_map: its categories.

    Attributes:
        faults: messages, at most 100, of annotations that cannot be used.
        findings: counts of what is unusual but usable, for a one-line notice.
    """

    def __init__(self, path: str | Path, images: CocoImages, label_map: LabelMap) -> None:
        self._path = path
        self._images = images
        self._row_of_image = {image_id: row for row, image_id in enumerate(images.ids.tolist())}
        self._sizes_hw: list[list[int]] = images.sizes_hw.tolist()
        self._index_of_category = {raw_id: index for index, raw_id in enumerate(label_map.raw_ids)}
        self.faults: list[str] = []
        self.findings: dict[str, int] = {}

    def read(self, annotations: list[Any]) -> AnnotationTable:
        """Reads all annotations; those with a fault are left out and told in `faults`."""
        with collection_paused():
            table = self._read_all(annotations)
        repeated = repeated_values(table.ids)
        if repeated:
            self._add_fault("annotations", f"every id must be there once, repeated are {repeated}. Renumber them.")
        if (table.ids == 0).any():
            self.findings["annotation ids from 0 (renumbered for evaluation)"] = 1
        self._check_geometry(table)
        return table

    def _read_all(self, annotations: list[Any]) -> AnnotationTable:
        columns = _Columns()
        for position, annotation in enumerate(annotations):
            try:
                self._read_one(annotation, columns)
            except AnnotationError as error:
                self._add_fault(self._describe(annotation, position), str(error))
        return columns.table()

    def _read_one(self, annotation: Any, columns: "_Columns") -> None:  # noqa: ANN401 - whatever the JSON holds
        if not isinstance(annotation, dict):
            raise AnnotationError(f"wanted an object with id, image_id and category_id, got {annotation!r}")
        for field in ("id", "image_id", "category_id"):
            if not is_id(annotation.get(field)):
                raise AnnotationError(f"{field} must be a whole number, got {_shorten(annotation.get(field))}")
        image_row = self._row_of_image.get(annotation["image_id"])
        if image_row is None:
            raise AnnotationError(f"image_id {annotation['image_id']} is not among the images of the file")
        label = self._index_of_category.get(annotation["category_id"])
        if label is None:
            raise AnnotationError(
                f"category_id {annotation['category_id']} is not among the categories "
                f"{_shorten(list(self._index_of_category))}"
            )
        height, width = self._sizes_hw[image_row]
        box = self._parse_box(annotation.get("bbox"))
        crowd = self._parse_crowd(annotation.get("iscrowd"))
        ignore = _parse_flag("ignore", annotation.get("ignore", 0))
        segmentation = annotation.get("segmentation")
        if ignore and not segmentation:
            polygons, runs = [_corners(box, (height, width))], None
        else:
            polygons, runs = parse_segmentation(segmentation, (height, width))
        area = self._parse_area(annotation.get("area"))
        columns.append((annotation["id"], image_row, label), crowd or ignore, box, area, polygons, runs)

    def _parse_box(self, value: object) -> array:
        if value is None:
            self._count("boxes missing (taken from the segmentation)")
            return array("d", [math.nan] * 4)
        box = _numbers("bbox", value)
        if len(box) != 4:
            raise AnnotationError(f"bbox must be four numbers x, y, width, height, got {_shorten(value)}")
        if not all(map(math.isfinite, box)):
            name = next(name for name, number in zip(_BOX_NUMBERS, box, strict=True) if not math.isfinite(number))
            raise AnnotationError(f"bbox {_shorten(value)}: {name} is not finite")
        if box[2] < 0 or box[3] < 0:
            raise AnnotationError(f"bbox {_shorten(value)}: width and height must not be negative")
        return box

    def _parse_crowd(self, value: object) -> bool:
        if value is None:
            self._count("iscrowd missing (taken as 0)")
            return False
        return _parse_flag("iscrowd", value)

    def _parse_area(self, value: object) -> float:
        if value is None:
            self._count("areas missing (taken from the segmentation)")
            return math.nan
        area = _numbers("area", [value])[0]
        if not math.isfinite(area) or area < 0:
            raise AnnotationError(f"area must be a finite number, not negative, got {_shorten(value)}")
        return area

    def _check_geometry(self, table: AnnotationTable) -> None:
        sizes_wh = self._images.sizes_hw[table.image_rows][:, ::-1].astype(np.float64)
        extents = table.polygon_extents()
        self._fill_missing_boxes(table, extents)
        low = table.boxes_xywh[:, :2]
        high = low + table.boxes_xywh[:, 2:]
        is_box = (table.boxes_xywh[:, 2:] > 0).all(axis=1)
        outside = is_box & ((high <= 0) | (low >= sizes_wh)).any(axis=1)
        for row in np.flatnonzero(outside):
            width, height = sizes_wh[row]
            text = (
                f"bbox {table.boxes_xywh[row].tolist()} lies outside the image of width {width:g} and height {height:g}"
            )
            self._add_row_fault(table, int(row), text)
        self._check_box_format(table, extents)
        overlap = np.minimum(high, sizes_wh) - np.maximum(low, 0)
        too_small = (overlap < 1).any(axis=1)
        clipped = ((low < -_TOLERANCE_PX) | (high > sizes_wh + _TOLERANCE_PX)).any(axis=1)
        self._count("boxes under 1 px (not trained on)", int((too_small & ~outside).sum()))
        self._count("boxes partly outside (clipped)", int((clipped & ~outside & ~too_small).sum()))

    def _fill_missing_boxes(self, table: AnnotationTable, extents: np.ndarray) -> None:
        for row in np.flatnonzero(np.isnan(table.boxes_xywh[:, 0])):
            size_hw = tuple(self._images.sizes_hw[table.image_rows[row]].tolist())
            box = extents[row]
            if np.isnan(box[0]):
                mask, (left, top) = crop_of_run_lengths(table.run_lengths(int(row), size_hw), size_hw[0])
                box = np.array([left, top, left + mask.shape[1], top + mask.shape[0]], float)
            low = np.clip(box[:2], 0, size_hw[::-1])
            table.boxes_xywh[row] = np.concatenate([low, np.clip(box[2:], low, size_hw[::-1]) - low])

    def _check_box_format(self, table: AnnotationTable, extents: np.ndarray) -> None:
        as_xyxy = table.boxes_xywh
        as_xywh = np.concatenate([as_xyxy[:, :2], as_xyxy[:, :2] + as_xyxy[:, 2:]], axis=1)
        right = (np.abs(as_xywh - extents) <= _MATCH_TOLERANCE_PX).all(axis=1)
        wrong = (np.abs(as_xyxy - extents) <= _MATCH_TOLERANCE_PX).all(axis=1) & ~right
        if wrong.sum() > 0.05 * len(table):
            row = int(np.flatnonzero(wrong)[0])
            text = (
                f"bbox {as_xyxy[row].tolist()} fits its segmentation only as x1, y1, x2, y2, and so do "
                f"{int(wrong.sum())} of {len(table)}; COCO wants x, y, width, height"
            )
            self._add_row_fault(table, row, text)
        differs = ~right & ~np.isnan(extents[:, 0])
        self._count("boxes that differ from their segmentation by over 2 px", int(differs.sum()))

    def _count(self, finding: str, number: int = 1) -> None:
        if number:
            self.findings[finding] = self.findings.get(finding, 0) + number

    def _add_row_fault(self, table: AnnotationTable, row: int, text: str) -> None:
        image_row = table.image_rows[row]
        self._add_fault(self._name(int(table.ids[row]), int(self._images.ids[image_row])), text)

    def _add_fault(self, where: str, text: str) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(f"{self._path}: {where}: {text.rstrip('.')}. Correct the entry or remove it.")

    def _describe(self, annotation: Any, position: int) -> str:  # noqa: ANN401 - whatever the JSON holds
        if not isinstance(annotation, dict) or "id" not in annotation:
            return f"annotations[{position}]"
        return self._name(annotation["id"], annotation.get("image_id"))

    def _name(self, annotation_id: object, image_id: object) -> str:
        row = self._row_of_image.get(image_id) if isinstance(image_id, int) else None
        file_name = "" if row is None else f' "{self._images.file_names[row]}"'
        return f"annotation id={annotation_id!r} (image id={image_id!r}{file_name})"


class _Columns:
    def __init__(self) -> None:
        self.integers = array("q")
        self.crowd = array("b")
        self.boxes = array("d")
        self.areas = array("d")
        self.points = array("d")
        self.polygon_ends = array("q")
        self.polygon_counts = array("q")
        self.runs: list[np.ndarray] = []
        self.run_ends = array("q")
        self._num_runs = 0

    def append(
        self,
        integers: tuple[int, int, int],
        crowd: bool,
        box: array,
        area: float,
        polygons: list[array],
        runs: np.ndarray | None,
    ) -> None:
        self.integers.extend(integers)
        self.crowd.append(crowd)
        self.boxes.extend(box)
        self.areas.append(area)
        for polygon in polygons:
            self.points.extend(polygon)
            self.polygon_ends.append(len(self.points))
        self.polygon_counts.append(len(polygons))
        if runs is not None:
            self.runs.append(runs)
            self._num_runs += len(runs)
        self.run_ends.append(self._num_runs)

    def table(self) -> AnnotationTable:
        integers = np.array(self.integers, np.int64).reshape(-1, 3)
        return AnnotationTable(
            ids=integers[:, 0].copy(),
            image_rows=integers[:, 1].copy(),
            labels=integers[:, 2].copy(),
            is_crowd=np.array(self.crowd, np.bool_),
            boxes_xywh=np.array(self.boxes, np.float64).reshape(-1, 4),
            areas=np.array(self.areas, np.float64),
            points=np.array(self.points, np.float64),
            polygon_ends=np.array(self.polygon_ends, np.int64),
            polygon_counts=np.array(self.polygon_counts, np.int64),
            runs=np.concatenate([np.zeros(0, np.uint32), *self.runs]),
            run_ends=np.array(self.run_ends, np.int64),
        )


def _parse_flag(field: str, value: object) -> bool:
    if value not in (0, 1):
        raise AnnotationError(f"{field} must be 0 or 1, got {_shorten(value)}")
    return bool(value)


def _corners(box_xywh: array, size_hw: tuple[int, int]) -> array:
    """An ignored box as a polygon, cut off at the image's border: it may be drawn to reach far beyond."""
    x, y, width, height = box_xywh
    if math.isnan(x):
        raise AnnotationError("an annotation with ignore needs a segmentation or a bbox, got neither")
    left, right = (min(max(side, 0), size_hw[1]) for side in (x, x + width))
    top, bottom = (min(max(side, 0), size_hw[0]) for side in (y, y + height))
    return array("d", [left, top, right, top, right, bottom, left, bottom])


def parse_segmentation(value: object, size_hw: tuple[int, int]) -> tuple[list[array], np.ndarray | None]:
    """Reads and checks the segmentation of an annotation.

    Args:
        value: whatever the JSON holds.
        size_hw: (height, width) of the image.

    Returns:
        its polygons, x and y in turn, and None; or no polygons, and its run lengths.

    Raises:
        AnnotationError: it is neither, or its numbers do not fit the image; the message has no file or id.
    """
    if isinstance(value, dict):
        return [], parse_run_lengths(value, size_hw)
    if not isinstance(value, list) or not value:
        raise AnnotationError(
            f"segmentation must be polygons or run lengths, got {_shorten(value)}; this model learns masks"
        )
    # One polygon without its outer list is a common slip, and cannot mean anything else.
    polygons = [value] if isinstance(value[0], int | float) else value
    return [_parse_polygon(polygon, size_hw) for polygon in polygons], None


def _parse_polygon(value: Any, size_hw: tuple[int, int]) -> array:  # noqa: ANN401 - whatever the JSON holds
    polygon = _numbers("segmentation", value)
    if len(polygon) < 6 or len(polygon) % 2:
        raise AnnotationError(
            f"segmentation: a polygon is x and y in turn of at least 3 points, got {len(polygon)} numbers"
        )
    for side, numbers in ((size_hw[1], value[0::2]), (size_hw[0], value[1::2])):
        # Written so that NaN fails too: it is in no range. min and max alone can pass it by.
        if not (-side <= min(numbers) and max(numbers) <= 2 * side and math.isfinite(sum(numbers))):
            raise AnnotationError(
                f"segmentation: polygon {_shorten(value)} has a coordinate that is not finite or far outside the "
                f"image of height {size_hw[0]} and width {size_hw[1]}"
            )
    return polygon


def _numbers(field: str, value: object) -> array:
    if not isinstance(value, list):
        raise AnnotationError(f"{field} must be a list of numbers, got {_shorten(value)}")
    try:
        return array("d", value)
    except (TypeError, OverflowError):
        raise AnnotationError(f"{field} must hold numbers only, got {_shorten(value)}") from None


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
