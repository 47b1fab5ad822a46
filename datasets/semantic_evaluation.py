"""Scores of label maps: intersection over union of the whole set and image by image, and near the outlines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.boundaries import DILATION_RATIO, boundary_distance, boundary_of_labels
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError, DataError

# Counting takes a few eight-byte numbers a pixel, so large images are counted in bands of rows.
_PIXELS_AT_ONCE = 2**22

# A float from 2^-47 to 1 is a whole multiple of this, so scores of images add up exactly, as integers, whatever
# their order and in however many processes.
_UNIT = 2.0**-100


class ConfusionMatrix:
    """Counts which class was predicted for which; pixels whose label is 255 do not count.

    Two means are in use, and they differ: `mIoU`, that of the benchmarks, counts the pixels of all images together and
    then compares the classes; `image_mIoU` scores every image by itself, so that small images and small objects weigh
    as much as large ones.

    Args:
        label_map: The classes, by index.

    Attributes:
        matrix: (K, K) int64 pixel counts; row = class of the label, column = class predicted.
        num_images: images added.
        num_ignored: pixels of theirs that do not count.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self.label_map = label_map
        num_classes = len(label_map)
        self.matrix = np.zeros((num_classes, num_classes), np.int64)
        self.num_images = 0
        self.num_ignored = 0
        self._labelled_images = 0
        self._image_scores = 0
        self._images_of_class = np.zeros(num_classes, np.int64)
        self._image_scores_of_class = np.zeros(num_classes, object)

    def add(self, prediction: np.ndarray, label: np.ndarray) -> float | None:
        """Counts one image; a large one band by band, so that both may be arrays on disk.

        Args:
            prediction: (H, W) integers, 0 to K - 1.
            label: (H, W) integers, 0 to K - 1, or 255 where nothing counts.

        Returns:
            The mean IoU of the classes labelled in the image, in [0, 1]; None without any.

        Raises:
            DataError: The shapes differ, or a value is out of range.
        """
        predicted, labelled = _pair(prediction, label)
        num_classes = len(self.label_map)
        counts = np.zeros_like(self.matrix)
        for rows in _bands(predicted.shape):
            counts += _pixel_counts(predicted[rows], labelled[rows], num_classes)
        self.matrix += counts
        self.num_images += 1
        self.num_ignored += predicted.size - int(counts.sum())
        return self._add_image(counts)

    def _add_image(self, counts: np.ndarray) -> float | None:
        present, iou = _iou(counts)
        if not present.any():
            return None
        self._labelled_images += 1
        self._image_scores += int(iou.mean() / _UNIT)
        self._images_of_class += present
        self._image_scores_of_class[present] += [int(score / _UNIT) for score in iou.tolist()]
        return float(iou.mean())

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds what another matrix over the same classes counted, as that of another process.

        Raises:
            DataError: The classes differ.
        """
        _require_same_classes(self.label_map, other.label_map)
        self.matrix += other.matrix
        self.num_images += other.num_images
        self.num_ignored += other.num_ignored
        self._labelled_images += other._labelled_images
        self._image_scores += other._image_scores
        self._images_of_class += other._images_of_class
        self._image_scores_of_class += other._image_scores_of_class

    def shares(self) -> np.ndarray:
        """(K, K) fractions of the labelled pixels of each class, for drawing: rows add up to 1.

        The row of a class without any labelled pixel is NaN, which is drawn as nothing.
        """
        labelled = self.matrix.sum(axis=1, keepdims=True)
        return np.divide(self.matrix, labelled, out=np.full(self.matrix.shape, np.nan), where=labelled > 0)

    def compute(self) -> dict[str, Any]:
        """Scores all images added so far.

        A class without any labelled pixel has no score and leaves the means alone; predicting it still costs the
        classes that were there.

        Returns:
            ```
            {"mIoU": mean over the classes of their IoU, pixels of all images together
             "mAcc": mean over the classes of their accuracy
             "aAcc": pixels predicted right / pixels labelled
             "image_mIoU": mean over the images with any labelled pixel of
                           (mean over the classes labelled in the image of their IoU in it)
             "per_class": {name: None for an absent class, or
                 {"IoU": both / (labelled or predicted), pixels of all images together
                  "accuracy": both / labelled, also called recall
                  "precision": both / predicted; None where the class is never predicted
                  "F1": 2 both / (labelled + predicted), also called Dice
                  "image_IoU": mean over the images where the class is labelled of its IoU in the image
                  "pixel_share": labelled / pixels labelled in all}}
             "absent": [names of classes without a labelled pixel]}
            ```
            All are fractions of 1; the four means are None without any labelled pixel.
        """
        right = self.matrix.diagonal()
        labelled, predicted = self.matrix.sum(axis=1), self.matrix.sum(axis=0)
        present, iou = _iou(self.matrix)
        accuracy = right[present] / labelled[present]
        columns = {
            "IoU": iou.tolist(),
            "accuracy": accuracy.tolist(),
            "precision": _fractions(right[present], predicted[present]),
            "F1": (2 * right[present] / (labelled + predicted)[present]).tolist(),
            "image_IoU": _fractions(self._image_scores_of_class[present], self._images_of_class[present], _UNIT),
            "pixel_share": (labelled[present] / labelled.sum()).tolist(),
        }
        rows = zip(*columns.values(), strict=True)
        per_class = {
            name: dict(zip(columns, next(rows), strict=True)) if there else None
            for name, there in zip(self.label_map.names, present, strict=True)
        }
        any_pixel = bool(present.any())
        return {
            "mIoU": float(iou.mean()) if any_pixel else None,
            "mAcc": float(accuracy.mean()) if any_pixel else None,
            "aAcc": float(right.sum() / labelled.sum()) if any_pixel else None,
            "image_mIoU": self._image_scores / self._labelled_images * _UNIT if any_pixel else None,
            "per_class": per_class,
            "absent": [name for name, scored in per_class.items() if scored is None],
        }


class BoundaryIoU:
    """IoU of the pixels near the outlines, over the whole set: whole areas hardly show how exact an outline is.

    Of each class the pixels near one of another class are compared, those of the prediction with those of the label,
    pixels of all images together. What is near is a fraction of each image's diagonal; ignored pixels take no part
    (`boundary_of_labels`). It takes a few times as long as the confusion matrix, on large images ten times.

    Args:
        label_map: The classes, by index.
        dilation_ratio: Width of the region as a fraction of the image's diagonal.

    Attributes:
        counts: (3, K) int64 pixels by class: in both regions, in that of the label, in that of the prediction.

    Raises:
        ConfigError: There are more classes than a label map can hold beside 255.
    """

    def __init__(self, label_map: LabelMap, dilation_ratio: float = DILATION_RATIO) -> None:
        if len(label_map) > IGNORED_LABEL:
            raise ConfigError(f"Boundary IoU: wanted at most {IGNORED_LABEL} classes, got {len(label_map)}.")
        self.label_map = label_map
        self.dilation_ratio = dilation_ratio
        self.counts = np.zeros((3, len(label_map)), np.int64)

    def add(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Counts one image; a large one band by band, so that both may be arrays on disk.

        Args:
            prediction: (H, W) integers, 0 to K - 1.
            label: (H, W) integers, 0 to K - 1, or 255 where nothing counts.

        Raises:
            DataError: The shapes differ, or a value is out of range.
        """
        predicted, labelled = _pair(prediction, label)
        num_classes = len(self.label_map)
        for rows in _bands(predicted.shape):
            _check_classes(predicted[rows], labelled[rows], num_classes)
        distance = boundary_distance(predicted.shape, self.dilation_ratio)
        # Bands read this many rows more on both sides.
        for rows in _bands(predicted.shape, least_rows=2 * distance):
            near_label = boundary_of_labels(labelled, labelled, distance, rows)
            near_prediction = boundary_of_labels(predicted, labelled, distance, rows)
            both = near_label & near_prediction & (predicted[rows] == labelled[rows])
            regions = ((labelled, both), (labelled, near_label), (predicted, near_prediction))
            self.counts += [np.bincount(classes[rows][region], minlength=num_classes) for classes, region in regions]

    def merge(self, other: BoundaryIoU) -> None:
        """Adds what another one over the same classes counted, as that of another process.

        Raises:
            DataError: The classes or the widths differ.
        """
        _require_same_classes(self.label_map, other.label_map)
        if self.dilation_ratio != other.dilation_ratio:
            raise DataError(f"The boundaries' widths differ: {self.dilation_ratio} and {other.dilation_ratio}.")
        self.counts += other.counts

    def compute(self) -> dict[str, Any]:
        """Scores all images added so far.

        Returns:
            ```
            {"boundary_mIoU": mean over the classes, None without any
             "per_class": {name: {"boundary_IoU": both / (either), of the pixels in the regions}, or None for a class
                           that no label has an outline of}}
            ```
            Fractions of 1. The keys are others than those of `ConfusionMatrix.compute`.
        """
        both, labelled, predicted = self.counts
        iou = _fractions(both, np.where(labelled > 0, labelled + predicted - both, 0))
        scored = [value for value in iou if value is not None]
        per_class = zip(self.label_map.names, iou, strict=True)
        return {
            "boundary_mIoU": float(np.mean(scored)) if scored else None,
            "per_class": {name: None if value is None else {"boundary_IoU": value} for name, value in per_class},
        }


def _pair(prediction: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted, labelled = np.asarray(prediction), np.asarray(label)
    if predicted.shape != labelled.shape or predicted.ndim != 2:
        raise DataError(
            f"Prediction and label must have the same shape (H, W), got {predicted.shape} and {labelled.shape}."
        )
    return predicted, labelled


def _bands(size_hw: tuple[int, ...], least_rows: int = 1) -> Iterator[slice]:
    height, width = size_hw
    rows = max(least_rows, _PIXELS_AT_ONCE // max(1, width))
    return (slice(top, top + rows) for top in range(0, height, rows))


def _check_classes(predicted: np.ndarray, labelled: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (P,) predictions and labels of the pixels that count, after looking at their values."""
    counts = labelled != IGNORED_LABEL
    kept = predicted[counts], labelled[counts]
    for name, values in zip(("prediction", "label"), kept, strict=True):
        if not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"The {name} must hold integers, got {values.dtype}.")
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            raise DataError(
                f"The {name} holds values from {values.min()} to {values.max()}, "
                f"wanted 0 to {num_classes - 1} (or {IGNORED_LABEL} in a label, to ignore)."
            )
    return kept


def _pixel_counts(predicted: np.ndarray, labelled: np.ndarray, num_classes: int) -> np.ndarray:
    kept_predictions, kept_labels = _check_classes(predicted, labelled, num_classes)
    pairs = kept_labels.astype(np.int64) * num_classes + kept_predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _iou(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, K) pixel counts to the (K,) bool classes that are labelled and the (P,) IoU of those."""
    right, labelled = counts.diagonal(), counts.sum(axis=1)
    present = labelled > 0
    return present, right[present] / (labelled + counts.sum(axis=0) - right)[present]


def _fractions(parts: np.ndarray, wholes: np.ndarray, unit: float = 1.0) -> list[float | None]:
    """(N,) integers each to N fractions in some unit; None where the whole is 0."""
    return [part / whole * unit if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _require_same_classes(one: LabelMap, other: LabelMap) -> None:
    if one.names != other.names:
        raise DataError(f"The classes differ: {one.names} and {other.names}.")
