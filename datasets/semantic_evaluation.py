"""Mean intersection over union of label maps, from one confusion matrix over the whole data set."""

from typing import Any

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

# Counting takes a few eight-byte numbers a pixel, so large images are counted in bands of rows.
_PIXELS_AT_ONCE = 2**22


class ConfusionMatrix:
    """Counts which class was predicted for which; pixels whose label is 255 do not count.

    Args:
        label_map: The classes, by index.

    Attributes:
        matrix: (K, K) int64 pixel counts; row = class of the label, column = class predicted.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self.label_map = label_map
        self.matrix = np.zeros((len(label_map), len(label_map)), dtype=np.int64)

    def add(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Counts one image.

        Args:
            prediction: (H, W) integers, 0 to K - 1.
            label: (H, W) integers, 0 to K - 1, or 255 where nothing counts.

        Raises:
            DataError: The shapes differ, or a value is out of range.
        """
        predicted, labelled = np.asarray(prediction), np.asarray(label)
        if predicted.shape != labelled.shape or predicted.ndim != 2:
            raise DataError(
                f"Prediction and label must have the same shape (H, W), got {predicted.shape} and {labelled.shape}."
            )
        rows = max(1, _PIXELS_AT_ONCE // max(1, predicted.shape[1]))
        bands = [slice(top, top + rows) for top in range(0, len(predicted), rows)]
        self.matrix += sum(
            (self._counts(predicted[band], labelled[band]) for band in bands), np.zeros_like(self.matrix)
        )

    def _counts(self, predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
        counts = labelled != IGNORED_LABEL
        num_classes = len(self.label_map)
        kept_predictions, kept_labels = predicted[counts], labelled[counts]
        for name, values in (("prediction", kept_predictions), ("label", kept_labels)):
            if not np.issubdtype(values.dtype, np.integer):
                raise DataError(f"The {name} must hold integers, got {values.dtype}.")
            if values.size and not 0 <= values.min() <= values.max() < num_classes:
                raise DataError(
                    f"The {name} holds values from {values.min()} to {values.max()}, "
                    f"wanted 0 to {num_classes - 1} (or {IGNORED_LABEL} in a label, to ignore)."
                )
        pairs = kept_labels.astype(np.int64) * num_classes + kept_predictions
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds what another matrix over the same classes counted, as that of another process.

        Raises:
            DataError: The classes differ.
        """
        if self.label_map.names != other.label_map.names:
            raise DataError(f"The classes differ: {self.label_map.names} and {other.label_map.names}.")
        self.matrix += other.matrix

    def compute(self) -> dict[str, Any]:
        """Scores all images added so far, pixels of all images together.

        A class without any labelled pixel has no score and leaves the means alone; predicting it still costs the
        classes that were there.

        Returns:
            ```
            {"mIoU", "mAcc", "aAcc": fractions of 1, None without any labelled pixel
             "per_class": {name: {"IoU", "accuracy"} or None}, "absent": [names of classes without a labelled pixel]}
            ```
        """
        right = self.matrix.diagonal()
        labelled, predicted = self.matrix.sum(axis=1), self.matrix.sum(axis=0)
        present = labelled > 0
        iou = right[present] / (labelled + predicted - right)[present]
        accuracy = right[present] / labelled[present]
        scores = iter(zip(iou.tolist(), accuracy.tolist(), strict=True))
        per_class = {
            name: dict(zip(("IoU", "accuracy"), next(scores), strict=True)) if there else None
            for name, there in zip(self.label_map.names, present, strict=True)
        }
        any_pixel = bool(present.any())
        return {
            "mIoU": float(iou.mean()) if any_pixel else None,
            "mAcc": float(accuracy.mean()) if any_pixel else None,
            "aAcc": float(right.sum() / labelled.sum()) if any_pixel else None,
            "per_class": per_class,
            "absent": [name for name, scored in per_class.items() if scored is None],
        }
