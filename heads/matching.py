"""Which object an anchor or a proposal stands for, which of them train, and a box as offsets from another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection import _utils as detection
from torchvision.ops import box_area, box_iou

from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.targets import TrainingTarget

NEGATIVE, BETWEEN = -1, -2  # codes of boxes that stand for no object, torchvision's
_PAIRS_AT_ONCE = 2**20  # of hundreds of objects with all anchors the overlaps would take gigabytes


@dataclass(frozen=True)
class MaxIoUMatcher:
    """Match boxes to objects by IoU, as the published models are trained.

    A box is positive for the object it overlaps most from `positive_iou` on, negative under `negative_iou`, neither
    between. Besides, the boxes that overlap an object most are positive for that object if that overlap reaches
    `minimum_iou`; torchvision has no such bound and gives them to the object they overlap most themselves.

    Attributes:
        positive_iou: From here on a box is positive.
        negative_iou: Below this a box is negative.
        minimum_iou: The least overlap of an object's best boxes; None leaves this rule out.
    """

    positive_iou: float
    negative_iou: float
    minimum_iou: float | None

    def __call__(self, objects: Tensor, boxes: Tensor) -> Tensor:
        """Objects (G, 4) and boxes (N, 4) to (N,) int64: the object of each box, NEGATIVE or BETWEEN."""
        if not len(objects) or not len(boxes):
            return boxes.new_full((len(boxes),), NEGATIVE, dtype=torch.int64)
        return self.match(box_iou(some, boxes) for some in objects.split(max(1, _PAIRS_AT_ONCE // len(boxes))))

    def match(self, parts: Iterable[Tensor]) -> Tensor:
        """The same from the IoU of all objects with all boxes: one or more (g, N), together (G, N)."""
        best_iou, best_object, claimed_by = torch.tensor(-1.0), torch.tensor(NEGATIVE), torch.tensor(NEGATIVE)
        num_objects = 0
        for iou in parts:
            part_iou, part_object = iou.max(dim=0)
            is_better = part_iou > best_iou
            best_iou = torch.where(is_better, part_iou, best_iou)
            best_object = torch.where(is_better, part_object + num_objects, best_object)
            if self.minimum_iou is not None:
                iou_of_object = iou.amax(dim=1, keepdim=True)
                is_best_box = (iou == iou_of_object) & (iou_of_object >= self.minimum_iou)
                objects = torch.arange(num_objects, num_objects + len(iou), device=iou.device)[:, None]
                claimed_by = torch.maximum(claimed_by, torch.where(is_best_box, objects, NEGATIVE).amax(dim=0))
            num_objects += len(iou)
        missed = torch.where(best_iou < self.negative_iou, NEGATIVE, BETWEEN)
        matches = torch.where(best_iou >= self.positive_iou, best_object, missed)
        return torch.where(claimed_by >= 0, claimed_by, matches)


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


def without_ignored(labels: Tensor, boxes: Tensor, regions: Tensor, overlap: float | None) -> Tensor:
    """Take out of the background what lies in a region to ignore: nobody said what is there.

    How much of a box lies in a region is measured on the box's own area, as COCO's evaluation does for crowds; it
    forgives detections from an overlap of 0.5 on. Boxes that stand for an object stay, as there too an object is found
    first and a crowd takes the rest; matterport/Mask_RCNN trains so. Others drop such objects also: Detectron
    (CROWD_FILTER_THRESH 0.7, proposals only) and mmdetection (`ignore_iof_thr`), whose published configurations switch
    it off with -1, so that crowds are background.

    Args:
        labels: (N,) 0 for background, above for objects, below for neither.
        boxes: (N, 4) xyxy.
        regions: (I, 4) xyxy.
        overlap: From this share of its area in one region on, a box is not background; None changes nothing.

    Returns:
        (N,) labels, -1 where background was taken out.
    """
    if overlap is None or not len(regions):
        return labels
    most = boxes.new_zeros(len(boxes))
    for some in regions.split(max(1, _PAIRS_AT_ONCE // max(1, len(boxes)))):
        low, high = torch.maximum(boxes[:, None, :2], some[:, :2]), torch.minimum(boxes[:, None, 2:], some[:, 2:])
        most = torch.maximum(most, (high - low).clamp(min=0).prod(dim=2).amax(dim=1))
    lies_inside = (most > 0) & (most >= overlap * box_area(boxes))
    return torch.where((labels == 0) & lies_inside, -1, labels)


class ProposalSampler:
    """Choose proposals to train on, at random: up to a share of boxes on objects, the rest background.

    The objects' own boxes are among the candidates, so that a head has objects to learn from before proposals are good.

    Args:
        matcher: From objects and boxes to the object of each box, negative for background.
        samples_per_image: N.
        positive_fraction: The largest share of objects.
        ignore_overlap: See `without_ignored`.
    """

    def __init__(
        self,
        matcher: MaxIoUMatcher,
        samples_per_image: int,
        positive_fraction: float,
        ignore_overlap: float | None,
    ) -> None:
        self.matcher = matcher
        self.ignore_overlap = ignore_overlap
        self.draw = detection.BalancedPositiveNegativeSampler(samples_per_image, positive_fraction)

    def __call__(self, proposals: Tensor, target: TrainingTarget) -> Samples:
        """Proposals (M, 4) xyxy and an image's objects to what is trained on."""
        objects = target["boxes"].to(proposals.dtype)
        boxes = torch.cat((proposals, objects))
        matched = labels = boxes.new_zeros(len(boxes), dtype=torch.int64)
        matched_boxes = boxes
        if len(objects):
            matches = self.matcher(objects, boxes)
            matched = matches.clamp(min=0)
            matched_boxes = objects[matched]
            labels = torch.where(matches >= 0, target["labels"][matched], 0)
        labels = without_ignored(labels, boxes, target["ignored_boxes"].to(boxes.dtype), self.ignore_overlap)
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
