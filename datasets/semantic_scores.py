"""All that is known of a segmenter's results: IoU of the set, by image and near outlines, and why a score is 0."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.score_explanations import explain_semantic_scores
from swin_dense.datasets.semantic_evaluation import BoundaryIoU, ConfusionMatrix


class SemanticScores:
    """Collects the predicted label map of every image; processes collect apart and merge.

    Args:
        label_map: The classes, by index.
        unscored: Classes that may be predicted, but have no score.
    """

    def __init__(self, label_map: LabelMap, unscored: Collection[str] = ()) -> None:
        self._unscored = unscored
        self._confusion = ConfusionMatrix(label_map)
        self._boundary = BoundaryIoU(label_map)
        self._image_iou: dict[int, float] = {}

    def add(self, index: int, prediction: np.ndarray, label: np.ndarray) -> None:
        """Take one image; a large one may lie on disk.

        Args:
            index: Of the image.
            prediction: (H, W) class indices.
            label: (H, W) class indices, 255 where nothing counts.

        Raises:
            DataError: The shapes differ, or a value is out of range.
        """
        image_iou = self._confusion.add(prediction, label)
        self._boundary.add(prediction, label)
        if image_iou is not None:
            self._image_iou[index] = image_iou

    def merge(self, other: SemanticScores) -> None:
        """Take what another process has collected of other images."""
        self._confusion.merge(other._confusion)
        self._boundary.merge(other._boundary)
        self._image_iou.update(other._image_iou)

    def worst_images(self, count: int) -> list[tuple[int, float]]:
        """The images with the lowest mean IoU, the worst first: (index, mean IoU of the classes labelled in it).

        Args:
            count: At most so many; perfect images are not among them.
        """
        ordered = sorted(self._image_iou.items(), key=lambda image: (image[1], image[0]))
        return [(index, iou) for index, iou in ordered[:count] if iou < 1]

    def compute(self) -> dict[str, Any]:
        """Scores of everything that was added.

        Returns:
            What `ConfusionMatrix.compute` gives, each class with "boundary_IoU" too, and
            ```
            {"boundary_mIoU": as `BoundaryIoU.compute` gives it
             "confusion": rows of the matrix, pixels; row = class of the label
             "explanations": [sentences, empty where there is nothing to explain]}
            ```
        """
        scores, near_outlines = self._confusion.compute(), self._boundary.compute()
        per_class = {
            name: None if values is None else {**values, **(near_outlines["per_class"][name] or {"boundary_IoU": None})}
            for name, values in scores["per_class"].items()
            if name not in self._unscored
        }
        return {
            **scores,
            "boundary_mIoU": near_outlines["boundary_mIoU"],
            "per_class": per_class,
            "absent": [name for name in scores["absent"] if name not in self._unscored],
            "confusion": self._confusion.matrix.tolist(),
            "explanations": explain_semantic_scores(self._confusion, self._unscored),
        }
