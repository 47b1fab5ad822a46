"""Mask R-CNN on a Swin backbone with FPN: the published network, from torchvision's parts.

Mask R-CNN (He et al., 2017), https://arxiv.org/abs/1703.06870. Images of any sizes go in as they are; the model
normalises and pads, it never resizes.

    images  list of (3, H, W) -> normalise, pad to one batch
      -> backbone  {"c2" .. "c5"} -> FPN {"p2" .. "p6"}
      -> region proposals (all levels) -> box head and mask head (p2 .. p5)
      -> training: losses; evaluation: boxes, labels, scores, masks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError, DataError
from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE
from swin_dense.heads.backbones import Normalize, as_backbone
from swin_dense.heads.detector_settings import COCO_IGNORE_OVERLAP, DetectorSettings
from swin_dense.heads.fpn import FPN
from swin_dense.heads.mask_pasting import paste_masks
from swin_dense.heads.roi_heads import published_roi_heads
from swin_dense.heads.rpn import SteppedProposalNetwork, published_rpn, torchvision_rpn_defaults
from swin_dense.heads.targets import Target, TrainingTarget, check_target, training_target
from swin_dense.heads.torchvision_roi_heads import torchvision_roi_heads
from swin_dense.swin import SwinTransformer
from swin_dense.training.loss_terms import LossTerm, means
from swin_dense.training.random_state import repeated_random_state
from swin_dense.windows import missing_to_multiple

Style = Literal["published", "torchvision"]


class PasteMasks(Protocol):
    """(N, 1, M, M) masks, (N, 4) boxes and (H, W) to (N, 1, H, W)."""

    def __call__(self, masks: Tensor, boxes: Tensor, size_hw: tuple[int, int], /) -> Tensor:
        """Paste."""


class MaskRCNN(nn.Module):
    """Mask R-CNN from its parts; with other RoI heads, Cascade Mask R-CNN.

    Args:
        backbone: Maps c2 to c5.
        fpn: Levels p2 to p6.
        rpn: Proposals from all levels.
        roi_heads: Detections from proposals; class 0 is background in there.
        normalize: Shifts and scales image channels.
        paste: From the mask head's squares to masks of the image.
        num_classes: K, background not counted.
        architecture: What the builder was called with, in plain types, so that a file can rebuild the model.
    """

    compiled_parts = ("backbone", "fpn")  # by `swin_dense.compile`

    def __init__(
        self,
        backbone: SwinTransformer,
        fpn: FPN,
        rpn: SteppedProposalNetwork,
        roi_heads: nn.Module,
        normalize: Normalize,
        paste: PasteMasks,
        num_classes: int,
        architecture: dict[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.roi_heads: Any = roi_heads  # of one of the kinds that have `losses` beside `forward`
        self.normalize = normalize
        self.paste = paste
        self.num_classes = num_classes
        self.architecture = architecture

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: B tensors (3, H, W), RGB float in [0, 1], of any sizes.
            targets: Training only; per image
                "boxes":   (N, 4) float xyxy in pixels of that image,
                "labels":  (N,) int64 in [0, K),
                "masks":   (N, H, W) uint8, 0 or 1, or `BoxMasks`, which hold the same in a fraction of the memory,
                "iscrowd": (N,) bool, optional; a crowd, or any region to ignore, takes no part in training: nothing in
                           it is learnt as an object, nor, see `ignore_overlap` of the builder, as background.
                N may be 0.

        Returns:
            In training {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}, to be
            summed; a cascade has "loss_classifier_0", "loss_box_reg_0", "loss_mask_0" and so on, one of each per stage.
            Otherwise per image, by falling score,
                "boxes":  (D, 4) xyxy in pixels of that image,
                "labels": (D,) int64 in [0, K),
                "scores": (D,) in [0, 1],
                "masks":  (D, 1, H, W) float in [0, 1]; from 0.5 on a pixel belongs to the object.

        Raises:
            ConfigError: Images of a wrong kind, or no targets in training.
            DataError: A target that does not fit its image or the number of classes.
        """
        if self.training:
            if targets is None:
                raise ConfigError("training needs targets: call model(images, targets), or model.eval() to predict.")
            return means(self.loss_terms(images, targets))
        results = self.detect(images)
        for result, image in zip(results, images, strict=True):
            result["masks"] = self.paste(result["masks"], result["boxes"], (image.shape[1], image.shape[2]))
        return results

    def loss_terms(
        self, images: Sequence[Tensor], targets: Sequence[Target], least_size_hw: tuple[int, int] = (0, 0)
    ) -> dict[str, LossTerm]:
        """The losses of a batch as in `forward`, with what each is a mean over; arguments as there and in `pyramid`."""
        inner = self._training_targets(images, targets)
        batch, levels = self.pyramid(images, least_size_hw)
        proposals, proposal_losses = self.rpn(batch, levels, inner)
        _, detection_losses = self.roi_heads(levels, proposals, batch.image_sizes, inner)
        return {**proposal_losses, **detection_losses}

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections with masks relative to their boxes: as `forward` in evaluation, but "masks" is (D, 1, M, M)."""
        batch, levels = self.pyramid(images)
        proposals, _ = self.rpn(batch, levels, None)
        return self._detections(batch, levels, proposals)

    def detect_with_losses(
        self, images: Sequence[Tensor], targets: Sequence[Target]
    ) -> tuple[list[dict[str, Tensor]], dict[str, LossTerm]]:
        """Detections and losses of the same images from one pass, for validation; the model is in evaluation mode.

        The losses are those of training, on as many proposals and samples, but all layers behave as in evaluation:
        no path is dropped, batch normalisation keeps to its running statistics. What is sampled is drawn alike in every
        call, so that losses can be compared, and leaves the generators as they were.

        Args:
            images: As in `forward`.
            targets: As in `forward`.

        Returns:
            What `detect` gives, bit for bit, and the losses with what each is a mean over.

        Raises:
            ConfigError: As in `forward`.
            DataError: As in `forward`.
        """
        inner = self._training_targets(images, targets)
        batch, levels = self.pyramid(images)
        outputs = self.rpn.anchor_outputs(batch, levels)
        detections = self._detections(batch, levels, self.rpn.proposals(outputs, batch.image_sizes))
        with repeated_random_state():
            proposals = self.rpn.as_in_training().proposals(outputs, batch.image_sizes)
            proposal_losses = self.rpn.losses(outputs, inner)
            detection_losses = self.roi_heads.losses(levels, proposals, batch.image_sizes, inner)
        return detections, {**proposal_losses, **detection_losses}

    def _detections(
        self, batch: ImageList, levels: dict[str, Tensor], proposals: list[Tensor]
    ) -> list[dict[str, Tensor]]:
        results, _ = self.roi_heads(levels, proposals, batch.image_sizes, None)
        for result in results:
            result["labels"] = result["labels"] - 1
        return results

    def _training_targets(self, images: Sequence[Tensor], targets: Sequence[Target]) -> list[TrainingTarget]:
        if len(images) != len(targets):
            raise DataError(f"{len(images)} images came with {len(targets)} targets; each image needs one.")
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            check_target(target, index, (image.shape[1], image.shape[2]), self.num_classes)
        stride = self._padding_stride
        return [training_target(target, image, stride) for target, image in zip(targets, images, strict=True)]

    @property
    def _padding_stride(self) -> int:
        return max(spec.stride for spec in self.backbone.feature_specs.values())

    def pyramid(
        self, images: Sequence[Tensor], least_size_hw: tuple[int, int] = (0, 0)
    ) -> tuple[ImageList, dict[str, Tensor]]:
        """What the proposals and the RoI heads look at.

        Args:
            images: As in `forward`.
            least_size_hw: The batch is padded to at least this size; for parts of a larger batch.

        Returns:
            The images normalised and padded to one batch, with their sizes before; {"p2" … "p6": (B, C, h, w)}.
        """
        batch = pad_to_batch([self.normalize(image) for image in images], self._padding_stride, least_size_hw)
        return batch, self.fpn(self.backbone(batch.tensors))


def pad_to_batch(images: Sequence[Tensor], divisor: int, least_size_hw: tuple[int, int] = (0, 0)) -> ImageList:
    """Stack images of different sizes, zero-padded at the bottom and right to the largest side, rounded up.

    Args:
        images: B tensors (C, H_i, W_i).
        divisor: The sides of the batch divide by it.
        least_size_hw: The sides of the batch before they are rounded up are at least these.

    Raises:
        ConfigError: There are no images, or one has not three dimensions.
    """
    if not images:
        raise ConfigError("the model needs at least one image, got an empty list.")
    if any(image.ndim != 3 for image in images):
        raise ConfigError(f"images must be (channels, H, W) each, got {[tuple(image.shape) for image in images]}.")
    sizes_hw = [(image.shape[1], image.shape[2]) for image in images]
    largest_hw = [max(sides) for sides in zip(least_size_hw, *sizes_hw, strict=True)]
    height, width = (side + missing_to_multiple(side, divisor) for side in largest_hw)
    padded = [functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return ImageList(torch.stack(padded), sizes_hw)


def mask_rcnn(
    backbone: str | SwinConfig | SwinTransformer,
    num_classes: int,
    weights: str | None = None,
    fpn_channels: int = 256,
    box_head_channels: int = 1024,
    mask_head_channels: int = 256,
    score_threshold: float = 0.05,
    max_detections: int = 100,
    anchor_scale: float = PUBLISHED_ANCHOR_SCALE,
    max_proposals: int = 1000,
    samples_per_image: int = 512,
    ignore_overlap: float | None = COCO_IGNORE_OVERLAP,
    style: Style = "published",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> MaskRCNN:
    """Mask R-CNN on a Swin backbone. Defaults are the published networks' (official and mmdetection configurations).

    Args:
        backbone: A variant name, a configuration, or a backbone.
        num_classes: K, background not counted.
        weights: A weights file to load into the model or into its backbone; None leaves random weights.
        fpn_channels: The channels of every pyramid level.
        box_head_channels: Width of the box head.
        mask_head_channels: Width of the mask head.
        score_threshold: Detections at or below it are dropped.
        max_detections: The most detections of one image.
        anchor_scale: Anchor side over stride; smaller for small objects. Boxes change level in proportion to it.
        max_proposals: Proposals of one image; fewer are faster.
        samples_per_image: Proposals that the box head is trained on, a quarter of them objects.
        ignore_overlap: What has this share of its area in a crowd or another region to ignore is not learnt as
            background; None learns it so, as the published models did.
        style: "published" is the network of the published Swin detectors. "torchvision" keeps torchvision's own
            anchors, pooling, losses and mask pasting, for checkpoints trained with them; regions to ignore are
            background in it.
        image_mean: Of each channel; None is ImageNet's.
        image_std: Of each channel; None is ImageNet's.

    Raises:
        ConfigError: A setting is out of range.
        CheckpointError: The weights do not fit.

    Example:
        >>> config = SwinConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
        >>> detector = mask_rcnn(config, num_classes=2).eval()
        >>> [sorted(result) for result in detector([torch.rand(3, 50, 70), torch.rand(3, 64, 33)])]
        [['boxes', 'labels', 'masks', 'scores'], ['boxes', 'labels', 'masks', 'scores']]
    """
    if style not in ("published", "torchvision"):
        raise ConfigError(f"style must be 'published' or 'torchvision', got {style!r}.")
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
    published = style == "published"
    return assemble_detector(
        as_backbone(backbone),
        settings,
        build_rpn=published_rpn if published else torchvision_rpn_defaults,
        build_roi_heads=published_roi_heads if published else torchvision_roi_heads,
        paste=paste_masks if published else paste_masks_in_image,
        described_as={"head": "mask_rcnn", "style": style},
        weights=weights,
    )


def assemble_detector(
    backbone: SwinTransformer,
    settings: DetectorSettings,
    build_rpn: Callable[[Mapping[str, FeatureSpec], DetectorSettings], SteppedProposalNetwork],
    build_roi_heads: Callable[[Mapping[str, FeatureSpec], DetectorSettings], nn.Module],
    paste: PasteMasks,
    described_as: Mapping[str, Any],
    weights: str | None,
) -> MaskRCNN:
    """Put a detector together from its parts, and load its weights.

    Args:
        backbone: Maps c2 to c5.
        settings: The numbers that every detector is built from.
        build_rpn: From all levels of the pyramid.
        build_roi_heads: From the levels that boxes are pooled from.
        paste: From the mask head's squares to masks of the image.
        described_as: The name of the head, and what only this kind of detector is built from, in plain types.
        weights: As in `mask_rcnn`.

    Raises:
        CheckpointError: The weights do not fit.
    """
    fpn = FPN(backbone.feature_specs, settings.fpn_channels)
    model = MaskRCNN(
        backbone=backbone,
        fpn=fpn,
        rpn=build_rpn(fpn.feature_specs, settings),
        roi_heads=build_roi_heads(fpn.roi_specs, settings),
        normalize=Normalize(backbone.config.in_channels, settings.image_mean, settings.image_std),
        paste=paste,
        num_classes=settings.num_classes,
        architecture={"backbone": backbone.config.to_dict(), **settings.plain(), **described_as},
    )
    if weights is not None:
        from swin_dense.weights import load_weights

        load_weights(model, weights)
    return model
