"""What the data check says about the annotations of a COCO file: every fault of every entry, not the first alone."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_dense.datasets.check_findings import Finding, shown
from swin_dense.datasets.check_geometry import MAX_CORNERS, PolygonMeasurer, PolygonMeasures, paired_iou
from swin_dense.datasets.check_values import (
    Segmentation,
    id_for_report,
    mask_box,
    read_area,
    read_box,
    read_id,
    segmentation_of,
)

# As the loader has them: what it takes as rounding, and as the same box.
_ROUNDING_PX = 0.01
_SAME_BOX_PX = 2.0
_HABIT_SHARE = 0.05
_LEAST_IOU = 0.5
# Areas of annotation tools differ by half a pixel around the edge and where polygons overlap.
_AREA_SHARE = 0.3
_AREA_PX = 20.0
# A thinner shape may fall between the centres of pixels.
_THIN_PX = 1.5
_TOLD_EVERY = 2000


@dataclass
class AnnotationFacts:
    """The annotations of images of known size, one in each row, as far as they could be read.

    Attributes:
        used_rows: (U,) position of the image of each annotation that has one, of whatever size.
        used_labels: (U,) their class indices, -1 for an unknown category.
        positions: (A,) where each stands in the file.
        image_rows: (A,) position of its image in the file.
        labels: (A,) class index, -1 for an unknown category.
        is_crowd: (A,) bool, a crowd or a region to ignore.
        areas: (A,) in square pixels, those of the file before those of the segmentation; NaN where there is neither.
        boxes_xyxy: (A, 4) as in the file; NaN where there is none.
        extents_xyxy: (A, 4) box of the segmentation, clipped to the image; NaN where there is none.
    """

    used_rows: np.ndarray
    used_labels: np.ndarray
    positions: np.ndarray
    image_rows: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray
    boxes_xyxy: np.ndarray
    extents_xyxy: np.ndarray


class AnnotationChecker:
    """Checks the annotations of one file.

    Args:
        split: Name of the split.
        file: The annotation file, for the findings.
        row_of_image: Image id -> position of the image in the file.
        sizes_hw: (height, width) of the image at each position; None where nothing tells it.
        index_of_category: Category id -> class index.

    Attributes:
        findings: What was found.
    """

    def __init__(
        self,
        split: str,
        file: str,
        row_of_image: dict[int, int],
        sizes_hw: list[tuple[int, int] | None],
        index_of_category: dict[int, int],
    ) -> None:
        self._split = split
        self._file = file
        self._row_of_image = row_of_image
        self._sizes_hw = sizes_hw
        self._index_of_category = index_of_category
        self._annotations: list[Any] = []
        self._habits: dict[str, list[int]] = {"crowd-missing": [], "area-missing": [], "box-missing": []}
        self.findings: list[Finding] = []

    def check(
        self, annotations: list[Any], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> AnnotationFacts:
        """Checks all annotations of the file; `progress` is told how many are done, of how many."""
        self._annotations = annotations
        columns = _Columns()
        for position, annotation in enumerate(annotations):
            if position % _TOLD_EVERY == 0:
                progress(position, len(annotations))
            if isinstance(annotation, dict):
                self._check_one(position, annotation, columns)
            else:
                self._add("annotation-invalid", position, f"wanted a JSON object, got {shown(annotation)}")
        self._check_ids()
        for (kind, positions), name in zip(self._habits.items(), ("iscrowd", "area", "bbox"), strict=True):
            if positions:
                self._add(kind, positions[0], f"{name} is missing or null", len(positions))
        with np.errstate(over="ignore", invalid="ignore"):  # boxes may hold any finite number
            facts = self._check_geometry(columns)
        self._check_repeated(facts)
        progress(len(annotations), len(annotations))
        return facts

    def _check_one(self, position: int, annotation: dict[str, Any], columns: _Columns) -> None:
        if read_id(annotation.get("id")) is None:
            self._add(
                "annotation-id-invalid", position, f"id must be a whole number, got {shown(annotation.get('id'))}"
            )
        category_id, image_id = read_id(annotation.get("category_id")), read_id(annotation.get("image_id"))
        label = -1 if category_id is None else self._index_of_category.get(category_id, -1)
        if label < 0:
            known = shown(list(self._index_of_category))
            text = f"category_id {shown(annotation.get('category_id'))} is not among the categories {known}"
            self._add("annotation-category-unknown", position, text)
        row = None if image_id is None else self._row_of_image.get(image_id)
        if row is None:
            text = f"image_id {shown(annotation.get('image_id'))} is not among the images of the file"
            self._add("annotation-image-unknown", position, text)
        crowd = self._check_crowd(position, annotation)
        area = self._check_area(position, annotation.get("area"))
        box = self._check_box(position, annotation.get("bbox"))
        size_hw = None if row is None else self._sizes_hw[row]
        if row is not None:
            columns.uses.extend((row, label))
        if row is None or size_hw is None:
            return
        segmentation = segmentation_of(annotation, size_hw)
        for kind, reason in segmentation.faults:
            self._add(kind, position, reason)
        columns.append(position, row, label, crowd, area, box, size_hw, segmentation)

    def _check_crowd(self, position: int, annotation: dict[str, Any]) -> bool:
        value, ignore = annotation.get("iscrowd"), annotation.get("ignore", 0)
        if ignore not in (0, 1):
            self._add("ignore-invalid", position, f"ignore must be 0 or 1, got {shown(ignore)}")
        if value is None:
            self._habits["crowd-missing"].append(position)
        elif value not in (0, 1):
            self._add("crowd-invalid", position, f"iscrowd must be 0 or 1, got {shown(value)}")
        return value in (1,) or ignore in (1,)

    def _check_area(self, position: int, value: object) -> float:
        area = read_area(value)
        if value is None:
            self._habits["area-missing"].append(position)
        elif area is None:
            self._add("area-invalid", position, f"area must be a finite number, not negative, got {shown(value)}")
        return math.nan if area is None else area

    def _check_box(self, position: int, value: object) -> list[float]:
        if value is None:
            self._habits["box-missing"].append(position)
            return [math.nan] * 4
        box, fault = read_box(value)
        if box is None:
            self._add("box-invalid", position, fault)
        return [math.nan] * 4 if box is None else box

    def _check_ids(self) -> None:
        seen: set[int] = set()
        for position, annotation in enumerate(self._annotations):
            annotation_id = read_id(annotation.get("id")) if isinstance(annotation, dict) else None
            if annotation_id is None:
                continue
            if annotation_id in seen:
                self._add("annotation-id-repeated", position, f"id {annotation_id} stands for another one already")
            elif annotation_id == 0:
                self._add("annotation-id-zero", position, "id is 0; COCO counts from 1")
            seen.add(annotation_id)

    def _check_geometry(self, columns: _Columns) -> AnnotationFacts:
        table = columns.table()
        sizes_wh = table.sizes_hw[:, ::-1]
        boxes = np.concatenate([table.boxes_xywh[:, :2], table.boxes_xywh[:, :2] + table.boxes_xywh[:, 2:]], axis=1)
        extents = self._check_polygons(table)
        limits = np.concatenate([sizes_wh, sizes_wh], axis=1)
        inside = np.clip(extents, 0, limits)
        used = np.array(columns.uses, np.int64).reshape(-1, 2)
        facts = AnnotationFacts(
            used[:, 0],
            used[:, 1],
            table.positions,
            table.image_rows,
            table.labels,
            table.is_crowd,
            table.areas.copy(),
            boxes,
            inside,
        )
        self._check_boxes(facts, table.boxes_xywh, sizes_wh)
        missing = np.isnan(table.areas)
        facts.areas[missing] = table.mask_areas[missing]
        return facts

    def _check_boxes(self, facts: AnnotationFacts, as_written: np.ndarray, sizes_wh: np.ndarray) -> None:
        low, high, extents = facts.boxes_xyxy[:, :2], facts.boxes_xyxy[:, 2:], facts.extents_xyxy
        is_box = as_written[:, 2:].min(axis=1) > 0
        outside = is_box & ((high <= 0) | (low >= sizes_wh)).any(axis=1)
        # Written so that NaN, a box that is not there, is in none of these.
        too_small = ((np.minimum(high, sizes_wh) - np.maximum(low, 0)) < 1).any(axis=1) & ~outside
        over = ((low < -_ROUNDING_PX) | (high > sizes_wh + _ROUNDING_PX)).any(axis=1) & ~outside & ~too_small
        clipped = np.clip(facts.boxes_xyxy, 0, np.concatenate([sizes_wh, sizes_wh], axis=1))
        fits = np.abs(facts.boxes_xyxy - extents).max(axis=1) <= _SAME_BOX_PX
        xyxy = _habit((np.abs(as_written - extents).max(axis=1) <= _SAME_BOX_PX) & ~fits)
        shares = _habit((low.min(axis=1) >= 0) & (high.max(axis=1) <= 1 + _ROUNDING_PX) & is_box)
        # What is wrong as a whole is not told again of each box.
        single = ~(xyxy | shares)
        loose = (np.abs(clipped - extents) > _SAME_BOX_PX).any(axis=1) & ~outside & single
        self._draw_extents(np.flatnonzero(loose & (paired_iou(clipped, extents) < _LEAST_IOU)), facts, sizes_wh)
        loose &= (np.abs(clipped - extents) > _SAME_BOX_PX).any(axis=1)
        off = loose & (paired_iou(clipped, extents) < _LEAST_IOU)
        for kind, rows in (
            ("box-outside", outside & single),
            ("box-normalised", shares),
            ("box-degenerate", too_small & loose),
            ("box-thin", too_small & ~loose & single),
            ("box-partly-outside", over & single),
            ("box-xyxy", xyxy),
            ("box-off-mask", off & ~too_small),
            ("box-loose", loose & ~off & ~too_small),
        ):
            for row in np.flatnonzero(rows):
                width, height = sizes_wh[row]
                text = f"bbox {_numbers(as_written[row])} in an image of width {width:g} and height {height:g}"
                if kind in ("box-xyxy", "box-degenerate", "box-off-mask", "box-loose"):
                    x1, y1, x2, y2 = extents[row]
                    of_mask = _numbers((x1, y1, x2 - x1, y2 - y1))
                    text = f"bbox {_numbers(as_written[row])}, its segmentation's is {of_mask}"
                self._add(kind, int(facts.positions[row]), text)

    def _draw_extents(self, rows: np.ndarray, facts: AnnotationFacts, sizes_wh: np.ndarray) -> None:
        """Replaces what the corners of polygons span by the box of their pixels, which is less in a spike."""
        for row in rows:
            width, height = sizes_wh[row].tolist()
            segmentation = segmentation_of(self._annotations[facts.positions[row]], (height, width))
            box = mask_box(segmentation.run_lengths((height, width)), height)
            if not np.isnan(box).any():
                facts.extents_xyxy[row] = box

    def _check_polygons(self, table: _Table) -> np.ndarray:
        """Adds the findings and completes `mask_areas`; returns the extents (A, 4) of segmentations, not clipped."""
        extents, rows, polygons = table.extents_xyxy, table.polygon_rows, table.polygons
        if len(rows):
            starts = np.flatnonzero(np.diff(rows, prepend=-1))
            extents[rows[starts], :2] = np.minimum.reduceat(polygons.extents_xyxy[:, :2], starts)
            extents[rows[starts], 2:] = np.maximum.reduceat(polygons.extents_xyxy[:, 2:], starts)
            table.mask_areas[rows[starts]] = np.add.reduceat(polygons.areas, starts)
        sizes_wh = table.sizes_hw[:, ::-1]
        over = (extents[:, :2] < -_SAME_BOX_PX) | (extents[:, 2:] > sizes_wh + _SAME_BOX_PX)
        for kind, found, text in (
            ("polygon-outside", np.flatnonzero(over.any(axis=1)), "the polygons reach out of the image"),
            ("polygon-crossing", np.unique(rows[polygons.crossing]), "edges of a polygon cross"),
            (
                "polygon-unexamined",
                np.unique(rows[polygons.num_corners > MAX_CORNERS]),
                f"a polygon has over {MAX_CORNERS} points",
            ),
        ):
            for row in found:
                where = f" (they span {_numbers(extents[row])})" if kind == "polygon-outside" else ""
                self._add(kind, int(table.positions[row]), text + where)
        self._check_mask_areas(table, extents)
        return extents

    def _check_mask_areas(self, table: _Table, extents: np.ndarray) -> None:
        """Draws only those whose area may be zero, or seems to differ from the stated one."""
        areas = table.mask_areas
        has_polygons = np.zeros(len(areas), np.bool_)
        has_polygons[table.polygon_rows] = True
        sides = extents[:, 2:] - extents[:, :2]
        outside = ((extents[:, 2:] <= 1) | (extents[:, :2] >= table.sizes_hw[:, ::-1] - 1)).any(axis=1)
        thin = (areas < _THIN_PX * sides.max(axis=1, initial=1)) | outside
        doubtful = has_polygons & (thin | _areas_differ(table.areas, areas))
        for row in np.flatnonzero(doubtful):
            position, (height, width) = int(table.positions[row]), table.sizes_hw[row].tolist()
            segmentation = segmentation_of(self._annotations[position], (height, width))
            areas[row] = segmentation.run_lengths((height, width))[1::2].sum()
        for row in np.flatnonzero(areas == 0):
            self._add("mask-empty", int(table.positions[row]), "the segmentation has no pixel in the image")
        for row in np.flatnonzero(_areas_differ(table.areas, areas) & (areas > 0)):
            text = f"area {table.areas[row]:g}, the segmentation has {areas[row]:g} px"
            self._add("area-differs", int(table.positions[row]), text)

    def _check_repeated(self, facts: AnnotationFacts) -> None:
        with_box = np.flatnonzero(~np.isnan(facts.boxes_xyxy[:, 0]) & ~np.isnan(facts.extents_xyxy[:, 0]))
        keys = np.column_stack([facts.image_rows, facts.labels, facts.boxes_xyxy])[with_box]
        order = np.lexsort(keys.T[::-1])
        same = (np.diff(keys[order], axis=0) == 0).all(axis=1)
        for number in np.flatnonzero(same):
            one, other = (int(facts.positions[with_box[order[number + step]]]) for step in (0, 1))
            if _outline(self._annotations[one]) == _outline(self._annotations[other]):
                text = f"image, category, box and segmentation are those of annotations[{one}]"
                self._add("annotation-repeated", other, text)

    def _add(self, kind: str, position: int, reason: str, count: int = 1) -> None:
        annotation = self._annotations[position]
        known = annotation if isinstance(annotation, dict) else {}
        image_id, annotation_id = id_for_report(known.get("image_id")), id_for_report(known.get("id"))
        entry = ("annotations", position)
        self.findings.append(
            Finding(kind, self._split, self._file, reason, image_id, annotation_id, entry, count=count)
        )


class _Columns:
    def __init__(self) -> None:
        self.uses = array("q")
        self.integers = array("q")
        self.crowd = array("b")
        self.numbers = array("d")
        self.polygons = PolygonMeasurer()
        self.polygon_rows = array("q")

    def append(
        self,
        position: int,
        image_row: int,
        label: int,
        crowd: bool,
        area: float,
        box: list[float],
        size_hw: tuple[int, int],
        segmentation: Segmentation,
    ) -> None:
        for polygon in segmentation.polygons:
            self.polygons.add(polygon)
            self.polygon_rows.append(len(self.crowd))
        self.integers.extend((position, image_row, label, *size_hw))
        self.crowd.append(crowd)
        mask_area, extent = math.nan, [math.nan] * 4
        if segmentation.runs is not None:
            mask_area = float(segmentation.runs[1::2].sum())
            extent = mask_box(segmentation.runs, size_hw[0]).tolist()
        self.numbers.extend((area, mask_area, *box, *extent))

    def table(self) -> _Table:
        integers = np.array(self.integers, np.int64).reshape(-1, 5)
        numbers = np.array(self.numbers, np.float64).reshape(-1, 10)
        return _Table(
            positions=integers[:, 0],
            image_rows=integers[:, 1],
            labels=integers[:, 2],
            sizes_hw=integers[:, 3:],
            is_crowd=np.array(self.crowd, np.bool_),
            areas=numbers[:, 0],
            mask_areas=numbers[:, 1],
            boxes_xywh=numbers[:, 2:6],
            extents_xyxy=numbers[:, 6:],
            polygons=self.polygons.measures(),
            polygon_rows=np.array(self.polygon_rows, np.int64),
        )


@dataclass
class _Table:
    positions: np.ndarray
    image_rows: np.ndarray
    labels: np.ndarray
    sizes_hw: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray
    mask_areas: np.ndarray
    boxes_xywh: np.ndarray
    extents_xyxy: np.ndarray
    polygons: PolygonMeasures
    polygon_rows: np.ndarray


def _habit(rows: np.ndarray) -> np.ndarray:
    """The rows, where they are so many that the whole file is written so; none where they are few."""
    return rows if rows.sum() > _HABIT_SHARE * len(rows) else np.zeros_like(rows)


def _outline(annotation: dict[str, Any]) -> object:
    segmentation = annotation.get("segmentation")
    return segmentation.get("counts") if isinstance(segmentation, dict) else segmentation


def _areas_differ(stated: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return np.abs(stated - drawn) > _AREA_SHARE * np.maximum(stated, drawn) + _AREA_PX


def _numbers(values: Any) -> str:  # noqa: ANN401 - any sequence of numbers
    return f"[{', '.join(f'{value:.6g}' for value in values)}]"
