"""From matched detections to precision, recall and COCO's twelve numbers, equal to pycocotools' to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swin_dense.datasets.coco_matching import AREA_RANGES, IOU_THRESHOLDS, MAX_DETECTIONS

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
"""As pycocotools' Params sets them."""

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In the order in which pycocotools summarises them."""

_NUM_PAIRS = len(AREA_RANGES) * len(IOU_THRESHOLDS)
_SIZES = {"s": "small", "m": "medium", "l": "large"}


@dataclass(frozen=True)
class ImageMatches:
    """What is kept of the detections of an image: a few bytes each.

    Attributes:
        labels: (D,) class indices, ordered by `best_of_each_class`.
        scores: (D,) float64.
        ranks: (D,) uint8, from 0 within each class.
        marks: Kind -> (2, 5, D) uint8: two marks for each of 40 pairs of size range and threshold, as bits: the
            detection found an object; it is neither right nor wrong.
        num_detections: All, those beyond the 100th of a class too.
    """

    labels: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    marks: dict[str, np.ndarray]
    num_detections: int


def pack_marks(is_matched: np.ndarray, is_neutral: np.ndarray) -> np.ndarray:
    """(A, T, D) bool twice to (2, A T / 8, D) uint8."""
    marks = np.stack([is_matched, is_neutral])
    return np.packbits(marks.reshape(2, _NUM_PAIRS, marks.shape[-1]), axis=1)


def _unpack(marks: np.ndarray) -> np.ndarray:
    shape = (2, len(AREA_RANGES), len(IOU_THRESHOLDS), marks.shape[-1])
    return np.unpackbits(marks, axis=1, count=_NUM_PAIRS).reshape(shape).astype(bool)


@dataclass(frozen=True)
class Accumulated:
    """Precision and recall along COCO's axes; -1 wherever a class has no object of the size.

    The axes, as far as an array has them, are in this order:
        T: `IOU_THRESHOLDS`; R: `RECALL_THRESHOLDS`; K: class indices; A: `AREA_RANGES`; M: `MAX_DETECTIONS`.

    Attributes:
        precision: (T, R, K, A, M) float64: the highest precision at this recall or a higher one; 0 where the recall is
            not reached.
        recall: (T, K, A, M) float64: that of all detections.
        scores: (T, R, K, A, M) float64: the least score that reaches the recall; 0 where it is not reached.

    Example:
        >>> plot(RECALL_THRESHOLDS, accumulated.precision[0, :, label, 0, -1])   # IoU 0.5  # doctest: +SKIP
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray


def accumulate(images: Sequence[ImageMatches], kind: str, num_objects: np.ndarray) -> Accumulated:
    """Puts the detections of all images into one order and counts.

    Args:
        images: In the order of their ids: equal scores stay in it.
        kind: Whose marks.
        num_objects: (A, K), how many objects count, by size range and class.
    """
    labels = np.concatenate([image.labels for image in images])
    scores = np.concatenate([image.scores for image in images])
    ranks = np.concatenate([image.ranks for image in images])
    marks = np.concatenate([image.marks[kind] for image in images], axis=2)
    order = np.lexsort((-scores, labels))
    num_classes = num_objects.shape[1]
    starts = np.searchsorted(labels, np.arange(num_classes + 1), sorter=order)
    axes = (len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), num_classes, len(AREA_RANGES), len(MAX_DETECTIONS))
    result = Accumulated(-np.ones(axes), -np.ones((axes[0], *axes[2:])), -np.ones(axes))
    for label in np.flatnonzero(num_objects.any(axis=0)):
        rows = order[starts[label] : starts[label + 1]]
        is_matched, is_neutral = _unpack(marks[..., rows])
        for number, limit in enumerate(MAX_DETECTIONS):
            is_counted = ranks[rows] < limit
            for area in np.flatnonzero(num_objects[:, label]):
                precision, recall, reached = precision_and_recall(
                    is_matched[area][:, is_counted],
                    is_neutral[area][:, is_counted],
                    scores[rows][is_counted],
                    int(num_objects[area, label]),
                )
                result.precision[:, :, label, area, number] = precision
                result.recall[:, label, area, number] = recall
                result.scores[:, :, label, area, number] = reached
    return result


def precision_and_recall(
    is_matched: np.ndarray, is_neutral: np.ndarray, scores: np.ndarray, num_objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the curve of one class.

    Args:
        is_matched: (T, D) bool, the surest detection first.
        is_neutral: (T, D) bool, neither right nor wrong.
        scores: (D,), falling.
        num_objects: At least 1.

    Returns:
        (T, R) precision, (T,) recall of all detections, (T, R) score at which each recall is reached.
    """
    shape = (len(is_matched), len(RECALL_THRESHOLDS))
    precision, reached = np.zeros(shape), np.zeros(shape)
    if not len(scores):
        return precision, np.zeros(shape[0]), reached
    right = np.cumsum(is_matched & ~is_neutral, axis=1, dtype=np.float64)
    wrong = np.cumsum(~is_matched & ~is_neutral, axis=1, dtype=np.float64)
    recalls = right / num_objects
    # The smallest number keeps 0 / 0 away; for the same reason a single right detection is not quite 1.
    precisions = right / (wrong + right + np.spacing(1))
    envelope = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]
    for threshold, recall in enumerate(recalls):
        places = np.searchsorted(recall, RECALL_THRESHOLDS, side="left")
        places = places[places < len(scores)]
        precision[threshold, : len(places)] = envelope[threshold, places]
        reached[threshold, : len(places)] = scores[places]
    return precision, recalls[:, -1], reached


def summarize(accumulated: Accumulated, labels: Sequence[int]) -> dict[str, float | None]:
    """COCO's twelve numbers of some classes together.

    Args:
        accumulated: Of all classes.
        labels: Class indices; for numbers equal to pycocotools' in the last digit, in the order of the category ids.

    Returns:
        `METRIC_NAMES` -> fraction of 1; None where the classes have no object of that size.
    """
    precision, recall = accumulated.precision[:, :, labels], accumulated.recall[:, labels]
    areas = list(AREA_RANGES)
    numbers = {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[IOU_THRESHOLDS == 0.5, ..., 0, -1]),
        "AP75": _mean(precision[IOU_THRESHOLDS == 0.75, ..., 0, -1]),
    }
    for letter, size in _SIZES.items():
        numbers[f"AP{letter}"] = _mean(precision[..., areas.index(size), -1])
        numbers[f"AR{letter}"] = _mean(recall[..., areas.index(size), -1])
    for number, limit in enumerate(MAX_DETECTIONS):
        numbers[f"AR{limit}"] = _mean(recall[..., 0, number])
    return {name: numbers[name] for name in METRIC_NAMES}


def _mean(values: np.ndarray) -> float | None:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else None
