"""Objects of one image from several views of it.

detectron2's test-time augmentation (`GeneralizedRCNNWithTTA`): the boxes of all views suppress each other, then the
mask head looks at those that are left in every view, and its probabilities are averaged. mmdetection 3.3 merges boxes
alike (`DetTTAModel`) and has no masks; its version 2 shared the proposals among the views and averaged their boxes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from swin_dense.heads.mask_rcnn import MaskRCNN
from swin_dense.heads.roi_heads import NMS_IOU
from swin_dense.heads.suppression import HardNMS, SoftNMS, Suppress, keep_all
from swin_dense.heads.views import View
from swin_dense.windows import SizeHW


class ViewDetector:
    """Detects in several views together. Memory holds the feature pyramids of all: about 85 bytes a pixel of each.

    Args:
        model: In evaluation mode.
        suppress_in_view: Which boxes of one view go on.
        suppress: Which boxes of all views are kept.
    """

    def __init__(self, model: MaskRCNN, suppress_in_view: Suppress, suppress: Suppress) -> None:
        self.model = model
        self.roi_heads: Any = model.roi_heads  # of one of the kinds that have `class_boxes`, `select` and `masks`
        self.suppress_in_view = suppress_in_view
        self.suppress = suppress

    def __call__(self, views: Iterable[View], size_hw: SizeHW) -> dict[str, Tensor]:
        """Detect.

        Args:
            views: One or more, of one image.
            size_hw: (H, W) of the image itself.

        Returns:
            By falling score, as many as the model gives for one view at most,
            "boxes":  (D, 4) xyxy in pixels of the image itself,
            "labels": (D,) int64 in [0, K),
            "scores": (D,) in [0, 1],
            "masks":  (D, 1, M, M) in [0, 1], each relative to its box.
        """
        looks = [self._look(view) for view in views]
        boxes = torch.cat([look.view.boxes_to_original(look.boxes, size_hw) for look in looks])
        labels = torch.cat([look.labels for look in looks])
        most = self.roi_heads.select.max_detections
        rows, scores = self.suppress(boxes, torch.cat([look.scores for look in looks]), labels, most)
        boxes, labels = boxes[rows], labels[rows]
        masks = torch.stack([self._masks(look, boxes, labels, size_hw) for look in looks]).mean(dim=0)
        return {"boxes": boxes, "labels": labels - 1, "scores": scores, "masks": masks}

    def _look(self, view: View) -> _Look:
        batch, levels = self.model.pyramid([view.image])
        proposals, _ = self.model.rpn(batch, levels, None)
        class_boxes, logits = self.roi_heads.class_boxes(levels, proposals, batch.image_sizes)
        select = self.roi_heads.select
        boxes, scores, labels = select.candidates(class_boxes, functional.softmax(logits, dim=-1), view.size_hw)
        rows, scores = self.suppress_in_view(boxes, scores, labels, select.max_detections)
        return _Look(view, levels, boxes[rows], scores, labels[rows])

    def _masks(self, look: _Look, boxes: Tensor, labels: Tensor, size_hw: SizeHW) -> Tensor:
        own_boxes = look.view.boxes_from_original(boxes, size_hw)
        (masks,) = self.roi_heads.masks(look.levels, [own_boxes], [labels], [look.view.size_hw])
        return look.view.unflipped(masks)


@dataclass(frozen=True)
class _Look:
    """What was found in one view, in its pixels; labels from 1."""

    view: View
    levels: dict[str, Tensor]
    boxes: Tensor
    scores: Tensor
    labels: Tensor


def view_detector(model: MaskRCNN, soft_nms: Literal["linear", "gaussian"] | None = None) -> ViewDetector:
    """A detector whose boxes suppress each other in each view and then once more, or softly and all at once.

    Soft-NMS takes all candidates of all views together, as scores lowered twice would fall too far.

    Args:
        model: In evaluation mode.
        soft_nms: The method of `SoftNMS`, or None for the published models' own suppression.

    Raises:
        ConfigError: There is no such method.
    """
    if soft_nms is None:
        return ViewDetector(model, HardNMS(NMS_IOU), HardNMS(NMS_IOU))
    return ViewDetector(model, keep_all, SoftNMS(soft_nms))
