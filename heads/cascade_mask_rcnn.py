"""Cascade Mask R-CNN on a Swin backbone with FPN: the published network.

Cascade R-CNN: High Quality Object Detection and Instance Segmentation (Cai and Vasconcelos, 2019),
https://arxiv.org/abs/1906.09756. It is `MaskRCNN` with RoI heads in three stages, see `cascade_roi_heads`:

    images -> backbone -> FPN -> region proposals
      -> box head 1 -> boxes -> box head 2 -> better boxes -> box head 3 -> final boxes -> masks of three mask heads
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from swin_dense.config import SwinConfig
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE
from swin_dense.heads.backbones import as_backbone
from swin_dense.heads.cascade_roi_heads import cascade_roi_heads
from swin_dense.heads.detector_settings import COCO_IGNORE_OVERLAP, DetectorSettings
from swin_dense.heads.mask_pasting import paste_masks
from swin_dense.heads.mask_rcnn import MaskRCNN, assemble_detector
from swin_dense.heads.rpn import cascade_rpn
from swin_dense.swin import SwinTransformer


def cascade_mask_rcnn(
    backbone: str | SwinConfig | SwinTransformer,
    num_classes: int,
    weights: str | None = None,
    fpn_channels: int = 256,
    box_head_channels: int = 1024,
    mask_head_channels: int = 256,
    score_threshold: float = 0.05,
    max_detections: int = 100,
    shared_regression: bool = False,
    anchor_scale: float = PUBLISHED_ANCHOR_SCALE,
    max_proposals: int = 1000,
    samples_per_image: int = 512,
    ignore_overlap: float | None = COCO_IGNORE_OVERLAP,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> MaskRCNN:
    """Cascade Mask R-CNN on a Swin backbone. Defaults are the published networks' (official configurations).

    Args:
        backbone: A variant name, a configuration, or a backbone.
        num_classes: K, background not counted.
        weights: A weights file to load into the model or into its backbone; None leaves random weights.
        fpn_channels: The channels of every pyramid level and of the convolutions of the box heads.
        box_head_channels: Width of the linear layer of each box head.
        mask_head_channels: Width of the mask heads.
        score_threshold: Detections at or below it are dropped.
        max_detections: The most detections of one image.
        shared_regression: All classes share one box per proposal; the published models have one for each class.
        anchor_scale: Anchor side over stride; smaller for small objects. Boxes change level in proportion to it.
        max_proposals: Proposals of one image, twice as many in training; fewer are faster.
        samples_per_image: Boxes that each stage is trained on, a quarter of them objects.
        ignore_overlap: What has this share of its area in a crowd or another region to ignore is not learnt as
            background; None learns it so, as the published models did.
        image_mean: Of each channel; None is ImageNet's.
        image_std: Of each channel; None is ImageNet's.

    Raises:
        ConfigError: A setting is out of range.
        CheckpointError: The weights do not fit.

    Example:
        >>> config = SwinConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
        >>> detector = cascade_mask_rcnn(config, num_classes=2, fpn_channels=16, box_head_channels=32).eval()
        >>> [sorted(result) for result in detector([torch.rand(3, 50, 70), torch.rand(3, 64, 33)])]
        [['boxes', 'labels', 'masks', 'scores'], ['boxes', 'labels', 'masks', 'scores']]
    """
    settings = DetectorSettings(
        num_classes=num_classes,
        fpn_channels=fpn_channels,
        box_head_channels=box_head_channels,
        mask_head_channels=mask_head_channels,
        score_threshold=score_threshold,
        max_detections=max_detections,
        anchor_scale=anchor_scale,
        max_proposals=max_proposals,
        samples_per_image=samples_per_image,
        ignore_overlap=ignore_overlap,
        image_mean=image_mean,
        image_std=image_std,
    )
    return assemble_detector(
        as_backbone(backbone),
        settings,
        build_rpn=cascade_rpn,
        build_roi_heads=partial(cascade_roi_heads, shared_regression=shared_regression),
        paste=paste_masks,
        described_as={"head": "cascade_mask_rcnn", "shared_regression": shared_regression},
        weights=weights,
    )
