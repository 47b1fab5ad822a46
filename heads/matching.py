"""Which object an anchor or a proposal stands for, which of them train, and a box as offsets from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import _utils as detection

from swin_dense.heads.box_batches import beside, emptied, is_box, stack_boxes
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.targets import TrainingTarget

NEGATIVE, BETWEEN = -1, -2  # codes of boxes that stand for no object, torchvision's
NO_SAMPLE = -1  # the label of an empty place, and of what is neither object nor background

PAIRS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Of hundreds of objects with all anchors the overlaps would take gigabytes; a few objects fill a CPU, not a GPU."""


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

    def __call__(self, objects: Tensor, boxes: Tensor, is_candidate: Tensor | None = None) -> Tensor:
        """The object of each box.

        Args:
            objects: (…, G, 4) xyxy; empty places match nothing.
            boxes: (…, N, 4) or (N, 4) xyxy.
            is_candidate: (…, N) bool: all others are NEGATIVE and are nobody's best box. None takes all.

        Returns:
            (…, N) int64: the row of the object, NEGATIVE or BETWEEN.
        """
        shape = torch.broadcast_shapes(objects.shape[:-2], boxes.shape[:-2])
        num_objects, num_boxes = objects.shape[-2], boxes.shape[-2]
        if not num_objects or not num_boxes:
            return boxes.new_full((*shape, num_boxes), NEGATIVE, dtype=torch.int64)
        return self.match(_overlaps(some, boxes, is_candidate) for some in _parts(objects, num_boxes * shape.numel()))

    def match(self, parts: Iterable[Tensor]) -> Tensor:
        """The same from the IoU of all objects with all boxes: one or more (…, g, N), together (…, G, N).

        It is negative where an object or a box takes no part.
        """
        best_iou, best_object, claimed_by = torch.tensor(-1.0), torch.tensor(NEGATIVE), torch.tensor(NEGATIVE)
        num_objects = 0
        for iou in parts:
            part_iou, part_object = iou.max(dim=-2)
            is_better = part_iou > best_iou
            best_iou = torch.where(is_better, part_iou, best_iou)
            best_object = torch.where(is_better, part_object + num_objects, best_object)
            if self.minimum_iou is not None:
                iou_of_object = iou.amax(dim=-1, keepdim=True)
                is_best_box = (iou == iou_of_object) & (iou_of_object >= self.minimum_iou)
                objects = torch.arange(num_objects, num_objects + iou.shape[-2], device=iou.device)[:, None]
                claimed_by = torch.maximum(claimed_by, torch.where(is_best_box, objects, NEGATIVE).amax(dim=-2))
            num_objects += iou.shape[-2]
        missed = torch.where(best_iou < self.negative_iou, NEGATIVE, BETWEEN)
        matches = torch.where(best_iou >= self.positive_iou, best_object, missed)
        return torch.where(claimed_by >= 0, claimed_by, matches)


def _parts(objects: Tensor, num_boxes: int) -> tuple[Tensor, ...]:
    """Objects (…, G, 4), so many at once as PAIRS_AT_ONCE allows with the boxes of all images."""
    return objects.split(max(1, PAIRS_AT_ONCE.get(objects.device.type, 2**26) // max(1, num_boxes)), dim=-2)


def _overlaps(objects: Tensor, boxes: Tensor, is_candidate: Tensor | None) -> Tensor:
    takes_part = is_box(objects)[..., :, None]
    if is_candidate is not None:
        takes_part = takes_part & is_candidate[..., None, :]
    shared = _shared_area(objects, boxes)
    joint = _area(objects)[..., :, None] + _area(boxes)[..., None, :] - shared
    return torch.where(takes_part, shared / joint, -1.0)


def _shared_area(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, G, 4) and (…, N, 4) xyxy to (…, G, N)."""
    x1, y1, x2, y2 = boxes[..., :, None, :].unbind(-1)
    other_x1, other_y1, other_x2, other_y2 = others[..., None, :, :].unbind(-1)
    width = (torch.minimum(x2, other_x2) - torch.maximum(x1, other_x1)).clamp_(min=0)
    return (torch.minimum(y2, other_y2) - torch.maximum(y1, other_y1)).clamp_(min=0).mul_(width)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def without_ignored(labels: Tensor, boxes: Tensor, regions: Tensor, overlap: float | None) -> Tensor:
    """Take out of the background what lies in a region to ignore: nobody said what is there.

    How much of a box lies in a region is measured on the box's own area, as COCO's evaluation does for crowds; it
    forgives detections from an overlap of 0.5 on. Boxes that stand for an object stay, as there too an object is found
    first and a crowd takes the rest; matterport/Mask_RCNN trains so. Others drop such objects also: Detectron
    (CROWD_FILTER_THRESH 0.7, proposals only) and mmdetection (`ignore_iof_thr`), whose published configurations switch
    it off with -1, so that crowds are background.

    Args:
        labels: (…, N) 0 for background, above for objects, below for neither.
        boxes: (…, N, 4) or (N, 4) xyxy.
        regions: (…, I, 4) xyxy; empty places change nothing.
        overlap: From this share of its area in one region on, a box is not background; None changes nothing.

    Returns:
        (…, N) labels, -1 where background was taken out.
    """
    if overlap is None or not regions.shape[-2]:
        return labels
    most = torch.zeros_like(labels, dtype=boxes.dtype)
    for some in _parts(regions, labels.numel()):
        most = torch.maximum(most, _shared_area(some, boxes).amax(dim=-2))
    lies_inside = (most > 0) & (most >= overlap * _area(boxes))
    return torch.where((labels == 0) & lies_inside, -1, labels)


@dataclass(frozen=True)
class Samples:
    """The boxes that a head is trained on: of one image, or of a batch with a first axis more.

    Objects come first, then background, then the places that are left over.

    Attributes:
        boxes: (…, N, 4) xyxy in pixels.
        labels: (…, N) int64: the class from 1, 0 for background, NO_SAMPLE for an empty place.
        matched: (…, N) int64: the object each box stands for; any for background.
        matched_boxes: (…, N, 4) the box of that object; any for background.
        is_object_itself: (…, N) bool: an object's own box, which came in beside the proposals.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    matched_boxes: Tensor
    is_object_itself: Tensor

    def first(self, count: int) -> Samples:
        """The first boxes of one image."""
        return Samples(*(value[:count] for value in vars(self).values()))

    def places(self) -> list[Samples]:
        """The images of a batch, empty places and all; the host need not know how many are filled."""
        return [Samples(*values) for values in zip(*vars(self).values(), strict=True)]

    def trimmed(self) -> tuple[list[Samples], list[Samples]]:
        """The images of a batch without empty places, and of these the objects; waits for the device."""
        counts = torch.stack(((self.labels >= 0).sum(dim=1), (self.labels > 0).sum(dim=1)), dim=1).tolist()
        images = [image.first(filled) for image, (filled, _) in zip(self.places(), counts, strict=True)]
        return images, [image.first(objects) for image, (_, objects) in zip(images, counts, strict=True)]


def joined(images: Sequence[Samples]) -> Samples:
    """The samples of several images, one after the other."""
    return Samples(*map(torch.cat, zip(*(vars(image).values() for image in images), strict=True)))


@dataclass
class BalancedSampler:
    """Choose at random: up to a share of objects, the rest background.

    torchvision's `BalancedPositiveNegativeSampler` for a whole batch, without a host that waits for numbers.

    Attributes:
        batch_size_per_image: How many are chosen of one image, where there are so many.
        positive_fraction: The largest share of objects.
    """

    batch_size_per_image: int
    positive_fraction: float

    @property
    def most_objects(self) -> int:
        """The largest number of objects in one image."""
        return int(self.batch_size_per_image * self.positive_fraction)

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            labels: (B, N): above 0 for objects, 0 for background, below for what cannot be chosen.

        Returns:
            Rows (B, S) int64, where S is `batch_size_per_image` or N, objects first; and (B, S) bool, which of these
            places are filled.
        """
        num_boxes = labels.shape[1]
        order = torch.rand(labels.shape, device=labels.device)
        objects = torch.where(labels > 0, order, -1).topk(min(self.most_objects, num_boxes))
        background = torch.where(labels == 0, order, -1).topk(min(self.batch_size_per_image, num_boxes))
        is_object = objects.values >= 0
        places_left = self.batch_size_per_image - is_object.sum(dim=1, keepdim=True)
        is_background = background.values >= 0
        is_background &= torch.arange(is_background.shape[1], device=labels.device) < places_left
        rows = torch.cat((objects.indices, background.indices), dim=1)
        is_filled = torch.cat((is_object, is_background), dim=1)
        filled_first = is_filled.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        filled_first = filled_first[:, : min(self.batch_size_per_image, num_boxes)]
        return rows.gather(1, filled_first), is_filled.gather(1, filled_first)


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
        self.draw = BalancedSampler(samples_per_image, positive_fraction)

    @property
    def most_objects(self) -> int:
        """The largest number of samples of one image that stand for objects."""
        return self.draw.most_objects

    def __call__(self, proposals: Sequence[Tensor], targets: Sequence[TrainingTarget]) -> Samples:
        """Per image proposals (M_i, 4) xyxy, empty places or not, and its objects, to the samples of the batch."""
        proposed = stack_boxes(proposals)
        objects = stack_boxes([target["boxes"].to(proposed.dtype) for target in targets])
        boxes = torch.cat((proposed, objects), dim=1)
        matches = self.matcher(objects, boxes)
        matched = matches.clamp(min=0)
        labels, matched_boxes = torch.zeros_like(matches), boxes
        if objects.shape[1]:
            classes = pad_sequence([target["labels"] for target in targets], batch_first=True)
            labels = torch.where(matches >= 0, classes.gather(1, matched), 0)
            matched_boxes = rows_of(objects, matched)
        regions = stack_boxes([target["ignored_boxes"].to(boxes.dtype) for target in targets])
        labels = without_ignored(labels, boxes, regions, self.ignore_overlap)
        labels = torch.where(is_box(boxes), labels, NO_SAMPLE)
        rows, is_filled = self.draw(labels)
        return Samples(
            emptied(rows_of(boxes, rows), ~is_filled),
            torch.where(is_filled, labels.gather(1, rows), NO_SAMPLE),
            matched.gather(1, rows),
            rows_of(matched_boxes, rows),
            (rows >= proposed.shape[1]) & is_filled,
        )


def rows_of(boxes: Tensor, rows: Tensor) -> Tensor:
    """Boxes (B, N, 4) and row numbers (B, M) to (B, M, 4)."""
    return boxes.gather(1, rows[..., None].expand(-1, -1, 4))


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

    def encode(self, reference_boxes: list[Tensor], proposals: list[Tensor]) -> tuple[Tensor, ...]:
        """`encode_single` image by image."""
        return tuple(map(self.encode_single, reference_boxes, proposals))

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """The offsets from boxes to others, which `decode_single` undoes.

        Args:
            reference_boxes: (N, 4) xyxy, what is wanted.
            proposals: (N, 4) xyxy, what it is seen from.

        Returns:
            (N, 4) offsets (dx, dy, dw, dh).
        """
        size, wanted_size = (boxes[:, 2:] - boxes[:, :2] for boxes in (proposals, reference_boxes))
        centre, wanted_centre = proposals[:, :2] + size / 2, reference_boxes[:, :2] + wanted_size / 2
        offsets = torch.cat(((wanted_centre - centre) / size, (wanted_size / size).log()), dim=1)
        return offsets * beside(self.weights, offsets)

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
        offset, log_size = (deltas / beside(self.weights, deltas)).split(2, dim=-1)
        limit = math.log(1000 / 16)  # the published bound: no side grows or shrinks by more than 62.5
        centre = centre + offset * size
        half = size * log_size.clamp(-limit, limit).exp() / 2
        return torch.cat((centre - half, centre + half), dim=-1).flatten(1)
