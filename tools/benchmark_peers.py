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
from swin_dense.config import STAGE_NAMES, SwinConfig, variant_config
from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_transforms import semantic_inference
from swin_dense.errors import ConfigError
from swin_dense.heads.backbones import Normalize
from swin_dense.tools.backbone_peers import NormedStages, TorchvisionStages
from swin_dense.tools.detector_peers import torchvision_mask_rcnn
from swin_dense.tools.image_views import Views
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.instance_task import InstanceBatch
from swin_dense.tools.predictors import Predictor
from swin_dense.tools.recipe import InferenceSettings
from swin_dense.tools.segmenter_peers import smp_upernet
from swin_dense.tools.semantic_task import SemanticBatch
from swin_dense.windows import SizeHW, missing_to_multiple

VARIANT = "swin_t"
"""The backbone that all of them have."""

_SAME = ("version", "embed_dim", "depths", "num_heads", "window_size", "patch_size", "in_channels")
_STRIDE = 32


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
        self.scale = inference.scale
        self.normalize = Normalize(3)
        # Without `strict_img_size=False`, timm takes images of 224 x 224 only.
        self.model = smp_upernet(architecture, strict_img_size=False)

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
        stages = TorchvisionStages(SwinConfig.from_dict(architecture["backbone"]))
        norms = [nn.Identity() for _ in STAGE_NAMES]  # its users have none
        short_edge, max_long_edge = inference.short_edge, inference.max_long_edge
        self.model = torchvision_mask_rcnn(architecture, NormedStages(stages, norms), short_edge, max_long_edge)

    def prepared(self, batch: InstanceBatch) -> InstanceBatch:
        """The batch with torchvision's targets."""
        return replace(batch, targets=[torchvision_target(target) for target in batch.targets])

    def losses(self, batch: InstanceBatch) -> Mapping[str, Tensor]:
        """Its five losses."""
        return self.model([image.float() / 255 for image in batch.images], batch.targets)

    def predictor(self, label_map: LabelMap) -> Predictor[InstancePrediction]:
        """Detections in original pixels."""
        return _TorchvisionPredictor(self, label_map)


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
