"""The box head and the mask head of Mask R-CNN: torchvision's modules, with the published models' details.

Mask R-CNN (He et al., 2017), https://arxiv.org/abs/1703.06870. Class index 0 is background in here
and in the other files of RoI heads, and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference

from swin_dense.features import FeatureSpec
from swin_dense.heads.box_batches import beside, clip_boxes, counts_are_known
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.grouped_suppression import grouped_nms
from swin_dense.heads.losses import classification_loss, mask_loss, offset_loss
from swin_dense.heads.mask_targets import batch_mask_targets
from swin_dense.heads.matching import BoxCoder, MaxIoUMatcher, ProposalSampler, Samples, joined, pick_class
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.roi_pooling import PyramidRoIAlign, published_pooling
from swin_dense.heads.targets import TrainingTarget
from swin_dense.training.loss_terms import LossTerm

BOX_SIDE, MASK_SIDE = 7, 14  # cells that a box is pooled to for either head
BOX_STDS = (0.1, 0.1, 0.2, 0.2)  # of the wanted offsets, `target_stds` of the published configurations
NMS_IOU = 0.5
POSITIVE_FRACTION = 0.25

Detections = list[dict[str, Tensor]]
Targets = Sequence[TrainingTarget]


class BoxPredictor(FastRCNNPredictor):
    """torchvision's two linear layers, with logits and offsets at full precision.

    Args:
        in_channels: Width of the box head.
        num_logits: K + 1.
        shared_regression: One group of offsets for all classes instead of one for each.
    """

    def __init__(self, in_channels: int, num_logits: int, shared_regression: bool = False) -> None:
        super().__init__(in_channels, num_logits)
        if shared_regression:
            self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) to class logits (N, K + 1) and offsets (N, 4 (K + 1)), or (N, 4) if they are shared."""
        logits, deltas = super().forward(x)
        return at_least_float32(logits), at_least_float32(deltas)


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's upsampling and classification, with logits at full precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, M / 2, M / 2) to logits (N, K + 1, M, M)."""
        return at_least_float32(super().forward(x))


@dataclass(frozen=True)
class DetectionSelector:
    """Every class of every box is a candidate; suppression works within a class, best scores first.

    Attributes:
        score_threshold: Candidates at or below it are dropped.
        nms_iou: Of two overlapping candidates of one class the better one stays.
        max_detections: The most detections of one image.
    """

    score_threshold: float
    nms_iou: float
    max_detections: int

    def __call__(
        self, boxes: Tensor, class_logits: Tensor, counts: Sequence[int], sizes_hw: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Choose among the boxes of a batch.

        Args:
            boxes: (N, 4 (K + 1)) xyxy, one box per class, or (N, 4) where the classes share theirs.
            class_logits: (N, K + 1), background first.
            counts: Per image how many of the N rows are its own.
            sizes_hw: Per image (H, W), to which its boxes are clipped.

        Returns:
            Per image boxes (D, 4), scores (D,) and labels (D,) from 1, by falling score.
        """
        probabilities = functional.softmax(class_logits, dim=-1)
        image_of_row = torch.repeat_interleave(torch.tensor(counts)).to(boxes.device, non_blocking=True)
        sizes = beside(sizes_hw, boxes)[image_of_row]
        boxes, scores, labels, rows = self._candidates(boxes, probabilities, sizes)
        images = image_of_row[rows]
        num_classes = probabilities.shape[1]
        is_kept = grouped_nms(boxes, scores, images * num_classes + labels, len(counts) * num_classes, self.nms_iou)
        order = scores.argsort(descending=True, stable=True)
        order = order[is_kept[order]]
        order = order[images[order].argsort(stable=True)]
        found = torch.bincount(images[order], minlength=len(counts)).tolist()
        best = [image[: self.max_detections] for image in order.split(found)]
        return [boxes[rows] for rows in best], [scores[rows] for rows in best], [labels[rows] for rows in best]

    def candidates(
        self, boxes: Tensor, probabilities: Tensor, size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What suppression chooses from, in one image.

        Args:
            boxes: (N, 4 (K + 1)) or (N, 4), as above.
            probabilities: (N, K + 1), background first.
            size_hw: (H, W), to which boxes are clipped.

        Returns:
            Boxes (C, 4), scores (C,) and labels (C,) from 1, in no order.
        """
        boxes, scores, labels, _ = self._candidates(boxes, probabilities, beside(size_hw, boxes).expand(len(boxes), 2))
        return boxes, scores, labels

    def _candidates(
        self, boxes: Tensor, probabilities: Tensor, sizes_hw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `candidates`, with the size of each row's image (N, 2), and the rows (C,) that they come from."""
        rows, labels = (probabilities[:, 1:] > self.score_threshold).nonzero(as_tuple=True)
        labels = labels + 1
        chosen = clip_boxes(pick_class(boxes, rows, labels), sizes_hw[rows])
        return chosen, probabilities[rows, labels], labels, rows


class OneStageHeads:
    """What one box head and one mask head say, whoever built them; the parts are attributes of the class itself."""

    box_roi_pool: nn.Module
    box_head: nn.Module
    box_predictor: nn.Module
    mask_roi_pool: nn.Module
    mask_head: nn.Module
    mask_predictor: nn.Module
    box_coder: BoxCoder

    def class_boxes(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The boxes of all classes, and what speaks for each, before anything is chosen.

        Args:
            features: {name: (B, C, h, w)}.
            proposals: Per image (N_i, 4) xyxy in input pixels; N in all.
            image_shapes: Per image (H, W) before padding.

        Returns:
            Boxes (N, 4 (K + 1)), or (N, 4) where the classes share theirs, and class logits (N, K + 1), as
            `DetectionSelector` takes them.
        """
        class_logits, deltas = self._classify(features, proposals, image_shapes)
        return self.box_coder.decode_single(deltas, torch.cat(proposals)), class_logits

    def masks(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """The masks of given boxes.

        Args:
            features: {name: (B, C, h, w)}.
            boxes: Per image (D, 4) xyxy in input pixels.
            labels: Per image (D,) from 1.
            image_shapes: Per image (H, W) before padding.

        Returns:
            Per image (D, 1, M, M) in [0, 1], each relative to its box.
        """
        return maskrcnn_inference(self._mask_logits(features, boxes, image_shapes), labels)

    def _classify(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def _mask_logits(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))


class DetectionHeads(nn.Module, ABC):
    """What RoI heads of any number of stages have in common: losses in training, otherwise detections.

    Args:
        select: Chooses the detections.
    """

    def __init__(self, select: DetectionSelector) -> None:
        super().__init__()
        self.select = select

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Detections, dict[str, LossTerm]]:
        """Losses in training, detections otherwise.

        Args:
            features: {name: (B, C, h, w)}.
            proposals: Per image (N, 4) xyxy in input pixels; in training some may be empty places, see `box_batches`.
            image_shapes: Per image (H, W) before padding.
            targets: Per image; training only.

        Returns:
            Detections (empty in training): per image "boxes" (D, 4), "labels" (D,) from 1, "scores" (D,),
            "masks" (D, 1, M, M) in [0, 1], each relative to its box. And losses (empty otherwise).
        """
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    @abstractmethod
    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, LossTerm]:
        """The losses of proposals that are sampled at random; arguments as those of `forward`, in either mode."""

    @abstractmethod
    def class_boxes(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """As `OneStageHeads.class_boxes`."""

    @abstractmethod
    def masks(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """As `OneStageHeads.masks`."""

    def _detect(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Detections:
        class_boxes, class_logits = self.class_boxes(features, proposals, image_shapes)
        counts = [len(boxes) for boxes in proposals]
        boxes, scores, labels = self.select(class_boxes, class_logits, counts, image_shapes)
        return as_detections(boxes, scores, labels, self.masks(features, boxes, labels, image_shapes))


class RoIHeads(OneStageHeads, DetectionHeads):
    """Classes, boxes and masks from proposals.

    Args:
        box_roi_pool: Pools boxes from the pyramid for the box head.
        box_head: Pooled boxes to (N, C).
        box_predictor: (N, C) to class logits and offsets.
        mask_roi_pool: Pools boxes for the mask head.
        mask_head: Pooled boxes to (N, C, M / 2, M / 2).
        mask_predictor: That to logits (N, K + 1, M, M).
        sample: Chooses what is trained on.
        box_coder: From offsets to boxes.
        select: Chooses the detections.
    """

    def __init__(
        self,
        box_roi_pool: PyramidRoIAlign,
        box_head: nn.Module,
        box_predictor: BoxPredictor,
        mask_roi_pool: PyramidRoIAlign,
        mask_head: nn.Module,
        mask_predictor: MaskPredictor,
        sample: ProposalSampler,
        box_coder: BoxCoder,
        select: DetectionSelector,
    ) -> None:
        super().__init__(select)
        self.box_roi_pool = box_roi_pool
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_roi_pool = mask_roi_pool
        self.mask_head = mask_head
        self.mask_predictor = mask_predictor
        self.sample = sample
        self.box_coder = box_coder

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, LossTerm]:
        """The losses of proposals that are sampled at random; arguments as those of `forward`, in either mode."""
        samples = self.sample(proposals, targets)
        images, objects = trimmed_if_known(samples, self.sample.most_objects)
        class_logits, deltas = self._classify(features, [image.boxes for image in images], image_shapes)
        mask_logits = self._mask_logits(features, [image.boxes for image in objects], image_shapes)
        sampled = joined(images)
        rows = torch.arange(len(deltas), device=deltas.device)
        deltas = pick_class(deltas, rows, sampled.labels.clamp(min=0))
        wanted = self.box_coder.encode_single(sampled.matched_boxes, sampled.boxes)
        num_samples, num_objects = (sampled.labels >= 0).sum(), (sampled.labels > 0).sum()
        return {
            "loss_classifier": LossTerm(classification_loss(class_logits, sampled.labels), num_samples),
            "loss_box_reg": LossTerm(offset_loss(deltas, wanted, sampled.labels), num_samples),
            "loss_mask": LossTerm(sampled_mask_loss(mask_logits, objects, targets), num_objects),
        }


def trimmed_if_known(samples: Samples, most_objects: int) -> tuple[list[Samples], list[Samples]]:
    """What the heads look at: per image the samples of a batch, and the first of them, among which all objects are.

    On a GPU they look at empty places too: to know which these are, the host would have to wait for it.
    """
    if counts_are_known(samples.boxes):
        return samples.trimmed()
    return samples.places(), [image.first(most_objects) for image in samples.places()]


def sampled_mask_loss(mask_logits: Tensor, objects: Sequence[Samples], targets: Targets) -> Tensor:
    """`losses.mask_loss` of the sampled boxes that stand for objects.

    Args:
        mask_logits: (N, K + 1, M, M) of all images' boxes, one after the other.
        objects: Per image those boxes, perhaps among others.
        targets: Per image.
    """
    masks = [target["masks"] for target in targets]
    boxes, matched = [image.boxes for image in objects], [image.matched for image in objects]
    wanted = batch_mask_targets(masks, boxes, matched, mask_logits.shape[-1])
    return mask_loss(mask_logits, torch.cat([image.labels for image in objects]), wanted)


def as_detections(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor], masks: Sequence[Tensor]
) -> Detections:
    """Fields of all images to images of all fields."""
    return [
        {"boxes": box, "labels": label, "scores": score, "masks": mask}
        for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True)
    ]


def published_roi_heads(feature_specs: Mapping[str, FeatureSpec], settings: DetectorSettings) -> RoIHeads:
    """The heads of the published models. A quarter of the samples are objects.

    Args:
        feature_specs: The levels to pool from; boxes change level at sizes in proportion to the anchors'.
        settings: All numbers.
    """
    modules = head_modules(settings)
    initialise_box_layers((modules["box_head"].fc6, modules["box_head"].fc7), modules["box_predictor"])
    clear_background(modules["box_predictor"], modules["mask_predictor"])
    return RoIHeads(
        box_roi_pool=published_pooling(feature_specs, BOX_SIDE, settings.anchor_scale),
        mask_roi_pool=published_pooling(feature_specs, MASK_SIDE, settings.anchor_scale),
        **modules,
        sample=ProposalSampler(
            MaxIoUMatcher(0.5, 0.5, minimum_iou=0.5),
            settings.samples_per_image,
            POSITIVE_FRACTION,
            settings.ignore_overlap,
        ),
        box_coder=BoxCoder.from_stds(BOX_STDS),
        select=DetectionSelector(settings.score_threshold, NMS_IOU, settings.max_detections),
    )


def mask_modules(settings: DetectorSettings) -> tuple[MaskRCNNHeads, MaskPredictor]:
    """A mask head of four convolutions, and its predictor; initialised as published."""
    channels = settings.mask_head_channels
    head = MaskRCNNHeads(settings.fpn_channels, (channels,) * 4, dilation=1)
    return head, MaskPredictor(channels, channels, settings.num_classes + 1)


def initialise_box_layers(linear_layers: Iterable[nn.Linear], predictor: BoxPredictor) -> None:
    """Xavier for the hidden layers, small normal numbers for the outputs, as published; in place."""
    for layer in linear_layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def clear_background(box_predictor: BoxPredictor, mask_predictor: MaskPredictor) -> None:
    """Zero the rows of background that nothing reads: its offsets and its mask; in place.

    Zeros without a gradient stay zeros in training, weight decay or not, and the published layout, which lacks these
    rows, holds the whole model.
    """
    with torch.no_grad():
        if len(box_predictor.bbox_pred.bias) > 4:  # otherwise all classes share four
            box_predictor.bbox_pred.weight[:4] = 0
            box_predictor.bbox_pred.bias[:4] = 0
        mask_predictor.mask_fcn_logits.weight[0] = 0
        mask_predictor.mask_fcn_logits.bias[0] = 0


def head_modules(settings: DetectorSettings) -> dict[str, Any]:
    """The modules of both heads, by the names of their attributes; as torchvision initialises them."""
    mask_head, mask_predictor = mask_modules(settings)
    return {
        "box_head": TwoMLPHead(settings.fpn_channels * BOX_SIDE * BOX_SIDE, settings.box_head_channels),
        "box_predictor": BoxPredictor(settings.box_head_channels, settings.num_classes + 1),
        "mask_head": mask_head,
        "mask_predictor": mask_predictor,
    }
