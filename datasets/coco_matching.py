"""Which detections of an image find which objects: COCO's rules, for all size ranges and thresholds at once.

The rules, and every number they yield, are those of pycocotools' COCOeval.evaluateImg: the surest detection chooses
first; it takes the object that it overlaps most, the last one of equals; an object can be taken once, a crowd region by
any number; objects that count are preferred to ignored ones, however well these fit; a detection that finds an ignored
object, or none while it is out of the size range itself, is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_dense.datasets.coco_objects import ImageObjects

# The three axes that COCO scores along, as pycocotools' Params sets them.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""In pixels, both ends included: an object of 32 x 32 is small and medium."""
MAX_DETECTIONS = (1, 10, 100)
"""The surest of an image and class that are looked at."""

_LEAST_AREAS, _MOST_AREAS = np.array(list(AREA_RANGES.values())).T


@dataclass(frozen=True)
class Detections:
    """Detections of one image, or some of them.

    Attributes:
        labels: (N,) class indices.
        scores: (N,) float64.
        boxes_xywh: (N, 4) float64, pixels.
        masks: N compressed run lengths, or None.
        mask_areas: (N,) pixels, or None.
    """

    labels: np.ndarray
    scores: np.ndarray
    boxes_xywh: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None
    mask_areas: np.ndarray | None = None

    def __getitem__(self, rows: np.ndarray) -> Detections:
        return Detections(
            self.labels[rows],
            self.scores[rows],
            self.boxes_xywh[rows],
            None if self.masks is None else [self.masks[row] for row in rows],
            None if self.mask_areas is None else self.mask_areas[rows],
        )


@dataclass(frozen=True)
class Kind:
    """What is compared.

    Attributes:
        ious: Intersection over union, (D, G) float64, of detections and the objects in the given rows.
        areas: Of detections, (D,), in pixels; decides about their size class.
        needs_masks: Whether boxes are not enough.
    """

    ious: Callable[[Detections, ImageObjects, np.ndarray], np.ndarray]
    areas: Callable[[Detections], np.ndarray]
    needs_masks: bool


def _box_ious(detections: Detections, objects: ImageObjects, rows: np.ndarray) -> np.ndarray:
    from pycocotools import mask as coco_mask

    return coco_mask.iou(detections.boxes_xywh, objects.boxes_xywh[rows], objects.is_crowd[rows])


def _box_areas(detections: Detections) -> np.ndarray:
    return detections.boxes_xywh[:, 2] * detections.boxes_xywh[:, 3]


def _mask_ious(detections: Detections, objects: ImageObjects, rows: np.ndarray) -> np.ndarray:
    from pycocotools import mask as coco_mask

    return coco_mask.iou(detections.masks, [objects.masks[row] for row in rows], objects.is_crowd[rows])


def _mask_areas(detections: Detections) -> np.ndarray:
    assert detections.mask_areas is not None
    return detections.mask_areas


def _boundary_ious(detections: Detections, objects: ImageObjects, rows: np.ndarray) -> np.ndarray:
    from pycocotools import mask as coco_mask

    from swin_dense.datasets.boundaries import boundary_rle

    assert detections.masks is not None
    ious = _mask_ious(detections, objects, rows)
    # A crowd region has no boundary of its own: its mask alone decides, as in the paper's code.
    is_crowd = objects.is_crowd[rows]
    if not is_crowd.all():
        own = [boundary_rle(objects.masks[row]) for row in rows[~is_crowd]]
        found = [boundary_rle(mask) for mask in detections.masks]
        ious[:, ~is_crowd] = np.minimum(ious[:, ~is_crowd], coco_mask.iou(found, own, [0] * len(own)))
    return ious


KINDS: Mapping[str, Kind] = {
    "box": Kind(_box_ious, _box_areas, needs_masks=False),
    "mask": Kind(_mask_ious, _mask_areas, needs_masks=True),
    "boundary": Kind(_boundary_ious, _mask_areas, needs_masks=True),
}
"""Boundary: the least of mask IoU and Boundary IoU (Cheng et al., 2021, https://arxiv.org/abs/2103.16562)."""


def best_of_each_class(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the detections of an image within their classes; equal scores stay in order.

    Args:
        labels: (N,) class indices.
        scores: (N,) float64.

    Returns:
        (D,) rows of the 100 surest of each class, class by class, the surest first; (D,) uint8, their ranks from 0.
    """
    rows = np.lexsort((-scores, labels))
    ordered = labels[rows]
    ranks = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
    is_looked_at = ranks < MAX_DETECTIONS[-1]
    return rows[is_looked_at], ranks[is_looked_at].astype(np.uint8)


def is_ignored(objects: ImageObjects) -> np.ndarray:
    """(A, G) bool: which objects do not count in which of the `AREA_RANGES`."""
    return objects.is_crowd | _is_outside(objects.areas)


def match_image(kind: Kind, detections: Detections, objects: ImageObjects) -> tuple[np.ndarray, np.ndarray]:
    """Finds the detections that are right, and those that do not matter.

    Args:
        kind: What is compared.
        detections: Ordered by `best_of_each_class`.
        objects: Of the same image.

    Returns:
        (A, T, D) bool, the detection found an object; (A, T, D) bool, it is neither right nor wrong.
    """
    shape = (len(AREA_RANGES), len(IOU_THRESHOLDS), len(detections.labels))
    is_matched, on_ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    ignored = is_ignored(objects)
    for label in np.intersect1d(detections.labels, objects.labels):
        found, there = np.flatnonzero(detections.labels == label), np.flatnonzero(objects.labels == label)
        ious = kind.ious(detections[found], objects, there)
        is_matched[..., found], on_ignored[..., found] = match(ious, ignored[:, there], objects.is_crowd[there])
    return is_matched, on_ignored | ~is_matched & _is_outside(kind.areas(detections))[:, np.newaxis]


def match(ious: np.ndarray, ignored: np.ndarray, is_crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matches the detections of a class with its objects.

    Args:
        ious: (D, G), the surest detection first.
        ignored: (A, G) bool, objects that do not count; crowd regions are among them.
        is_crowd: (G,) bool, objects that may be taken again and again.

    Returns:
        (A, T, D) bool, the detection took an object; (A, T, D) bool, it took one that does not count.
    """
    num_detections, num_objects = ious.shape
    shape = (len(ignored), len(IOU_THRESHOLDS))
    is_matched, on_ignored = np.zeros((2, *shape, num_detections), bool)
    # (D, A, T, G), higher is better, no two are equal; -1 where the overlap is too small.
    order = ious.argsort(axis=1, kind="stable").argsort(axis=1)
    preference = order[:, np.newaxis] + num_objects * ~ignored
    overlaps = ious[:, np.newaxis] >= IOU_THRESHOLDS[:, np.newaxis]
    preference = np.where(overlaps[:, np.newaxis], preference[:, :, np.newaxis], -1)
    is_free = np.ones((*shape, num_objects), bool)
    rows, columns = np.indices(shape)
    for detection in np.flatnonzero(overlaps.any(axis=(1, 2))):
        wishes = np.where(is_free, preference[detection], -1)
        best = wishes.argmax(axis=-1)
        takes = wishes[rows, columns, best] >= 0
        is_matched[..., detection] = takes
        on_ignored[..., detection] = takes & ignored[rows, best]
        is_free[rows, columns, best] &= ~takes | is_crowd[best]
    return is_matched, on_ignored


def _is_outside(areas: np.ndarray) -> np.ndarray:
    return (areas < _LEAST_AREAS[:, np.newaxis]) | (areas > _MOST_AREAS[:, np.newaxis])
