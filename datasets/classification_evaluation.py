"""Accuracy of image classification: how often the true class has the highest score, or one of the five highest."""

from typing import Any

import numpy as np

from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

TOP_K = 5


class ClassificationAccuracy:
    """Counts images and right answers by class.

    Args:
        label_map: the classes, by index.

    Attributes:
        counts: {"top-1": (K,), "top-5": (K,) for more than five classes} right answers, by true class.
        images: (K,) images, by true class.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self.label_map = label_map
        num_classes = len(label_map)
        self.images = np.zeros(num_classes, np.int64)
        names = ("top-1", f"top-{TOP_K}") if num_classes > TOP_K else ("top-1",)
        self.counts = {name: np.zeros(num_classes, np.int64) for name in names}

    def add(self, scores: np.ndarray, label: int) -> None:
        """Counts one image.

        Args:
            scores: (K,) of any scale; of equal ones the lower class index counts as the higher score.
            label: the true class.

        Raises:
            DataError: there is not one score for each class, a score is not a number, or there is no such class.
        """
        num_classes = len(self.label_map)
        if scores.shape != (num_classes,) or np.isnan(scores).any():
            raise DataError(f"Wanted one score for each of {num_classes} classes, got {scores.shape}: {scores}.")
        if not 0 <= label < num_classes:
            raise DataError(f"The label must be 0 to {num_classes - 1}, got {label}.")
        ahead = (scores > scores[label]).sum() + (scores[:label] == scores[label]).sum()
        self.images[label] += 1
        for name, counts in self.counts.items():
            counts[label] += ahead < (1 if name == "top-1" else TOP_K)

    def merge(self, other: "ClassificationAccuracy") -> None:
        """Adds what another one over the same classes counted, as that of another process.

        Raises:
            DataError: the classes differ.
        """
        if self.label_map.names != other.label_map.names:
            raise DataError(f"The classes differ: {self.label_map.names} and {other.label_map.names}.")
        self.images += other.images
        for name, counts in self.counts.items():
            counts += other.counts[name]

    def compute(self) -> dict[str, Any]:
        """Scores all images added so far.

        Returns:
            ```
            {"top-1", and "top-5" for more than five classes: fractions of 1, None without any image
             "per_class": {name: the same of its images, or None}, "absent": [names of classes without an image]}
            ```
        """
        total = int(self.images.sum())
        per_class = {
            name: {top: int(counts[index]) / int(images) for top, counts in self.counts.items()} if images else None
            for index, (name, images) in enumerate(zip(self.label_map.names, self.images, strict=True))
        }
        return {
            **{name: int(counts.sum()) / total if total else None for name, counts in self.counts.items()},
            "per_class": per_class,
            "absent": [name for name, scores in per_class.items() if scores is None],
        }
