"""The heads of Cascade Mask R-CNN: three box heads in a row, each on the boxes of the one before, and three mask heads.

Cascade R-CNN: High Quality Object Detection and Instance Segmentation (Cai and Vasconcelos, 2019),
https://arxiv.org/abs/1906.09756. Numbers from the official configurations, cascade_mask_rcnn_swin_fpn.py and
cascade_mask_rcnn_swin_*_giou_4conv1f_*.py of SwinTransformer/Swin-Transformer-Object-Detection; what happens between
the stages from cascade_roi_head.py and bbox_head.py there and in mmdetection 3.3. Class index 0 is background in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import maskrcnn_inference

from swin_dense.features import FeatureSpec
from swin_dense.heads.batch_norm import BatchNorm
from swin_dense.heads.box_batches import beside, clip_boxes, emptied
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.losses import classification_loss, overlap_loss
from swin_dense.heads.matching import BoxCoder, MaxIoUMatcher, ProposalSampler, Samples, joined, pick_class
from swin_dense.heads.roi_heads import (
    BOX_SIDE,
    MASK_SIDE,
    NMS_IOU,
    POSITIVE_FRACTION,
    BoxPredictor,
    DetectionHeads,
    DetectionSelector,
    MaskPredictor,
    Targets,
    clear_background,
    initialise_box_layers,
    mask_modules,
    sampled_mask_loss,
)
from swin_dense.heads.roi_pooling import PyramidRoIAlign, published_pooling
from swin_dense.training.loss_terms import LossTerm

OVERLAP_LOSS_WEIGHT = 10.0  # `loss_bbox=dict(type='GIoULoss', loss_weight=10.0)`


@dataclass(frozen=True)
class StageNumbers:
    """What one stage differs in from the others.

    Attributes:
        iou: Boxes that overlap an object by this much stand for it.
        stds: Of the offsets, x, y, width, height: later stages make smaller corrections.
        loss_weight: Of all losses of the stage.
    """

    iou: float
    stds: tuple[float, float, float, float]
    loss_weight: float


PUBLISHED_STAGES = (
    StageNumbers(iou=0.5, stds=(0.1, 0.1, 0.2, 0.2), loss_weight=1.0),
    StageNumbers(iou=0.6, stds=(0.05, 0.05, 0.1, 0.1), loss_weight=0.5),
    StageNumbers(iou=0.7, stds=(0.033, 0.033, 0.067, 0.067), loss_weight=0.25),
)


@dataclass(frozen=True)
class CascadeStage:
    """The parts of one stage that have no weights.

    Attributes:
        sample: Chooses what the stage is trained on.
        box_coder: From offsets to boxes.
        loss_weight: Of all losses of the stage.
    """

    sample: ProposalSampler
    box_coder: BoxCoder
    loss_weight: float

    def refine(
        self, boxes: Sequence[Tensor], deltas: Tensor, labels: Tensor, sizes_hw: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The boxes of the next stage: offsets of one class applied, clipped to the image, no gradient.

        Args:
            boxes: Per image (N_i, 4) xyxy; N in all.
            deltas: (N, 4 (K + 1)), or (N, 4) where the classes share them.
            labels: (N,) from 1: the class whose offsets count.
            sizes_hw: Per image (H, W) without padding.

        Returns:
            Per image (N_i, 4).
        """
        rows = torch.arange(len(labels), device=labels.device)
        refined = self.box_coder.decode_single(pick_class(deltas.detach(), rows, labels), torch.cat(list(boxes)))
        images = zip(refined.split([len(image_boxes) for image_boxes in boxes]), sizes_hw, strict=True)
        return [clip_boxes(image_boxes, beside(size_hw, image_boxes)) for image_boxes, size_hw in images]


class CascadeRoIHeads(DetectionHeads):
    """Classes, boxes and masks from proposals, in stages.

    Between stages (mmdetection's `BBoxHead.refine_bboxes` in training, `CascadeRoIHead._refine_roi` in evaluation):

    - A box moves by the offsets of one class, without a gradient, and is clipped to the image, not to its padding.
    - In evaluation that class is the likeliest but background, by the logits of that stage alone.
    - In training a box that stands for an object takes the object's class, any other the likeliest but background.
    - In training the objects' own boxes are dropped, as each stage adds them itself, and so are boxes that were not
      sampled: a stage chooses among the samples of the one before.

    Losses (`BBoxHead.loss`): the predicted box is decoded but not clipped; its overlap loss is summed over the objects
    and divided by all samples. All three losses of a stage carry its weight (`CascadeRoIHead.loss`).

    Detections (`CascadeRoIHead.predict_bbox` and `predict_mask`): the logits of all stages, each on the boxes of its
    stage, are averaged before the softmax; the boxes are those of the last stage; the masks are the averaged
    probabilities of all mask heads on the final boxes.

    Args:
        box_roi_pool: Pools boxes from the pyramid for the box heads.
        box_head: Per stage, pooled boxes to (N, C).
        box_predictor: Per stage, (N, C) to class logits and offsets.
        mask_roi_pool: Pools boxes for the mask heads.
        mask_head: Per stage, pooled boxes to (N, C, M / 2, M / 2).
        mask_predictor: Per stage, that to logits (N, K + 1, M, M).
        stages: The rest of each stage.
        select: Chooses the detections.
    """

    def __init__(
        self,
        box_roi_pool: PyramidRoIAlign,
        box_head: Sequence[nn.Module],
        box_predictor: Sequence[BoxPredictor],
        mask_roi_pool: PyramidRoIAlign,
        mask_head: Sequence[nn.Module],
        mask_predictor: Sequence[MaskPredictor],
        stages: Sequence[CascadeStage],
        select: DetectionSelector,
    ) -> None:
        super().__init__(select)
        self.box_roi_pool = box_roi_pool
        self.box_head = nn.ModuleList(box_head)
        self.box_predictor = nn.ModuleList(box_predictor)
        self.mask_roi_pool = mask_roi_pool
        self.mask_head = nn.ModuleList(mask_head)
        self.mask_predictor = nn.ModuleList(mask_predictor)
        self.stages = tuple(stages)

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, LossTerm]:
        """As in `DetectionHeads`, one of each per stage, weighted.

        They are "loss_classifier_0", "loss_box_reg_0", "loss_mask_0" and so on.
        """
        losses: dict[str, LossTerm] = {}
        boxes = proposals
        for index, stage in enumerate(self.stages):
            # Without empty places, so that batch normalisation sees none: the host waits for a GPU once per stage.
            images, objects = stage.sample(boxes, targets).trimmed()
            sampled_boxes, samples = [image.boxes for image in images], joined(images)
            class_logits, deltas = self._classify(index, features, sampled_boxes, image_shapes)
            pooled = self.mask_roi_pool(features, [image.boxes for image in objects], image_shapes)
            mask_logits = self._mask_logits(index, pooled)
            count = len(samples.labels)
            stage_losses = {
                "loss_classifier": LossTerm(classification_loss(class_logits, samples.labels), count),
                "loss_box_reg": LossTerm(refined_box_loss(stage.box_coder, deltas, samples), count),
                "loss_mask": LossTerm(sampled_mask_loss(mask_logits, objects, targets), len(mask_logits)),
            }
            losses.update({f"{name}_{index}": term.times(stage.loss_weight) for name, term in stage_losses.items()})
            labels = torch.where(samples.labels > 0, samples.labels, likeliest_object(class_logits))
            refined = stage.refine(sampled_boxes, deltas, labels, image_shapes)
            boxes = [
                emptied(refined_boxes, image.is_object_itself)
                for refined_boxes, image in zip(refined, images, strict=True)
            ]
        return losses

    def class_boxes(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The boxes of the last stage and the mean logits of all; as `OneStageHeads.class_boxes`."""
        boxes = proposals
        class_logits, deltas = self._classify(0, features, boxes, image_shapes)
        logits_of_stages = [class_logits]
        for index, stage in enumerate(self.stages[:-1]):
            boxes = stage.refine(boxes, deltas, likeliest_object(class_logits), image_shapes)
            class_logits, deltas = self._classify(index + 1, features, boxes, image_shapes)
            logits_of_stages.append(class_logits)
        class_boxes = self.stages[-1].box_coder.decode_single(deltas, torch.cat(boxes))
        return class_boxes, torch.stack(logits_of_stages).mean(dim=0)

    def masks(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """The mean over the mask heads of all stages; as `OneStageHeads.masks`."""
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        of_stages = [maskrcnn_inference(self._mask_logits(index, pooled), labels) for index in range(len(self.stages))]
        return [torch.stack(image_masks).mean(dim=0) for image_masks in zip(*of_stages, strict=True)]

    def _classify(
        self, index: int, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        return self.box_predictor[index](self.box_head[index](pooled))

    def _mask_logits(self, index: int, pooled: Tensor) -> Tensor:
        return self.mask_predictor[index](self.mask_head[index](pooled))


def likeliest_object(class_logits: Tensor) -> Tensor:
    """The likeliest class but background: (N, K + 1) logits to (N,) int64 from 1."""
    return class_logits[:, 1:].argmax(dim=1) + 1


def refined_box_loss(box_coder: BoxCoder, deltas: Tensor, samples: Samples) -> Tensor:
    """The overlap loss of boxes moved by the offsets of their true class; not clipped (`reg_decoded_bbox=True`).

    Args:
        box_coder: From offsets to boxes.
        deltas: (N, 4 (K + 1)), or (N, 4) where the classes share them.
        samples: The N boxes that the offsets belong to, of all images, without empty places.
    """
    rows = (samples.labels > 0).nonzero().squeeze(1)
    refined = box_coder.decode_single(pick_class(deltas, rows, samples.labels[rows]), samples.boxes[rows])
    return OVERLAP_LOSS_WEIGHT * overlap_loss(refined, samples.matched_boxes[rows], len(samples.labels))


def cascade_roi_heads(
    feature_specs: Mapping[str, FeatureSpec], settings: DetectorSettings, shared_regression: bool
) -> CascadeRoIHeads:
    """The heads of the published cascades: in each stage four convolutions and one linear layer for boxes ("4conv1f").

    Args:
        feature_specs: The levels to pool from; boxes change level at sizes in proportion to the anchors'.
        settings: All numbers.
        shared_regression: One group of offsets for all classes (`reg_class_agnostic`) instead of one for each.
    """
    modules = [_stage_modules(settings, shared_regression) for _ in PUBLISHED_STAGES]
    box_heads, box_predictors, mask_heads, mask_predictors = zip(*modules, strict=True)
    return CascadeRoIHeads(
        box_roi_pool=published_pooling(feature_specs, BOX_SIDE, settings.anchor_scale),
        box_head=box_heads,
        box_predictor=box_predictors,
        mask_roi_pool=published_pooling(feature_specs, MASK_SIDE, settings.anchor_scale),
        mask_head=mask_heads,
        mask_predictor=mask_predictors,
        stages=[_stage(numbers, settings) for numbers in PUBLISHED_STAGES],
        select=DetectionSelector(settings.score_threshold, NMS_IOU, settings.max_detections),
    )


def _stage(numbers: StageNumbers, settings: DetectorSettings) -> CascadeStage:
    matcher = MaxIoUMatcher(numbers.iou, numbers.iou, minimum_iou=None)
    return CascadeStage(
        sample=ProposalSampler(matcher, settings.samples_per_image, POSITIVE_FRACTION, settings.ignore_overlap),
        box_coder=BoxCoder.from_stds(numbers.stds),
        loss_weight=numbers.loss_weight,
    )


def _stage_modules(
    settings: DetectorSettings, shared_regression: bool
) -> tuple[nn.Module, BoxPredictor, nn.Module, MaskPredictor]:
    channels = settings.fpn_channels
    box_head = FastRCNNConvFCHead(
        (channels, BOX_SIDE, BOX_SIDE), [channels] * 4, [settings.box_head_channels], norm_layer=BatchNorm
    )
    box_predictor = BoxPredictor(settings.box_head_channels, settings.num_classes + 1, shared_regression)
    mask_head, mask_predictor = mask_modules(settings)
    initialise_box_layers([box_head[5]], box_predictor)
    clear_background(box_predictor, mask_predictor)
    return box_head, box_predictor, mask_head, mask_predictor
