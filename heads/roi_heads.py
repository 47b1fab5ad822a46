"""The box head and the mask head of Mask R-CNN: torchvision's modules, with the published models' details.

Mask R-CNN (He et al., 2017), https://arxiv.org/abs/1703.06870. Class index 0 is background in here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE
from swin_dense.heads.losses import box_losses, mask_loss, mask_targets
from swin_dense.heads.matching import BoxCoder, MaxIoUMatcher
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.roi_pooling import PUBLISHED_FINEST_SIDE, PyramidRoIAlign

Detections = list[dict[str, Tensor]]


class BoxPredictor(FastRCNNPredictor):
    """torchvision's two linear layers, with logits and offsets at full precision."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) to class logits (N, K + 1) and offsets (N, 4 (K + 1))."""
        logits, deltas = super().forward(x)
        return at_least_float32(logits), at_least_float32(deltas)


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's upsampling and classification, with logits at full precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, M / 2, M / 2) to logits (N, K + 1, M, M)."""
        return at_least_float32(super().forward(x))


class RoIHeads(TorchvisionRoIHeads):
    """torchvision's heads with the published losses, mask targets and detection selection."""

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[Detections, dict[str, Tensor]]:
        """Losses in training, detections otherwise.

        Args:
            features: {name: (B, C, h, w)}.
            proposals: Per image (N, 4) xyxy in input pixels.
            image_shapes: Per image (H, W) before padding.
            targets: Per image "boxes" (G, 4), "labels" (G,) from 1, "masks" (G, H, W); training only.

        Returns:
            Detections (empty in training): per image "boxes" (D, 4), "labels" (D,) from 1, "scores" (D,),
            "masks" (D, 1, M, M) in [0, 1], each relative to its box. And losses (empty otherwise).
        """
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        sampled, matched, labels, delta_targets = self.select_training_samples(proposals, targets)
        class_logits, deltas = self._classify(features, sampled, image_shapes)
        loss_classifier, loss_box_reg = box_losses(class_logits, deltas, torch.cat(labels), torch.cat(delta_targets))

        is_object = [image_labels > 0 for image_labels in labels]
        object_boxes = [boxes[rows] for boxes, rows in zip(sampled, is_object, strict=True)]
        object_labels = torch.cat([image_labels[rows] for image_labels, rows in zip(labels, is_object, strict=True)])
        mask_logits = self._mask_logits(features, object_boxes, image_shapes)
        wanted = [
            mask_targets(target["masks"], boxes, image_matched[rows], mask_logits.shape[-1])
            for target, boxes, image_matched, rows in zip(targets, object_boxes, matched, is_object, strict=True)
            if len(boxes)
        ]
        return {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box_reg,
            "loss_mask": mask_loss(mask_logits, object_labels, torch.cat(wanted) if wanted else mask_logits[:, 0]),
        }

    def _detect(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Detections:
        class_logits, deltas = self._classify(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(class_logits, deltas, proposals, image_shapes)
        masks = maskrcnn_inference(self._mask_logits(features, boxes, image_shapes), labels)
        return [
            {"boxes": box, "labels": label, "scores": score, "masks": mask}
            for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True)
        ]

    def _classify(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def _mask_logits(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Every class of every proposal is a candidate; suppression works within a class, best scores first.

        Args:
            class_logits: (sum of N_i, K + 1).
            box_regression: (sum of N_i, 4 (K + 1)).
            proposals: Per image (N_i, 4).
            image_shapes: Per image (H, W).

        Returns:
            Per image boxes (D, 4), scores (D,) and labels (D,) from 1, by falling score.
        """
        counts = [len(image_proposals) for image_proposals in proposals]
        probabilities = functional.softmax(class_logits, dim=-1).split(counts)
        decoded = self.box_coder.decode(box_regression, proposals).view(*class_logits.shape, 4).split(counts)
        detections = [
            self._select(image_boxes, image_scores, image_size_hw)
            for image_boxes, image_scores, image_size_hw in zip(decoded, probabilities, image_shapes, strict=True)
        ]
        boxes, scores, labels = zip(*detections, strict=True)
        return list(boxes), list(scores), list(labels)

    def _select(
        self, boxes: Tensor, probabilities: Tensor, image_size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, labels = (probabilities[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
        labels = labels + 1
        boxes = clip_boxes_to_image(boxes[rows, labels], image_size_hw)
        scores = probabilities[rows, labels]
        keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return boxes[keep], scores[keep], labels[keep]


def published_roi_heads(
    feature_specs: Mapping[str, FeatureSpec],
    num_classes: int,
    channels: int,
    anchor_scale: float,
    box_head_channels: int,
    mask_head_channels: int,
    samples_per_image: int,
    score_threshold: float,
    max_detections: int,
) -> RoIHeads:
    """The heads of the published models.

    Args:
        feature_specs: The levels to pool from.
        num_classes: K, background not counted.
        channels: The channels of every level.
        anchor_scale: Anchor side over stride, 8 as published; boxes change level at sizes in proportion to it.
        box_head_channels: Width of the two hidden layers of the box head.
        mask_head_channels: Width of the mask head.
        samples_per_image: Proposals trained on, a quarter of them objects.
        score_threshold: Detections at or below it are dropped.
        max_detections: The most detections of one image.
    """
    modules = _head_modules(num_classes, channels, box_head_channels, mask_head_channels)
    finest_side = PUBLISHED_FINEST_SIDE * anchor_scale / PUBLISHED_ANCHOR_SCALE
    heads = RoIHeads(
        PyramidRoIAlign(feature_specs, 7, finest_side),
        **modules,
        mask_roi_pool=PyramidRoIAlign(feature_specs, 14, finest_side),
        **_TRAINING_SETTINGS,
        batch_size_per_image=samples_per_image,
        score_thresh=score_threshold,
        detections_per_img=max_detections,
    )
    heads.proposal_matcher = MaxIoUMatcher(positive_iou=0.5, negative_iou=0.5, minimum_iou=0.5)
    heads.box_coder = BoxCoder(_TRAINING_SETTINGS["bbox_reg_weights"])
    _initialise_as_published(heads)
    return heads


def torchvision_roi_heads(
    feature_specs: Mapping[str, FeatureSpec],
    num_classes: int,
    channels: int,
    anchor_scale: float,
    box_head_channels: int,
    mask_head_channels: int,
    samples_per_image: int,
    score_threshold: float,
    max_detections: int,
) -> TorchvisionRoIHeads:
    """The heads as torchvision builds them for its own Mask R-CNN. Arguments as for `published_roi_heads`.

    Boxes change level at torchvision's own sizes, whatever `anchor_scale` is.
    """
    names = list(feature_specs)
    return TorchvisionRoIHeads(
        MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        **_head_modules(num_classes, channels, box_head_channels, mask_head_channels),
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        **_TRAINING_SETTINGS,
        batch_size_per_image=samples_per_image,
        score_thresh=score_threshold,
        detections_per_img=max_detections,
    )


_TRAINING_SETTINGS = {
    "fg_iou_thresh": 0.5,
    "bg_iou_thresh": 0.5,
    "positive_fraction": 0.25,
    "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0),  # one over the published standard deviations .1 .1 .2 .2
    "nms_thresh": 0.5,
}


def _head_modules(
    num_classes: int, channels: int, box_head_channels: int, mask_head_channels: int
) -> dict[str, nn.Module]:
    return {
        "box_head": TwoMLPHead(channels * 7 * 7, box_head_channels),
        "box_predictor": BoxPredictor(box_head_channels, num_classes + 1),
        "mask_head": MaskRCNNHeads(channels, (mask_head_channels,) * 4, dilation=1),
        "mask_predictor": MaskPredictor(mask_head_channels, mask_head_channels, num_classes + 1),
    }


def _initialise_as_published(heads: RoIHeads) -> None:
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
