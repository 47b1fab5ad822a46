"""Models of the same kind from other libraries, with random weights, put together as their users do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from swin_dense.box_masks import BoxMasks
from swin_dense.config import variant_config
from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_transforms import semantic_inference
from swin_dense.errors import ConfigError
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE
from swin_dense.heads.backbones import Normalize
from swin_dense.tools.image_views import Views
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.instance_task import InstanceBatch
from swin_dense.tools.predictors import Predictor, SizeHW
from swin_dense.tools.recipe import InferenceSettings
from swin_dense.tools.semantic_task import SemanticBatch
from swin_dense.windows import missing_to_multiple

VARIANT = "swin_t"
"""The backbone that all of them have."""

_SAME = ("version", "embed_dim", "depths", "num_heads", "window_size", "patch_size", "in_channels")
_STRIDE = 32
_CANONICAL_SIDE = 224
"""A box of this side belongs to level 4 of a pyramid whose anchors have the published scale (Lin et al., 2017)."""


class Peer(nn.Module, ABC):
    """Another library's model, to be trained on the same batches and scored on the same images."""

    title: str

    def prepared(self, batch: Any) -> Any:  # noqa: ANN401 - of its task
        """A batch of ours as its own loader would bring it."""
        return batch

    @abstractmethod
    def losses(self, batch: Any) -> Mapping[str, Tensor]:  # noqa: ANN401 - of its task
        """The losses of a prepared batch, to be summed."""

    @abstractmethod
    def predictor(self, label_map: LabelMap) -> Predictor[Any]:
        """The model on original images."""


def peer_of(architecture: Mapping[str, Any], inference: InferenceSettings) -> Peer:
    """The peer of one of our models, as large as it is.

    Args:
        architecture: Of our model.
        inference: How images are resized.

    Raises:
        ConfigError: There is none.
    """
    peers = {"upernet": SmpUPerNet, "mask_rcnn": TorchvisionMaskRCNN}
    published = variant_config(VARIANT).to_dict()
    head, backbone = architecture.get("head"), architecture["backbone"]
    changed = [name for name in _SAME if backbone[name] != published[name]]
    if head not in peers or changed:
        what = f"a backbone with {changed[0]}={backbone[changed[0]]}" if changed else f"the head {head}"
        raise ConfigError(
            f"training is compared for UPerNet and Mask R-CNN with {VARIANT}, got {what}; choose a recipe of these, "
            f"or change it with model.variant={VARIANT} 'model.backbone={{}}'."
        )
    return peers[head](architecture, inference)


class SmpUPerNet(Peer):
    """segmentation-models-pytorch's UPerNet on timm's Swin-T, the encoder that it offers.

    Args:
        architecture: Of our UPerNet; gives the classes, the decoder's width and the rate of dropped paths.
        inference: How images are resized.
    """

    title = "segmentation-models-pytorch"

    def __init__(self, architecture: Mapping[str, Any], inference: InferenceSettings) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        self.scale = inference.scale
        self.normalize = Normalize(3)
        self.model = smp.UPerNet(
            "tu-swin_tiny_patch4_window7_224",
            encoder_weights=None,
            decoder_channels=architecture["channels"],
            classes=architecture["num_classes"],
            strict_img_size=False,  # without it, timm takes images of 224 x 224 only
            drop_path_rate=architecture["backbone"]["drop_path_rate"],
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to logits (B, K, H, W); padded for the model, which takes multiples of 32."""
        height, width = images.shape[2:]
        missing_hw = missing_to_multiple(height, _STRIDE), missing_to_multiple(width, _STRIDE)
        padded = functional.pad(self.normalize(images), (0, missing_hw[1], 0, missing_hw[0]))
        return self.model(padded)[:, :, :height, :width]

    def losses(self, batch: SemanticBatch) -> Mapping[str, Tensor]:
        """Cross-entropy over the labelled pixels."""
        logits = self(batch.images.float() / 255)
        return {"loss": functional.cross_entropy(logits, batch.labels.long(), ignore_index=IGNORED_LABEL)}

    def predictor(self, label_map: LabelMap) -> Predictor[np.ndarray]:
        """Class indices at the original size."""
        return _SmpPredictor(self, label_map)


class _SmpPredictor(Predictor[np.ndarray]):
    def __init__(self, peer: SmpUPerNet, label_map: LabelMap) -> None:
        super().__init__(label_map, Views([semantic_inference(peer.scale)]), torch.device("cpu"))
        self.model = peer

    @torch.inference_mode()
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> np.ndarray:
        logits = self.model(image[None].float() / 255)
        resized = functional.interpolate(logits, size=original_size_hw, mode="bilinear", align_corners=False)
        return resized[0].argmax(dim=0).to(torch.uint8).numpy()

    def picture(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class TorchvisionMaskRCNN(Peer):
    """torchvision's MaskRCNN on its swin_t and its pyramid, with our numbers and its defaults for the rest.

    Args:
        architecture: Of our Mask R-CNN; gives the classes, all widths, anchors, proposals, samples and thresholds.
        inference: How images are resized.
    """

    title = "torchvision"

    def __init__(self, architecture: Mapping[str, Any], inference: InferenceSettings) -> None:
        super().__init__()
        from torchvision.models.detection import MaskRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.ops import MultiScaleRoIAlign

        channels, proposals, scale = (architecture[name] for name in ("fpn_channels", "max_proposals", "anchor_scale"))
        box_width, mask_width = architecture["box_head_channels"], architecture["mask_head_channels"]
        num_classes = architecture["num_classes"] + 1  # background is its first
        canonical_side = round(_CANONICAL_SIDE * scale / PUBLISHED_ANCHOR_SCALE)
        levels = [str(stage) for stage in range(4)]
        self.model = MaskRCNN(
            _SwinPyramid(channels, architecture["backbone"]["drop_path_rate"]),
            min_size=inference.short_edge,
            max_size=inference.max_long_edge,
            rpn_anchor_generator=AnchorGenerator(
                tuple((scale * stride,) for stride in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5
            ),
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_post_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals,
            rpn_post_nms_top_n_test=proposals,
            box_roi_pool=MultiScaleRoIAlign(levels, 7, 2, canonical_scale=canonical_side),
            box_head=TwoMLPHead(7 * 7 * channels, box_width),
            box_predictor=FastRCNNPredictor(box_width, num_classes),
            box_score_thresh=architecture["score_threshold"],
            box_detections_per_img=architecture["max_detections"],
            box_batch_size_per_image=architecture["samples_per_image"],
            mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2, canonical_scale=canonical_side),
            mask_head=MaskRCNNHeads(channels, (mask_width,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(mask_width, mask_width, num_classes),
            _skip_resize=True,  # in training, where the batches are resized already
        )

    def prepared(self, batch: InstanceBatch) -> InstanceBatch:
        """The batch with torchvision's targets."""
        return replace(batch, targets=[torchvision_target(target) for target in batch.targets])

    def losses(self, batch: InstanceBatch) -> Mapping[str, Tensor]:
        """Its five losses."""
        return self.model([image.float() / 255 for image in batch.images], batch.targets)

    def predictor(self, label_map: LabelMap) -> Predictor[InstancePrediction]:
        """Detections in original pixels."""
        return _TorchvisionPredictor(self, label_map)


class _SwinPyramid(nn.Sequential):
    """torchvision's pyramid on the four stages of its swin_t."""

    def __init__(self, channels: int, drop_path_rate: float) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        pyramid = FeaturePyramidNetwork([96, 192, 384, 768], channels, extra_blocks=LastLevelMaxPool())
        super().__init__(_TorchvisionSwin(drop_path_rate), pyramid)
        self.out_channels = channels


class _TorchvisionSwin(nn.Module):
    def __init__(self, drop_path_rate: float) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor
        from torchvision.models.swin_transformer import SwinTransformer

        swin_t = SwinTransformer([4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=drop_path_rate)
        self.stages = create_feature_extractor(swin_t, {f"features.{2 * stage + 1}": str(stage) for stage in range(4)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to {"0": (B, C, H/4, W/4), … "3": (B, 8C, H/32, W/32)}."""
        return {name: stage.permute(0, 3, 1, 2).contiguous() for name, stage in self.stages(images).items()}


class _TorchvisionPredictor(Predictor[InstancePrediction]):
    def __init__(self, peer: TorchvisionMaskRCNN, label_map: LabelMap) -> None:
        super().__init__(label_map, None, torch.device("cpu"))  # it resizes by itself
        self.model = peer.model

    @torch.inference_mode()
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> InstancePrediction:
        found = self.model([image.float() / 255])[0]
        return InstancePrediction(
            found["boxes"].numpy(),
            found["labels"].numpy() - 1,
            found["scores"].numpy(),
            _run_lengths((found["masks"][:, 0] > 0.5).numpy()),
        )

    def picture(self, image: np.ndarray, prediction: InstancePrediction) -> np.ndarray:
        raise NotImplementedError


def torchvision_target(target: Mapping[str, Any]) -> dict[str, Tensor | BoxMasks]:
    """What torchvision's detectors are trained on: labels from 1, masks of the whole image.

    Crowds are left out, as torchvision's own training script does, so that they are background.

    Args:
        target: As in `InstanceSample`.
    """
    objects = ~target["iscrowd"].bool()
    return {
        "boxes": target["boxes"][objects],
        "labels": target["labels"][objects] + 1,
        "masks": target["masks"][objects].full(),
    }


def _run_lengths(masks: np.ndarray) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    codes = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"size": list(code["size"]), "counts": code["counts"].decode("ascii")} for code in codes]
