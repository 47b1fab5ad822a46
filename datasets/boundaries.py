"""The pixels of a mask or a label map near its outline, for scores that small faults of large shapes do not hide.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", 2021,
https://arxiv.org/abs/2103.16562
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.segmentations import crop_of_run_lengths, parse_run_lengths

DILATION_RATIO = 0.02
"""Width of a boundary region as a fraction of the image's diagonal; the paper's choice for COCO."""


def boundary_distance(size_hw: tuple[int, int], dilation_ratio: float = DILATION_RATIO) -> int:
    """The width of a boundary region in pixels, at least 1.

    Args:
        size_hw: (height, width) of the image.
        dilation_ratio: fraction of the image's diagonal.
    """
    return max(1, round(dilation_ratio * math.hypot(*size_hw)))


def boundary_rle(rle: Mapping[str, Any], dilation_ratio: float = DILATION_RATIO) -> dict[str, Any]:
    """The boundary region of a mask: its pixels within `boundary_distance` of a pixel outside of it.

    Distance counts diagonal steps as one, and beyond the border of the image is outside, as in the authors' tool. Work
    and memory grow with the mask's box, not with the image. Boundary AP takes as the overlap of two masks the smaller
    one of their IoU and the IoU of their boundary regions; for ignored regions it takes that of the masks alone.

    Args:
        rle: {"size": [H, W], "counts": text or list of numbers}.
        dilation_ratio: fraction of the image's diagonal.

    Returns:
        {"size": [H, W], "counts": str}.

    Raises:
        AnnotationError: the run lengths do not fill an image of that size; the message has no file or id.
    """
    height, width = size_hw = tuple(rle["size"])
    mask, corner_xy = crop_of_run_lengths(parse_run_lengths(dict(rle), size_hw), height)
    boundary = _boundary_of_mask(mask, boundary_distance(size_hw, dilation_ratio))
    return _rle_of_crop(boundary, corner_xy, (height, width))


def boundary_of_labels(classes: np.ndarray, label: np.ndarray, distance: int, rows: slice = slice(None)) -> np.ndarray:
    """The boundary regions of all classes at once: a pixel near one of another class lies in that of its own.

    Near is within `distance`, diagonal steps counted as one; beyond the border of the image is another class. Ignored
    pixels take no part: they lie in no region, and nothing is in a region because of them.

    Args:
        classes: (H, W) integers from 0 to 254: a prediction, or `label` itself. Anything where the label is 255.
        label: (H, W) integers, 255 where nothing counts.
        distance: in pixels.
        rows: the rows wanted; only these and `distance` more on both sides are read.

    Returns:
        (rows, W) bool.
    """
    import cv2

    height, width = classes.shape
    top, bottom, _ = rows.indices(height)
    first = max(top - distance, 0)
    band = slice(first, bottom + distance)
    ignored = label[band] == IGNORED_LABEL
    # An ignored pixel is neither the lowest nor the highest class around.
    highest = np.where(ignored, 0, classes[band]).astype(np.uint8)
    lowest = np.where(ignored, IGNORED_LABEL, highest).astype(np.uint8)
    square = np.ones((3, 3), np.uint8)
    mixed = cv2.erode(lowest, square, iterations=distance) != cv2.dilate(highest, square, iterations=distance)
    boundary = mixed[top - first : bottom - first]
    boundary[: max(distance - top, 0)] = True
    boundary[max(height - distance - top, 0) :] = True
    boundary[:, :distance] = boundary[:, max(width - distance, 0) :] = True
    return boundary & ~ignored[top - first : bottom - first]


def _boundary_of_mask(mask: np.ndarray, distance: int) -> np.ndarray:
    """The boundary region of a mask (h, w) uint8 with nothing of it outside the crop."""
    import cv2

    if min(mask.shape) <= 2 * distance:
        return mask
    inside = cv2.erode(np.pad(mask, 1), np.ones((3, 3), np.uint8), iterations=distance)
    return mask - inside[1:-1, 1:-1]


def _rle_of_crop(mask: np.ndarray, corner_xy: tuple[int, int], size_hw: tuple[int, int]) -> dict[str, Any]:
    """Codes a mask (h, w) uint8 that lies at (x, y) in an image, without drawing the image."""
    from pycocotools import mask as coco_mask

    height, width = size_hw
    left, top = corner_xy
    edges = np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    columns, rows = np.nonzero(edges.T)
    borders = (left + columns) * height + top + rows
    # A run down to the image's last row goes on in the first row of the next column.
    ends = np.flatnonzero(borders[1:] == borders[:-1])
    borders = np.delete(borders, np.concatenate([ends, ends + 1]))
    rest = [] if len(borders) and borders[-1] == height * width else [height * width]
    runs = np.diff(np.concatenate([[0], borders, rest]).astype(np.int64))
    code = coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}
