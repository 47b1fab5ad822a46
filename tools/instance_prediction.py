"""What a detector found in one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class InstancePrediction:
    """The objects found in one image, by falling score, in pixels of the original image.

    Attributes:
        boxes_xyxy: (N, 4) float32.
        labels: (N,) int64, 0-based.
        scores: (N,) float32 in [0, 1].
        masks_rle: N run-length codes {"size": [H, W], "counts": str}.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks_rle: list[dict[str, Any]]

    def select(self, rows: np.ndarray) -> InstancePrediction:
        """The objects of some rows, (M,) integers, in that order."""
        masks = [self.masks_rle[row] for row in rows]
        return InstancePrediction(self.boxes_xyxy[rows], self.labels[rows], self.scores[rows], masks)

    def above(self, score: float) -> InstancePrediction:
        """Only the objects with at least this score."""
        return self.select(np.flatnonzero(self.scores >= score))

    def masks(self) -> np.ndarray:
        """(N, H, W) uint8."""
        from pycocotools import mask as coco_mask

        return np.stack([coco_mask.decode(code) for code in self.masks_rle])
