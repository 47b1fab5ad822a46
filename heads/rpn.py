"""Region proposal network: torchvision's, with the published models' anchors, labels and losses.

Faster R-CNN (Ren et al., 2015), https://arxiv.org/abs/1506.01497. Numbers from the official configuration
mask_rcnn_swin_tiny_patch4_window7_mstrain_480-800_adamw_1x_coco.py and what it inherits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PyramidAnchors
from swin_dense.heads.losses import proposal_losses
from swin_dense.heads.matching import BoxCoder, MaxIoUMatcher
from swin_dense.heads.precision import at_least_float32

Targets = list[dict[str, Tensor]]


class RPNHead(torchvision_rpn.RPNHead):
    """torchvision's convolutions, with logits and offsets at full precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (B, C, h, w) to objectness logits (B, A, h, w) and offsets (B, 4 A, h, w) per level."""
        logits, deltas = super().forward(x)
        return [at_least_float32(level) for level in logits], [at_least_float32(level) for level in deltas]


class RegionProposalNetwork(torchvision_rpn.RegionProposalNetwork):
    """torchvision's network with three corrections: which anchors count, the smallest box, the box loss."""

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's, but anchors in the padding of an image take no part.

        Args:
            anchors: Per image (A, 4).
            targets: Per image "boxes" (G, 4) and "padded_size_hw" (2,): the image's own size rounded up to whole
                cells of the coarsest backbone map, before padding to the size of the batch.

        Returns:
            Per image labels (A,): 1 object, 0 background, -1 no part; and matched boxes (A, 4).
        """
        labels, matched_boxes = super().assign_targets_to_anchors(anchors, targets)
        for image_labels, image_anchors, target in zip(labels, anchors, targets, strict=True):
            cell_corner_xy = (image_anchors[:, :2] + image_anchors[:, 2:]) / 2
            outside = (cell_corner_xy >= target["padded_size_hw"].flip(0) - 1e-3).any(dim=1)
            image_labels[outside] = -1.0
        return labels, matched_boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sample anchors and compare them with their targets; see `losses.proposal_losses`."""
        positive, negative = self.fg_bg_sampler(labels)
        positive_rows = torch.where(torch.cat(positive))[0]
        sampled_rows = torch.cat((positive_rows, torch.where(torch.cat(negative))[0]))
        return proposal_losses(
            objectness.flatten(),
            pred_bbox_deltas,
            torch.cat(labels),
            torch.cat(regression_targets),
            positive_rows,
            sampled_rows,
        )


def published_rpn(
    feature_specs: Mapping[str, FeatureSpec], channels: int, anchor_scale: float, max_proposals: int
) -> RegionProposalNetwork:
    """The RPN of the published models.

    Args:
        feature_specs: The pyramid's levels.
        channels: The channels of every level.
        anchor_scale: Anchor side over stride.
        max_proposals: Proposals of one image; in training twice as many of each level are looked at.
    """
    anchors = PyramidAnchors(feature_specs, anchor_scale)
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * max_proposals, "testing": max_proposals},
        post_nms_top_n={"training": max_proposals, "testing": max_proposals},
        nms_thresh=0.7,
    )
    rpn.proposal_matcher = MaxIoUMatcher(positive_iou=0.7, negative_iou=0.3, minimum_iou=0.3)
    rpn.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    rpn.min_size = torch.finfo(torch.float32).tiny  # any box with an area
    return rpn


def torchvision_rpn_defaults(
    feature_specs: Mapping[str, FeatureSpec], channels: int, anchor_scale: float, max_proposals: int
) -> torchvision_rpn.RegionProposalNetwork:
    """The RPN as torchvision builds it for its own Mask R-CNN. Arguments as for `published_rpn`."""
    sizes = tuple((int(anchor_scale * spec.stride),) for spec in feature_specs.values())
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return torchvision_rpn.RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * max_proposals, "testing": max_proposals},
        post_nms_top_n={"training": 2 * max_proposals, "testing": max_proposals},
        nms_thresh=0.7,
    )
