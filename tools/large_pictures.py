"""Pictures of predictions in images that are too large, or hold too many objects, to be drawn at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.drawing import draw_instances, draw_semantic
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.segmentations import crop_of_run_lengths, decode_text_counts
from swin_dense.tools.instance_prediction import InstancePrediction

LONGEST_SIDE = 2048
"""Of a picture in pixels; larger images are reduced by a whole number."""

NAMED_OBJECTS = 32
"""More objects than these would hide the image under their names."""


def draw_large_semantic(image: np.ndarray, label: np.ndarray, label_map: LabelMap) -> np.ndarray:
    """As `draw_semantic`, over the image reduced to `LONGEST_SIDE`."""
    step = _step(image)
    drawn = _reduced(image, step)
    rows, columns = (np.arange(side) * step + step // 2 for side in drawn.shape[:2])
    middles = label[np.ix_(rows.clip(max=label.shape[0] - 1), columns.clip(max=label.shape[1] - 1))]
    return draw_semantic(drawn, middles, label_map, scale=1)


def draw_large_instances(image: np.ndarray, prediction: InstancePrediction, label_map: LabelMap) -> np.ndarray:
    """As `draw_instances`, over the image reduced to `LONGEST_SIDE`; more than `NAMED_OBJECTS` as `draw_semantic`.

    Of more than 255 classes, which that cannot draw, only the `NAMED_OBJECTS` best objects are shown.
    """
    step = _step(image)
    drawn = _reduced(image, step)
    size_hw = (drawn.shape[0], drawn.shape[1])
    if len(prediction.scores) > NAMED_OBJECTS and len(label_map) <= IGNORED_LABEL:
        return draw_semantic(drawn, _classes_of_objects(prediction, step, size_hw), label_map, scale=1)
    shown = prediction.select(np.arange(min(len(prediction.scores), NAMED_OBJECTS)))
    masks = np.zeros((len(shown.scores), *size_hw), np.uint8)
    for mask, code in zip(masks, shown.masks_rle, strict=True):
        mask[_reduced_mask(code, step, size_hw)] = 1
    names = [label_map.names[label] for label in shown.labels]
    return draw_instances(drawn, shown.boxes_xyxy / step, names, masks, shown.scores, label_map=label_map, scale=1)


def _classes_of_objects(prediction: InstancePrediction, step: int, size_hw: tuple[int, int]) -> np.ndarray:
    classes = np.full(size_hw, IGNORED_LABEL, np.uint8)
    widths, heights = (prediction.boxes_xyxy[:, 2:] - prediction.boxes_xyxy[:, :2]).T
    for row in np.argsort(-widths * heights, kind="stable"):  # large ones first, so that none hides a smaller one
        classes[_reduced_mask(prediction.masks_rle[row], step, size_hw)] = prediction.labels[row]
    return classes


def _step(image: np.ndarray) -> int:
    return math.ceil(max(image.shape[:2]) / LONGEST_SIDE)


def _reduced(image: np.ndarray, step: int) -> np.ndarray:
    """The means of squares of `step` pixels: (H, W, 3) uint8 to (H // step, W // step, 3), each side at least 1."""
    step_y, step_x = min(step, image.shape[0]), min(step, image.shape[1])
    height, width = image.shape[0] // step_y, image.shape[1] // step_x
    squares = image[: height * step_y, : width * step_x].reshape(height, step_y, width, step_x, 3)
    return (squares.mean(axis=(1, 3), dtype=np.float32) + 0.5).astype(np.uint8)


def _reduced_mask(code: dict[str, Any], step: int, size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the reduced image in whose middle the object is."""
    crop, (left, top) = crop_of_run_lengths(decode_text_counts(code["counts"]), code["size"][0])
    rows, columns = (
        np.arange(max(0, -((step // 2 - first) // step)), min(all_of, -((step // 2 - first - side) // step)))
        for first, side, all_of in zip((top, left), crop.shape, size_hw, strict=True)
    )
    y, x = np.nonzero(crop[np.ix_(rows * step + step // 2 - top, columns * step + step // 2 - left)])
    return rows[y], columns[x]
