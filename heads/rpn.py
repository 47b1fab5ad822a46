"""Region proposal network: torchvision's, with the published models' anchors, labels and losses.

Faster R-CNN (Ren et al., 2015), https://arxiv.org/abs/1506.01497. Numbers from the official configurations
mask_rcnn_swin_fpn.py and cascade_mask_rcnn_swin_fpn.py, as SwinTransformer/Swin-Transformer-Object-Detection has them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PyramidAnchors
from swin_dense.heads.box_batches import beside, clip_boxes, counts_are_known, emptied, stack_boxes
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.grouped_suppression import grouped_nms
from swin_dense.heads.losses import proposal_losses
from swin_dense.heads.matching import (
    NEGATIVE,
    NO_SAMPLE,
    BalancedSampler,
    BoxCoder,
    MaxIoUMatcher,
    rows_of,
    without_ignored,
)
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.targets import TrainingTarget
from swin_dense.training.loss_terms import LossTerm

_SAMPLES_PER_IMAGE, _POSITIVE_FRACTION = 256, 0.5
_COMMON_NUMBERS = {
    "fg_iou_thresh": 0.7,
    "bg_iou_thresh": 0.3,
    "batch_size_per_image": _SAMPLES_PER_IMAGE,
    "positive_fraction": _POSITIVE_FRACTION,
    "nms_thresh": 0.7,
}

TakesPart = Callable[[Tensor, Sequence[TrainingTarget]], Tensor]


class RPNHead(torchvision_rpn.RPNHead):
    """torchvision's convolutions, with logits and offsets at full precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (B, C, h, w) to objectness logits (B, A, h, w) and offsets (B, 4 A, h, w) per level."""
        logits, deltas = super().forward(x)
        return [at_least_float32(level) for level in logits], [at_least_float32(level) for level in deltas]


@dataclass(frozen=True)
class AnchorOutputs:
    """What the head says of all anchors of a batch.

    Attributes:
        anchors: Per image (A, 4) xyxy.
        objectness: (B, A) logits.
        deltas: (B, A, 4) offsets.
        counts: The anchors of each level; A in all.
    """

    anchors: list[Tensor]
    objectness: Tensor
    deltas: Tensor
    counts: list[int]


class SteppedProposalNetwork(torchvision_rpn.RegionProposalNetwork, ABC):
    """torchvision's network in steps, so that one pass through the head serves detection and training alike."""

    def forward(
        self, images: ImageList, features: Mapping[str, Tensor], targets: Sequence[TrainingTarget] | None = None
    ) -> tuple[list[Tensor], dict[str, LossTerm]]:
        """Proposals, and in training losses.

        Args:
            images: The batch, with the sizes of its images.
            features: {name: (B, C, h, w)}.
            targets: Per image; training only.

        Returns:
            Per image (N, 4) xyxy in input pixels, the best first, in training maybe followed by empty places, see
            `box_batches`; losses, none in evaluation.
        """
        outputs = self.anchor_outputs(images, features)
        proposals = self.proposals(outputs, images.image_sizes)
        if not self.training:
            return proposals, {}
        assert targets is not None
        return proposals, self.losses(outputs, targets)

    def as_in_training(self) -> SteppedProposalNetwork:
        """The same network, weights and all, that proposes as many boxes as in training, whatever the mode of this."""
        twin = copy(self)
        twin.training = True  # of this module alone: its parts stay in the mode they are in
        return twin

    def anchor_outputs(self, images: ImageList, features: Mapping[str, Tensor]) -> AnchorOutputs:
        """One pass through the head; arguments as those of `forward`."""
        levels = list(features.values())
        objectness, deltas = self.head(levels)
        anchors = self.anchor_generator(images, objectness)
        counts = [level[0].numel() for level in objectness]
        objectness, deltas = torchvision_rpn.concat_box_prediction_layers(objectness, deltas)
        num_images = len(anchors)
        return AnchorOutputs(anchors, objectness.view(num_images, -1), deltas.view(num_images, -1, 4), counts)

    @abstractmethod
    def proposals(self, outputs: AnchorOutputs, sizes_hw: list[tuple[int, int]]) -> list[Tensor]:
        """The best boxes of images of (H, W), as `forward` gives them; in training more than in evaluation."""

    @abstractmethod
    def losses(self, outputs: AnchorOutputs, targets: Sequence[TrainingTarget]) -> dict[str, LossTerm]:
        """The losses of anchors that are sampled at random."""


class RegionProposalNetwork(SteppedProposalNetwork):
    """torchvision's network with three corrections: which anchors count, the smallest box, the box loss.

    All images of a batch go through each step together, and in training no step makes the host wait for a GPU.

    Args:
        anchors: All anchors of an image.
        head: Objectness and offsets of every anchor.
        max_proposals: Proposals of one image in evaluation, and of one level before suppression.
        max_training_proposals: Proposals of one image in training; twice `max_proposals` of each level are looked at.
        takes_part: From anchors (A, 4) and targets of B images to (B, A) bool: which anchors are trained on.
        box_loss_beta: Of the smooth L1 loss, see `losses.proposal_losses`.
        ignore_overlap: See `matching.without_ignored`.
    """

    def __init__(
        self,
        anchors: PyramidAnchors,
        head: RPNHead,
        max_proposals: int,
        max_training_proposals: int,
        takes_part: TakesPart,
        box_loss_beta: float,
        ignore_overlap: float | None,
    ) -> None:
        super().__init__(
            anchors,
            head,
            **_COMMON_NUMBERS,
            pre_nms_top_n={"training": 2 * max_proposals, "testing": max_proposals},
            post_nms_top_n={"training": max_training_proposals, "testing": max_proposals},
        )
        self.proposal_matcher = MaxIoUMatcher(positive_iou=0.7, negative_iou=0.3, minimum_iou=0.3)
        self.fg_bg_sampler = BalancedSampler(_SAMPLES_PER_IMAGE, _POSITIVE_FRACTION)
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.takes_part = takes_part
        self.box_loss_beta = box_loss_beta
        self.ignore_overlap = ignore_overlap

    def proposals(self, outputs: AnchorOutputs, sizes_hw: list[tuple[int, int]]) -> list[Tensor]:
        """As in `SteppedProposalNetwork`: the best anchors of each level, moved, clipped to the image, suppressed."""
        rows, levels = self._best_of_each_level(outputs.objectness.detach(), outputs.counts)
        scores = outputs.objectness.detach().gather(1, rows).sigmoid()
        boxes = self.box_coder.decode_single(
            rows_of(outputs.deltas.detach(), rows).flatten(0, 1), outputs.anchors[0][rows].flatten(0, 1)
        )
        boxes = clip_boxes(boxes.view(*rows.shape, 4), beside(sizes_hw, boxes)[:, None])
        has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        scores = scores.masked_fill(~has_area, -math.inf)
        num_images, num_levels = len(boxes), len(outputs.counts)
        groups = torch.arange(num_images, device=boxes.device)[:, None] * num_levels + levels
        is_kept = grouped_nms(
            boxes.flatten(0, 1), scores.flatten(), groups.flatten(), num_images * num_levels, self.nms_thresh
        )
        scores, order = scores.masked_fill(~is_kept.view(scores.shape), -math.inf).sort(descending=True, stable=True)
        most = min(self.post_nms_top_n(), scores.shape[1])
        is_empty = scores[:, :most] == -math.inf
        proposals = emptied(rows_of(boxes, order[:, :most]), is_empty)
        if self.training and not counts_are_known(proposals):
            return list(proposals)
        return [image[:count] for image, count in zip(proposals, (~is_empty).sum(dim=1).tolist(), strict=True)]

    def _best_of_each_level(self, objectness: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows of anchors (B, N), the best of each level, and the level of each (N,)."""
        numbers = [min(self.pre_nms_top_n(), count) for count in counts]
        best = [level.topk(number).indices for level, number in zip(objectness.split(counts, 1), numbers, strict=True)]
        starts = accumulate(counts[:-1], initial=0)
        rows = torch.cat([level + start for level, start in zip(best, starts, strict=True)], dim=1)
        levels = torch.cat([torch.full((number,), level, device=rows.device) for level, number in enumerate(numbers)])
        return rows, levels

    def losses(self, outputs: AnchorOutputs, targets: Sequence[TrainingTarget]) -> dict[str, LossTerm]:
        """The losses of anchors that are sampled at random."""
        labels, matched_boxes = self.assign_targets_to_anchors(outputs.anchors, targets)
        rows, is_sampled = self.fg_bg_sampler(labels)
        labels = torch.where(is_sampled, labels.gather(1, rows), NO_SAMPLE).flatten()
        wanted = self.box_coder.encode_single(
            rows_of(matched_boxes, rows).flatten(0, 1), outputs.anchors[0][rows].flatten(0, 1)
        )
        objectness_loss, box_loss = proposal_losses(
            outputs.objectness.gather(1, rows).flatten(),
            rows_of(outputs.deltas, rows).flatten(0, 1),
            labels,
            wanted,
            self.box_loss_beta,
        )
        count = (labels >= 0).sum()
        return {"loss_objectness": LossTerm(objectness_loss, count), "loss_rpn_box_reg": LossTerm(box_loss, count)}

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: Sequence[TrainingTarget]
    ) -> tuple[Tensor, Tensor]:
        """As torchvision's, among the anchors that take part.

        Args:
            anchors: Per image (A, 4), the same in all.
            targets: Per image.

        Returns:
            Labels (B, A): 1 object, 0 background, -1 no part; and boxes (B, A, 4): the objects', elsewhere the anchors
            themselves.
        """
        of_image = anchors[0]
        takes_part = self.takes_part(of_image, targets)
        objects = stack_boxes([target["boxes"].to(of_image.dtype) for target in targets])
        matches = self.proposal_matcher(objects, of_image, takes_part)
        is_object = matches >= 0
        labels = torch.where(is_object, 1, torch.where(takes_part & (matches == NEGATIVE), 0, -1)).to(of_image.dtype)
        regions = stack_boxes([target["ignored_boxes"].to(of_image.dtype) for target in targets])
        labels = without_ignored(labels, of_image, regions, self.ignore_overlap)
        matched_boxes = of_image.expand(len(targets), -1, -1)
        if objects.shape[1]:
            matched_boxes = torch.where(is_object[..., None], rows_of(objects, matches.clamp(min=0)), matched_boxes)
        return labels, matched_boxes


class TorchvisionRegionProposalNetwork(SteppedProposalNetwork):
    """torchvision's network as it is, image by image, with its losses as terms."""

    def proposals(self, outputs: AnchorOutputs, sizes_hw: list[tuple[int, int]]) -> list[Tensor]:
        """As in `SteppedProposalNetwork`."""
        num_images = len(outputs.anchors)
        boxes = self.box_coder.decode(outputs.deltas.detach().flatten(0, 1), outputs.anchors).view(num_images, -1, 4)
        proposals, _ = self.filter_proposals(boxes, outputs.objectness.flatten()[:, None], sizes_hw, outputs.counts)
        return proposals

    def losses(self, outputs: AnchorOutputs, targets: Sequence[TrainingTarget]) -> dict[str, LossTerm]:
        """The losses of anchors that are sampled at random.

        Both are means over the sampled anchors, whose number follows from the labels.
        """
        labels, matched_boxes = self.assign_targets_to_anchors(outputs.anchors, targets)
        wanted = self.box_coder.encode(matched_boxes, outputs.anchors)
        objectness, deltas = outputs.objectness.flatten()[:, None], outputs.deltas.flatten(0, 1)
        losses = self.compute_loss(objectness, deltas, labels, wanted)
        count = sum(self._num_samples(image_labels) for image_labels in labels)
        objectness_loss, box_loss = (LossTerm(loss, count) for loss in losses)
        return {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}

    def _num_samples(self, labels: Tensor) -> int:
        sampler = self.fg_bg_sampler
        most = sampler.batch_size_per_image
        positive = min(int((labels >= 1).sum()), int(most * sampler.positive_fraction))
        return positive + min(int((labels == 0).sum()), most - positive)


def cells_inside(anchors: Tensor, targets: Sequence[TrainingTarget]) -> Tensor:
    """Anchors whose cell begins inside the image: (A, 4) and B "padded_size_hw" to (B, A) bool.

    That size is the image's own, rounded up to whole cells of the coarsest backbone map, before it is padded to the
    size of the batch.
    """
    sizes_xy = beside([target["padded_size_hw"][::-1] for target in targets], anchors)
    cell_corner_xy = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (cell_corner_xy < sizes_xy[:, None] - 1e-3).all(dim=-1)


def anchors_inside(anchors: Tensor, targets: Sequence[TrainingTarget]) -> Tensor:
    """Anchors that lie inside the image as a whole: (A, 4) and B "size_hw" to (B, A) bool."""
    sizes_xy = beside([target["size_hw"][::-1] for target in targets], anchors)
    return ((anchors[:, :2] >= 0) & (anchors[:, 2:] < sizes_xy[:, None])).all(dim=-1)


def published_rpn(feature_specs: Mapping[str, FeatureSpec], settings: DetectorSettings) -> RegionProposalNetwork:
    """The RPN of the published Mask R-CNN, from mask_rcnn_swin_fpn.py of the official configurations.

    Args:
        feature_specs: The pyramid's levels.
        settings: All numbers.
    """
    return _corrected_rpn(feature_specs, settings, settings.max_proposals, cells_inside, box_loss_beta=0.0)


def cascade_rpn(feature_specs: Mapping[str, FeatureSpec], settings: DetectorSettings) -> RegionProposalNetwork:
    """The RPN of the published Cascade Mask R-CNN, from cascade_mask_rcnn_swin_fpn.py.

    It trains with twice as many proposals (`rpn_proposal.max_per_img=2000`), not on anchors that cross the image's
    border (`allowed_border=0`), and with a smooth L1 loss (`beta=1/9`). Arguments as for `published_rpn`.
    """
    return _corrected_rpn(feature_specs, settings, 2 * settings.max_proposals, anchors_inside, box_loss_beta=1 / 9)


def _corrected_rpn(
    feature_specs: Mapping[str, FeatureSpec],
    settings: DetectorSettings,
    max_training_proposals: int,
    takes_part: TakesPart,
    box_loss_beta: float,
) -> RegionProposalNetwork:
    anchors = PyramidAnchors(feature_specs, settings.anchor_scale)
    return RegionProposalNetwork(
        anchors,
        RPNHead(settings.fpn_channels, anchors.num_anchors_per_location()[0]),
        settings.max_proposals,
        max_training_proposals,
        takes_part,
        box_loss_beta,
        settings.ignore_overlap,
    )


def torchvision_rpn_defaults(
    feature_specs: Mapping[str, FeatureSpec], settings: DetectorSettings
) -> TorchvisionRegionProposalNetwork:
    """The RPN as torchvision builds it for its own Mask R-CNN. Arguments as for `published_rpn`."""
    sizes = tuple((int(settings.anchor_scale * spec.stride),) for spec in feature_specs.values())
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    most = settings.max_proposals
    return TorchvisionRegionProposalNetwork(
        anchors,
        RPNHead(settings.fpn_channels, anchors.num_anchors_per_location()[0]),
        **_COMMON_NUMBERS,
        pre_nms_top_n={"training": 2 * most, "testing": most},
        post_nms_top_n={"training": 2 * most, "testing": most},
    )
