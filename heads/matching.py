"""Which object an anchor or a proposal stands for, and how a box is written relative to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.models.detection import _utils as detection

from swin_dense.heads.precision import at_least_float32


class MaxIoUMatcher(detection.Matcher):
    """Match boxes to objects by IoU, as the published models are trained.

    A box is positive for the object it overlaps most from `positive_iou` on, negative under `negative_iou`, ignored
    between. Besides, the boxes that overlap an object most are positive for that object if that overlap reaches
    `minimum_iou`; torchvision has no such bound and gives them to the object they overlap most themselves.

    Args:
        positive_iou: From here on a box is positive.
        negative_iou: Below this a box is negative.
        minimum_iou: The least overlap of an object's best boxes.
    """

    def __init__(self, positive_iou: float, negative_iou: float, minimum_iou: float) -> None:
        super().__init__(positive_iou, negative_iou, allow_low_quality_matches=True)
        self.minimum_iou = minimum_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Give each object its best boxes; `matches` is changed in place.

        Args:
            matches: (N,) the object of each box, or a negative code.
            all_matches: (N,) the object each box overlaps most.
            match_quality_matrix: (G, N) IoU of objects and boxes.
        """
        best_iou = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best_iou) & (best_iou >= self.minimum_iou)
        objects = torch.arange(len(match_quality_matrix), device=matches.device)[:, None]
        last_object = torch.where(is_best, objects, -1).amax(dim=0)
        matches.copy_(torch.where(last_object >= 0, last_object, matches))


class BoxCoder(detection.BoxCoder):
    """Boxes as centre offsets and log sizes relative to reference boxes (R-CNN, appendix C).

    Unlike torchvision's, sizes are clamped on both sides before the exponential, as in the published models, and
    boxes never take on the reduced precision of the network's outputs.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Apply predicted offsets.

        Args:
            rel_codes: (N, 4 K) offsets (dx, dy, dw, dh), K groups of them.
            boxes: (N, 4) reference boxes xyxy.

        Returns:
            (N, 4 K) boxes xyxy.
        """
        deltas = at_least_float32(rel_codes).view(len(boxes), rel_codes.shape[1] // 4, 4)
        boxes = boxes.to(deltas.dtype)
        centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        size = boxes[:, None, 2:] - boxes[:, None, :2]
        weights = deltas.new_tensor(self.weights)
        offset, log_size = (deltas / weights).split(2, dim=-1)
        limit = math.log(1000 / 16)  # the published bound: no side grows or shrinks by more than 62.5
        centre = centre + offset * size
        half = size * log_size.clamp(-limit, limit).exp() / 2
        return torch.cat((centre - half, centre + half), dim=-1).flatten(1)
