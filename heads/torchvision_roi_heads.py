"""The box head and the mask head of Mask R-CNN as torchvision trains and reads them, for checkpoints of its own models.

Class index 0 is background in here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from swin_dense.features import FeatureSpec
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.matching import BoxCoder
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.roi_heads import (
    BOX_SIDE,
    BOX_STDS,
    MASK_SIDE,
    NMS_IOU,
    POSITIVE_FRACTION,
    Detections,
    DetectionSelector,
    OneStageHeads,
    Targets,
    head_modules,
)
from swin_dense.training.loss_terms import LossTerm


class FullPrecisionRoIAlign(MultiScaleRoIAlign):
    """torchvision's pooling, of levels in float32 at least."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """As torchvision's."""
        return super().forward({name: at_least_float32(level) for name, level in x.items()}, boxes, image_shapes)


class FullMaskRoIHeads(OneStageHeads, TorchvisionRoIHeads):
    """torchvision's heads, which want masks of the image's size in training."""

    @property
    def select(self) -> DetectionSelector:
        """The numbers of its own selection, which besides drops boxes under 0.01 pixels."""
        return DetectionSelector(self.score_thresh, self.nms_thresh, self.detections_per_img)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Detections, dict[str, LossTerm]]:
        """Arguments and results as those of `RoIHeads`."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        assert targets is not None
        return [], self.losses(features, proposals, image_shapes, targets)

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, LossTerm]:
        """As `RoIHeads.losses`."""
        full = [{**target, "masks": target["masks"].full()} for target in targets]
        boxes, matched, labels, offsets = self.select_training_samples(proposals, full)
        class_logits, deltas = self._classify(features, boxes, image_shapes)
        class_loss, box_loss = fastrcnn_loss(class_logits, deltas, labels, offsets)
        rows = [(image_labels > 0).nonzero().squeeze(1) for image_labels in labels]
        objects = [image_boxes[image_rows] for image_boxes, image_rows in zip(boxes, rows, strict=True)]
        mask_loss = maskrcnn_loss(
            self._mask_logits(features, objects, image_shapes),
            objects,
            [target["masks"] for target in full],
            [target["labels"] for target in full],
            [image_matched[image_rows] for image_matched, image_rows in zip(matched, rows, strict=True)],
        )
        num_samples = sum(map(len, labels))
        return {
            "loss_classifier": LossTerm(class_loss, num_samples),
            "loss_box_reg": LossTerm(box_loss, num_samples),
            "loss_mask": LossTerm(mask_loss, sum(map(len, rows))),
        }


def torchvision_roi_heads(feature_specs: Mapping[str, FeatureSpec], settings: DetectorSettings) -> FullMaskRoIHeads:
    """The heads as torchvision builds them for its own Mask R-CNN.

    Args:
        feature_specs: The levels to pool from; boxes change level at torchvision's own sizes, whatever the anchors'.
        settings: All numbers.
    """
    names = list(feature_specs)
    return FullMaskRoIHeads(
        box_roi_pool=FullPrecisionRoIAlign(names, output_size=BOX_SIDE, sampling_ratio=2),
        mask_roi_pool=FullPrecisionRoIAlign(names, output_size=MASK_SIDE, sampling_ratio=2),
        **head_modules(settings),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=settings.samples_per_image,
        positive_fraction=POSITIVE_FRACTION,
        bbox_reg_weights=BoxCoder.from_stds(BOX_STDS).weights,
        score_thresh=settings.score_threshold,
        nms_thresh=NMS_IOU,
        detections_per_img=settings.max_detections,
    )
