"""What a detector is trained on, as users give it and as its parts want it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from swin_dense.box_masks import BoxMasks
from swin_dense.errors import DataError
from swin_dense.windows import missing_to_multiple


class Target(TypedDict):
    """The annotated objects of one image, as `MaskRCNN.forward` documents them."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | BoxMasks
    iscrowd: NotRequired[Tensor]


class TrainingTarget(TypedDict):
    """The same for the parts of a detector.

    Attributes:
        boxes: (G, 4) xyxy of the objects.
        labels: (G,) int64 from 1; 0 is background.
        masks: Of the objects.
        ignored_boxes: (I, 4) xyxy of the regions that take no part.
        size_hw: (H, W) of the image.
        padded_size_hw: That size in whole cells of the coarsest backbone map.
    """

    boxes: Tensor
    labels: Tensor
    masks: BoxMasks
    ignored_boxes: Tensor
    size_hw: tuple[int, int]
    padded_size_hw: tuple[int, int]


def training_target(target: Target, image: Tensor, stride: int) -> TrainingTarget:
    """Part the objects from the regions to ignore, and make background class 0.

    Args:
        target: As in `MaskRCNN.forward`. With "iscrowd" on the CPU nothing waits for a GPU.
        image: (C, H, W).
        stride: Of the coarsest backbone map.
    """
    boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
    box_masks = masks if isinstance(masks, BoxMasks) else BoxMasks.from_full(masks)
    ignored_boxes = boxes[:0]
    if "iscrowd" in target:
        is_ignored = target["iscrowd"].bool()
        rows, ignored_rows = (flags.nonzero().squeeze(1) for flags in (~is_ignored, is_ignored))
        ignored_boxes = boxes[ignored_rows.to(boxes.device, non_blocking=True)]
        box_masks, rows = box_masks[rows], rows.to(boxes.device, non_blocking=True)
        boxes, labels = boxes[rows], labels[rows]
    height, width = image.shape[1], image.shape[2]
    return {
        "boxes": boxes,
        "labels": labels + 1,
        "masks": box_masks,
        "ignored_boxes": ignored_boxes,
        "size_hw": (height, width),
        "padded_size_hw": (height + missing_to_multiple(height, stride), width + missing_to_multiple(width, stride)),
    }


def check_target(target: Mapping[str, Any], index: int, size_hw: tuple[int, int], num_classes: int) -> None:
    """Refuse a target that would train something else than meant. Values are looked at on the CPU only.

    Args:
        target: As in `MaskRCNN.forward`.
        index: Of the image in the batch, for the message.
        size_hw: Of the image.
        num_classes: K.

    Raises:
        DataError: Says the image, the field, what was wanted and what was got.
    """
    boxes, labels, masks = (_field(target, index, name) for name in ("boxes", "labels", "masks"))
    is_full = not isinstance(masks, BoxMasks)
    masks_shape = tuple(masks.shape) if is_full else (len(masks), *masks.image_size_hw)
    shapes = {"boxes": tuple(boxes.shape), "labels": tuple(labels.shape), "masks": masks_shape}
    wanted = {"boxes": (len(boxes), 4), "labels": (len(boxes),), "masks": (len(boxes), *size_hw)}
    for name, shape in shapes.items():
        if shape != wanted[name]:
            message = f"target {index}: {name} must have shape {wanted[name]}, got {shape}"
            raise DataError(f"{message}; boxes, labels and masks hold one row per object, masks the image's size.")
    if "iscrowd" in target and tuple(target["iscrowd"].shape) != (len(boxes),):
        got = tuple(target["iscrowd"].shape)
        raise DataError(f"target {index}: iscrowd must have shape {(len(boxes),)}, got {got}; one value per object.")
    pixels = masks if is_full else masks.pixels
    if labels.dtype != torch.int64 or not boxes.is_floating_point() or pixels.dtype not in (torch.uint8, torch.bool):
        dtypes = f"{labels.dtype}, {boxes.dtype} and {pixels.dtype}"
        raise DataError(f"target {index}: labels must be int64, boxes float and masks uint8 or bool, got {dtypes}.")
    if boxes.is_cuda or len(boxes) == 0:
        return
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"target {index}: labels must be 0 to {num_classes - 1} (0-based, background not counted), "
            f"got {labels.min()} to {labels.max()}."
        )
    if pixels.max() > 1:
        raise DataError(f"target {index}: masks must be 0 or 1, got {int(pixels.max())}; divide or compare them first.")
    good = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise DataError(
            f"target {index}: box {row} must be finite xyxy with x2 > x1 and y2 > y1, got {boxes[row].tolist()}."
        )


def _field(target: Mapping[str, Any], index: int, name: str) -> Any:  # noqa: ANN401
    if name not in target:
        raise DataError(f"target {index} has no {name!r}; it holds {', '.join(sorted(target)) or 'nothing'}.")
    return target[name]
