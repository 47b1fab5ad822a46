"""Which of the boxes that overlap are kept: non-maximum suppression, hard and soft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from swin_dense.errors import ConfigError


class Suppress(Protocol):
    """Boxes of one image, of which those of one class suppress each other."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, most: int, /) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            boxes: (N, 4) xyxy.
            scores: (N,) positive.
            labels: (N,) the class of each.
            most: The most boxes to keep, best first.

        Returns:
            The rows kept, (D,) int64, and their new scores, (D,), by falling score.
        """


@dataclass(frozen=True)
class HardNMS:
    """Of two boxes that overlap by more than `iou` the one with the better score stays."""

    iou: float

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, most: int, /) -> tuple[Tensor, Tensor]:
        """As in `Suppress`; scores stay as they are."""
        rows = batched_nms(boxes, scores, labels, self.iou)[:most]
        return rows, scores[rows]


@dataclass(frozen=True)
class SoftNMS:
    """Each box that is kept lowers the scores of those it overlaps, instead of removing them.

    Soft-NMS (Bodla et al., 2017), https://arxiv.org/abs/1704.04503. The defaults are mmcv's, but for `iou`, which is
    0.5 in mmdetection's detectors with soft-NMS (mmcv has 0.3).

    Attributes:
        method: "linear" multiplies by 1 - IoU from `iou` on (equation 2 of the paper), "gaussian" by
            exp(-IoU^2 / sigma) always (equation 3).
        iou: Of "linear".
        sigma: Of "gaussian".
        min_score: Boxes are dropped when their score falls below.

    Raises:
        ConfigError: There is no such method.
    """

    method: Literal["linear", "gaussian"]
    iou: float = 0.5
    sigma: float = 0.5
    min_score: float = 1e-3

    def __post_init__(self) -> None:
        if self.method not in ("linear", "gaussian"):
            raise ConfigError(f"soft-NMS: method must be 'linear' or 'gaussian', got {self.method!r}.")

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, most: int, /) -> tuple[Tensor, Tensor]:
        """As in `Suppress`. All classes at once: scores only fall, so the best box left is the next best of all."""
        remaining, rows, kept = scores.clone(), [], []
        for _ in range(min(most, len(scores))):
            score, row = remaining.max(dim=0)
            if score < self.min_score:
                break
            rows.append(row)
            kept.append(score)
            iou = box_iou(boxes[row][None], boxes)[0].nan_to_num()  # of two boxes without area: 0 / 0
            is_touched = (labels == labels[row]) & (remaining > 0)  # what was kept stays below all others
            remaining = torch.where(is_touched, remaining * self._factors(iou), remaining)
            remaining[row] = -1
        if not rows:
            return labels.new_empty(0), scores.new_empty(0)
        return torch.stack(rows), torch.stack(kept)

    def _factors(self, iou: Tensor) -> Tensor:
        if self.method == "linear":
            return torch.where(iou >= self.iou, 1 - iou, 1)
        return torch.exp(-(iou**2) / self.sigma)


def keep_all(boxes: Tensor, scores: Tensor, labels: Tensor, most: int, /) -> tuple[Tensor, Tensor]:
    """As in `Suppress`, but all boxes, however many, in their order: for suppression that comes later."""
    return torch.arange(len(scores), device=scores.device), scores
