"""Which object an anchor or a proposal stands for, which of them train, and a box as offsets from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection import _utils as detection
from torchvision.ops import box_iou

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


@dataclass(frozen=True)
class Samples:
    """The boxes of one image that a head is trained on.

    Attributes:
        boxes: (N, 4) xyxy in pixels.
        labels: (N,) int64: the class from 1, 0 for background.
        matched: (N,) int64: the object each box stands for; any for background.
        matched_boxes: (N, 4) the box of that object.
        is_object_itself: (N,) bool: an object's own box, which came in beside the proposals.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    matched_boxes: Tensor
    is_object_itself: Tensor

    def rows(self, chosen: Tensor) -> Samples:
        """Some of the boxes: `chosen` is (N,) bool."""
        return Samples(
            self.boxes[chosen],
            self.labels[chosen],
            self.matched[chosen],
            self.matched_boxes[chosen],
            self.is_object_itself[chosen],
        )

    def objects(self) -> Samples:
        """The boxes that stand for an object."""
        return self.rows(self.labels > 0)


class ProposalSampler:
    """Choose proposals to train on, at random: up to a share of boxes on objects, the rest background.

    The objects' own boxes are among the candidates, so that a head has objects to learn from before proposals are good.

    Args:
        matcher: From the IoU of objects and boxes (G, N) to the object of each box, negative for background.
        samples_per_image: N.
        positive_fraction: The largest share of objects.
    """

    def __init__(self, matcher: Callable[[Tensor], Tensor], samples_per_image: int, positive_fraction: float) -> None:
        self.matcher = matcher
        self.draw = detection.BalancedPositiveNegativeSampler(samples_per_image, positive_fraction)

    def __call__(self, proposals: Tensor, target: Mapping[str, Tensor]) -> Samples:
        """Proposals (M, 4) xyxy and an image's "boxes" (G, 4) and "labels" (G,) from 1 to what is trained on."""
        objects = target["boxes"].to(proposals.dtype)
        boxes = torch.cat((proposals, objects))
        matched = labels = boxes.new_zeros(len(boxes), dtype=torch.int64)
        matched_boxes = boxes
        if len(objects):
            matches = self.matcher(box_iou(objects, boxes))
            matched = matches.clamp(min=0)
            matched_boxes = objects[matched]
            labels = torch.where(matches >= 0, target["labels"][matched], 0)
        is_object_itself = torch.arange(len(boxes), device=boxes.device) >= len(proposals)
        (positive,), (negative,) = self.draw([labels])
        samples = Samples(boxes, labels, matched, matched_boxes, is_object_itself)
        return samples.rows((positive | negative).bool())


def pick_class(values: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """The four numbers, offsets or a box, that a row holds for a class.

    Args:
        values: (N, 4 (K + 1)) one group per class, or (N, 4) where the classes share theirs.
        rows: (M,) int64 in [0, N).
        labels: (M,) int64 in [0, K].

    Returns:
        (M, 4).
    """
    groups = values.view(len(values), values.shape[1] // 4, 4)
    return groups[rows, labels] if groups.shape[1] > 1 else groups[rows, 0]


class BoxCoder(detection.BoxCoder):
    """Boxes as centre offsets and log sizes relative to reference boxes (R-CNN, appendix C).

    Unlike torchvision's, sizes are clamped on both sides before the exponential, as in the published models, and
    boxes never take on the reduced precision of the network's outputs.
    """

    @classmethod
    def from_stds(cls, stds: tuple[float, float, float, float]) -> BoxCoder:
        """A coder for offsets that are divided by these standard deviations, `target_stds` of mmdetection."""
        x, y, width, height = stds
        return cls((1 / x, 1 / y, 1 / width, 1 / height))

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
