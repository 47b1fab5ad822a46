"""What is known of detections and objects beside their scores: enough to say why a score is 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

HALF = 0.5
"""The least overlap that any of COCO's scores asks for."""

# Sides of boxes are counted in quarters of a doubling, from a sixteenth of a pixel to 2^16 pixels.
_STEPS_TO_DOUBLE = 4
_LEAST_SIDE_LOG2 = -4
_NUM_SIDES = 20 * _STEPS_TO_DOUBLE


def corner_and_size(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) x, y, width, height to x1, y1, x2, y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _centre_and_size(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _rows_first(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, [1, 0, 3, 2]]


AS_GIVEN = "x1, y1, x2, y2 in pixels"

_FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x1, y1, x2, y2": np.asarray,
    "x, y, width, height": corner_and_size,
    "centre x, centre y, width, height": _centre_and_size,
    "y1, x1, y2, x2": _rows_first,
}
# The (width, height) that numbers are fractions of.
_UNITS: dict[str, Callable[[tuple[int, int]], tuple[int, int]]] = {
    "in pixels": lambda size_hw: (1, 1),
    "in fractions of the image's width and height": lambda size_hw: (size_hw[1], size_hw[0]),
}
_READINGS = {f"{form} {unit}": (_FORMS[form], _UNITS[unit]) for unit in _UNITS for form in _FORMS}


# What two processes counted adds up.
_COUNTS = (
    "num_images",
    "images_without_detections",
    "num_detections",
    "not_finite",
    "beyond_image",
    "in_ignored_regions",
    "num_ignored_regions",
    "detections_of_class",
    "objects_of_class",
    "sides",
)


@dataclass(eq=False)
class InstanceFacts:
    """What is known of detections and objects when scores are to be explained; memory does not grow with images.

    Fill it image by image with `add`. What a reader of a results file leaves out, because it has no place in the
    annotations, goes into the two sets of unknown ids.

    Attributes:
        label_map: the classes, by index.
        num_images: images added.
        images_without_detections: of these.
        num_detections: in all images.
        not_finite: detections whose score or box is not finite; they count nowhere below.
        lowest_score, highest_score: of all detections; inf and -inf without any.
        beyond_image: detections that reach more than a pixel beyond their image.
        in_ignored_regions: detections that lie by half in an ignored region of their class and on no object of it.
        num_ignored_regions: in all images.
        covered: {how boxes may be written: objects that some detection overlaps by half, if they are read that way};
            other ways than `AS_GIVEN` are tried in images where, as given, no object is covered.
        covered_by_shift: {-1, 0, 1: objects that a detection of their class index plus this overlaps by half}.
        detections_of_class, objects_of_class: (K,) int64.
        best_iou_of_class: (K,) the largest overlap with an object of the detection's class.
        sides: (2, 80) int64, how many detections and objects have which side, the root of their boxes' area.
        unknown_image_ids, unknown_category_ids: ids of results that the annotations do not have.
    """

    label_map: LabelMap
    num_images: int = 0
    images_without_detections: int = 0
    num_detections: int = 0
    not_finite: int = 0
    lowest_score: float = np.inf
    highest_score: float = -np.inf
    beyond_image: int = 0
    in_ignored_regions: int = 0
    num_ignored_regions: int = 0
    covered: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_READINGS, 0))
    covered_by_shift: dict[int, int] = field(default_factory=lambda: dict.fromkeys((-1, 0, 1), 0))
    unknown_image_ids: set[object] = field(default_factory=set)
    unknown_category_ids: set[object] = field(default_factory=set)
    detections_of_class: np.ndarray = field(init=False)
    objects_of_class: np.ndarray = field(init=False)
    best_iou_of_class: np.ndarray = field(init=False)
    sides: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        num_classes = len(self.label_map)
        self.detections_of_class = np.zeros(num_classes, np.int64)
        self.objects_of_class = np.zeros(num_classes, np.int64)
        self.best_iou_of_class = np.zeros(num_classes)
        self.sides = np.zeros((2, _NUM_SIDES), np.int64)

    @property
    def median_sides(self) -> tuple[float, float]:
        """Of detections and of objects, pixels; exact to a tenth. There must be one of each."""
        middles = [np.searchsorted(np.cumsum(counts), counts.sum() / 2) for counts in self.sides]
        detections, objects = (2.0 ** (float(middle) / _STEPS_TO_DOUBLE + _LEAST_SIDE_LOG2) for middle in middles)
        return detections, objects

    @property
    def num_objects(self) -> int:
        """In all images, ignored regions left out."""
        return int(self.objects_of_class.sum())

    def add(
        self,
        boxes_xyxy: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        object_boxes_xyxy: np.ndarray,
        object_labels: np.ndarray,
        ignored: np.ndarray,
        size_hw: tuple[int, int],
    ) -> None:
        """Takes one image.

        Args:
            boxes_xyxy: (D, 4) of the detections, in pixels of the original image as far as is known.
            scores: (D,).
            labels: (D,) class indices.
            object_boxes_xyxy: (G, 4) in pixels of the original image.
            object_labels: (G,) class indices.
            ignored: (G,) bool, whether it is an ignored region.
            size_hw: (height, width) of the image.
        """
        boxes, objects = np.asarray(boxes_xyxy, np.float64), np.asarray(object_boxes_xyxy, np.float64)
        finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        self.num_images += 1
        self.images_without_detections += not len(boxes)
        self.num_detections += len(boxes)
        self.not_finite += int((~finite).sum())
        self.num_ignored_regions += int(ignored.sum())
        boxes, scores, labels = boxes[finite], scores[finite], labels[finite]
        self._add_detections(boxes, scores, labels, size_hw)
        self.in_ignored_regions += _num_excused(boxes, labels, objects, object_labels, ignored)
        objects, object_labels = objects[~ignored], object_labels[~ignored]
        self.objects_of_class += np.bincount(object_labels, minlength=len(self.label_map))
        self.sides[1] += _side_counts(objects)
        self._add_overlaps(boxes, labels, objects, object_labels, size_hw)

    def _add_detections(
        self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, size_hw: tuple[int, int]
    ) -> None:
        height, width = size_hw
        beyond = (boxes < -1).any(axis=1) | (boxes > np.array([width, height] * 2) + 1).any(axis=1)
        self.beyond_image += int(beyond.sum())
        self.lowest_score = min(self.lowest_score, float(scores.min(initial=np.inf)))
        self.highest_score = max(self.highest_score, float(scores.max(initial=-np.inf)))
        self.detections_of_class += np.bincount(labels, minlength=len(self.label_map))
        self.sides[0] += _side_counts(boxes)

    def _add_overlaps(
        self,
        boxes: np.ndarray,
        labels: np.ndarray,
        objects: np.ndarray,
        object_labels: np.ndarray,
        size_hw: tuple[int, int],
    ) -> None:
        ious = _overlaps(boxes, objects)
        shift = labels[:, None] - object_labels
        best_of_own = np.where(shift == 0, ious, 0).max(axis=1, initial=0)
        np.maximum.at(self.best_iou_of_class, labels, best_of_own)
        covers = ious >= HALF
        for each in self.covered_by_shift:
            self.covered_by_shift[each] += _num_covered(covers & (shift == each))
        if covers.any():
            self.covered[AS_GIVEN] += _num_covered(covers)
            return
        for reading, (to_corners, unit_wh) in _READINGS.items():
            boxes_xyxy = to_corners(boxes) * np.tile(unit_wh(size_hw), 2)
            self.covered[reading] += _num_covered(_overlaps(boxes_xyxy, objects) >= HALF)

    def merge(self, other: InstanceFacts) -> None:
        """Adds the facts of other images, as those of another process.

        Raises:
            DataError: The classes differ.
        """
        if self.label_map.names != other.label_map.names:
            raise DataError(f"The classes differ: {self.label_map.names} and {other.label_map.names}.")
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lowest_score = min(self.lowest_score, other.lowest_score)
        self.highest_score = max(self.highest_score, other.highest_score)
        self.best_iou_of_class = np.maximum(self.best_iou_of_class, other.best_iou_of_class)
        for name in ("covered", "covered_by_shift"):
            theirs = getattr(other, name)
            setattr(self, name, {key: count + theirs[key] for key, count in getattr(self, name).items()})
        self.unknown_image_ids |= other.unknown_image_ids
        self.unknown_category_ids |= other.unknown_category_ids


def _num_covered(covers: np.ndarray) -> int:
    """(D, G) bool to the number of objects that any detection covers."""
    return int(covers.any(axis=0).sum())


def _num_excused(
    boxes: np.ndarray, labels: np.ndarray, objects: np.ndarray, object_labels: np.ndarray, ignored: np.ndarray
) -> int:
    """Detections that lie by half in an ignored region of their class, and by half on no object of it."""
    if not ignored.any():
        return 0
    fits = (_overlaps(boxes, objects, ignored) >= HALF) & (labels[:, None] == object_labels)
    return int(((fits & ignored).any(axis=1) & ~(fits & ~ignored).any(axis=1)).sum())


def _overlaps(boxes_xyxy: np.ndarray, objects_xyxy: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    """(D, G) intersection over union; for ignored regions over the area of the detection."""
    from pycocotools import mask as coco_mask

    if not len(boxes_xyxy) or not len(objects_xyxy):
        return np.zeros((len(boxes_xyxy), len(objects_xyxy)))
    # pycocotools takes numbers in the order of memory, whatever the strides.
    boxes_xywh, objects_xywh = (
        np.ascontiguousarray(np.concatenate([each[:, :2], (each[:, 2:] - each[:, :2]).clip(0)], axis=1))
        for each in (boxes_xyxy, objects_xyxy)
    )
    is_region = np.zeros(len(objects_xyxy), bool) if ignored is None else ignored
    return coco_mask.iou(boxes_xywh, objects_xywh, is_region.tolist())


def _side_counts(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(80,) how many boxes have which side; very small and very large ones at the ends."""
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(2.0**_LEAST_SIDE_LOG2)
    doublings = np.log2(sides).mean(axis=1) - _LEAST_SIDE_LOG2
    rows = np.rint(doublings * _STEPS_TO_DOUBLE).astype(np.int64).clip(max=_NUM_SIDES - 1)
    return np.bincount(rows, minlength=_NUM_SIDES)
