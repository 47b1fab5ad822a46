"""Region proposal network: torchvision's, with the published models' anchors, labels and losses.

Faster R-CNN (Ren et al., 2015), https://arxiv.org/abs/1506.01497. Numbers from the official configurations
mask_rcnn_swin_fpn.py and cascade_mask_rcnn_swin_fpn.py, as SwinTransformer/Swin-Transformer-Object-Detection has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PyramidAnchors
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.losses import proposal_losses
from swin_dense.heads.matching import NEGATIVE, BoxCoder, MaxIoUMatcher, without_ignored
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.targets import TrainingTarget
from swin_dense.training.loss_terms import LossTerm

_COMMON_NUMBERS = {
    "fg_iou_thresh": 0.7,
    "bg_iou_thresh": 0.3,
    "batch_size_per_image": 256,
    "positive_fraction": 0.5,
    "nms_thresh": 0.7,
}


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
        objectness: (B A, 1) logits.
        deltas: (B A, 4) offsets.
        boxes: (B, A, 4) xyxy, the anchors moved by their offsets, without a gradient.
        counts: The anchors of each level; A in all.
    """

    anchors: list[Tensor]
    objectness: Tensor
    deltas: Tensor
    boxes: Tensor
    counts: list[int]


class SteppedProposalNetwork(torchvision_rpn.RegionProposalNetwork):
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
            Per image (N, 4) xyxy in input pixels, the best first; losses, none in evaluation.
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
        anchors = self.anchor_generator(images, levels)
        counts = [level[0].numel() for level in objectness]
        objectness, deltas = torchvision_rpn.concat_box_prediction_layers(objectness, deltas)
        boxes = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        return AnchorOutputs(anchors, objectness, deltas, boxes, counts)

    def proposals(self, outputs: AnchorOutputs, sizes_hw: list[tuple[int, int]]) -> list[Tensor]:
        """The best boxes of images of (H, W), per image (N, 4); in training more than in evaluation."""
        proposals, _ = self.filter_proposals(outputs.boxes, outputs.objectness, sizes_hw, outputs.counts)
        return proposals

    def losses(self, outputs: AnchorOutputs, targets: Sequence[TrainingTarget]) -> dict[str, LossTerm]:
        """The losses of anchors that are sampled at random."""
        labels, matched_boxes = self.assign_targets_to_anchors(outputs.anchors, targets)
        wanted = self.box_coder.encode(matched_boxes, outputs.anchors)
        objectness_loss, box_loss = self.compute_loss(outputs.objectness, outputs.deltas, labels, wanted)
        return {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}


class RegionProposalNetwork(SteppedProposalNetwork):
    """torchvision's network with three corrections: which anchors count, the smallest box, the box loss.

    Args:
        anchors: All anchors of an image.
        head: Objectness and offsets of every anchor.
        max_proposals: Proposals of one image in evaluation, and of one level before suppression.
        max_training_proposals: Proposals of one image in training; twice `max_proposals` of each level are looked at.
        takes_part: From anchors (A, 4) and a target to (A,) bool: which anchors are trained on.
        box_loss_beta: Of the smooth L1 loss, see `losses.proposal_losses`.
        ignore_overlap: See `matching.without_ignored`.
    """

    def __init__(
        self,
        anchors: PyramidAnchors,
        head: RPNHead,
        max_proposals: int,
        max_training_proposals: int,
        takes_part: Callable[[Tensor, TrainingTarget], Tensor],
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
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.min_size = torch.finfo(torch.float32).tiny  # any box with an area
        self.takes_part = takes_part
        self.box_loss_beta = box_loss_beta
        self.ignore_overlap = ignore_overlap

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[TrainingTarget]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's, among the anchors that take part.

        Args:
            anchors: Per image (A, 4).
            targets: Per image.

        Returns:
            Per image labels (A,): 1 object, 0 background, -1 no part; and boxes (A, 4): the objects', elsewhere the
            anchors themselves.
        """
        assigned = [self._assign(image_anchors, target) for image_anchors, target in zip(anchors, targets, strict=True)]
        labels, matched_boxes = zip(*assigned, strict=True)
        return list(labels), list(matched_boxes)

    def _assign(self, anchors: Tensor, target: TrainingTarget) -> tuple[Tensor, Tensor]:
        labels, matched_boxes = anchors.new_full((len(anchors),), -1), anchors.clone()
        rows = self.takes_part(anchors, target).nonzero().squeeze(1)
        objects = target["boxes"].to(anchors.dtype)
        matches = self.proposal_matcher(objects, anchors[rows])
        labels[rows] = torch.where(matches >= 0, 1, torch.where(matches == NEGATIVE, 0, -1)).to(labels.dtype)
        is_object = matches >= 0
        matched_boxes[rows[is_object]] = objects[matches[is_object]]
        regions = target["ignored_boxes"].to(anchors.dtype)
        return without_ignored(labels, anchors, regions, self.ignore_overlap), matched_boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[LossTerm, LossTerm]:
        """Sample anchors and compare them with their targets; see `losses.proposal_losses`."""
        positive, negative = self.fg_bg_sampler(labels)
        positive_rows = torch.where(torch.cat(positive))[0]
        sampled_rows = torch.cat((positive_rows, torch.where(torch.cat(negative))[0]))
        losses = proposal_losses(
            objectness.flatten(),
            pred_bbox_deltas,
            torch.cat(labels),
            torch.cat(regression_targets),
            positive_rows,
            sampled_rows,
            self.box_loss_beta,
        )
        objectness_loss, box_loss = (LossTerm(loss, len(sampled_rows)) for loss in losses)
        return objectness_loss, box_loss


class TorchvisionRegionProposalNetwork(SteppedProposalNetwork):
    """torchvision's network as it is, with its losses as terms."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[LossTerm, LossTerm]:
        """As torchvision's; both are means over the sampled anchors, whose number follows from the labels."""
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        count = sum(self._num_samples(image_labels) for image_labels in labels)
        objectness_loss, box_loss = (LossTerm(loss, count) for loss in losses)
        return objectness_loss, box_loss

    def _num_samples(self, labels: Tensor) -> int:
        sampler = self.fg_bg_sampler
        most = sampler.batch_size_per_image
        positive = min(int((labels >= 1).sum()), int(most * sampler.positive_fraction))
        return positive + min(int((labels == 0).sum()), most - positive)


def cells_inside(anchors: Tensor, target: TrainingTarget) -> Tensor:
    """Anchors whose cell begins inside the image: (A, 4) and "padded_size_hw" (2,) to (A,) bool.

    That size is the image's own, rounded up to whole cells of the coarsest backbone map, before it is padded to the
    size of the batch.
    """
    cell_corner_xy = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (cell_corner_xy < target["padded_size_hw"].flip(0) - 1e-3).all(dim=1)


def anchors_inside(anchors: Tensor, target: TrainingTarget) -> Tensor:
    """Anchors that lie inside the image as a whole: (A, 4) and "size_hw" (2,) to (A,) bool."""
    return (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] < target["size_hw"].flip(0)).all(dim=1)


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
    takes_part: Callable[[Tensor, TrainingTarget], Tensor],
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
