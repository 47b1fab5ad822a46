"""Pictures of findings: the object or the pair that a finding is about, with what is wrong drawn over it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from swin_dense.datasets.check_coco import CocoCheck, CocoSplit
from swin_dense.datasets.check_findings import Finding
from swin_dense.datasets.check_images import opened
from swin_dense.datasets.check_semantic import SemanticCheck, unknown_values
from swin_dense.datasets.check_values import read_box, segmentation_of
from swin_dense.datasets.drawing import class_colours, side_by_side
from swin_dense.datasets.images import read_image, read_label
from swin_dense.errors import ImageError, SwinDenseError

_LONG_SIDE = 420
_LEAST_REGION_PX = 48
_OUTSIDE_MARGIN_PX = 8
_OUTSIDE = (205, 208, 214)
_FARTHEST_PX = 1e6
_UNREADABLE = (240, 241, 244)
_BOX = (225, 30, 40)
_POLYGON = (255, 205, 0)
_UNKNOWN = (255, 0, 200)
_LABEL_COLOURS = 64


def draw_finding(finding: Finding, check: CocoCheck | SemanticCheck) -> np.ndarray | None:
    """Draws one finding.

    An annotation is shown with its surroundings: box in red, polygons or mask in yellow, what is not image in grey.
    Pictures that are alike, turned, or do not fit each other stand side by side. Pixels of unknown values are magenta.

    Returns:
        (h, w, 3) uint8 RGB, about 420 pixels a picture; None where there is nothing to see, as of a missing file.
    """
    try:
        if isinstance(check, SemanticCheck):
            return _draw_pair(finding, check)
        split = next(split for split in check.splits if split.name == finding.split)
        if finding.entry is None:
            return None
        section, position = finding.entry
        if section == "annotations":
            return _draw_annotation(split, split.content["annotations"][position])
        return _draw_picture(finding) if position in split.pictures else None
    except (SwinDenseError, StopIteration):
        return None  # the picture cannot be read: that is the finding


def _draw_annotation(split: CocoSplit, annotation: Any) -> np.ndarray | None:  # noqa: ANN401 - whatever the JSON holds
    if not isinstance(annotation, dict):
        return None
    images = split.content["images"]
    rows = [row for row in split.pictures if images[row]["id"] == annotation.get("image_id") and split.sizes_hw[row]]
    if not rows:
        return None
    size_hw = split.sizes_hw[rows[0]]
    assert size_hw is not None
    box, _ = read_box(annotation.get("bbox"))
    segmentation = segmentation_of(annotation, size_hw)
    image = _with_mask(_readable_image(split.pictures[rows[0]].path, size_hw), segmentation.runs)
    polygons = [np.reshape(polygon, (-1, 2)) for polygon in segmentation.polygons]
    corners = []
    if box is not None:
        x, y, w, h = box
        corners = [np.clip([[x, y], [x + w, y + h]], -_FARTHEST_PX, _FARTHEST_PX)]
    region = _region(np.concatenate([*corners, *polygons]) if corners or polygons else None, size_hw)
    scale = _LONG_SIDE / max(region[2] - region[0], region[3] - region[1])
    canvas = Image.new("RGB", (region[2] - region[0], region[3] - region[1]), _OUTSIDE)
    canvas.paste(Image.fromarray(image), (-region[0], -region[1]))
    canvas = canvas.resize((round(canvas.width * scale) or 1, round(canvas.height * scale) or 1))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        points = (polygon - region[:2]) * scale
        draw.line([*map(tuple, points), tuple(points[0])], fill=_POLYGON, width=2)
    if corners:
        low, high = (np.clip((corner - region[:2]) * scale, -5, max(canvas.size) + 5) for corner in corners[0])
        draw.rectangle((*low, *np.maximum(low, high)), outline=_BOX, width=2)
    return np.array(canvas)


def _region(points: np.ndarray | None, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what to show: the object with a margin, at most one image beyond the image."""
    height, width = size_hw
    if points is None:
        return 0, 0, width, height
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(0.3 * (high - low), (_LEAST_REGION_PX - (high - low)) / 2).clip(min=4)
    limits = np.array([width, height])
    # The margin stays in the image, except around what is not.
    beyond = np.where((low < 0) | (high > limits), _OUTSIDE_MARGIN_PX, 0)
    low = np.maximum(low - margin, np.minimum(low, 0) - beyond).clip(-limits, 2 * limits - 1)
    high = np.minimum(high + margin, np.maximum(high, limits) + beyond).clip(1 - limits, 2 * limits)
    # Some of the image is always in sight, so that one sees how far away the object is.
    low, high = np.minimum(low, limits - limits.clip(max=8)), np.maximum(high, limits.clip(max=8))
    return (*np.floor(low).astype(int).tolist(), *np.ceil(high).astype(int).tolist())


def _readable_image(path: str, size_hw: tuple[int, int]) -> np.ndarray:
    try:
        return read_image(path, size_hw)
    except ImageError:
        return np.full((*size_hw, 3), _UNREADABLE, np.uint8)


def _with_mask(image: np.ndarray, runs: np.ndarray | None) -> np.ndarray:
    if runs is None:
        return image
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(image.shape[1], image.shape[0]).T
    image = image.copy()
    image[mask] = (0.5 * image[mask] + 0.5 * np.array(_POLYGON)).astype(np.uint8)
    return image


def _draw_picture(finding: Finding) -> np.ndarray:
    if finding.other is not None:
        return side_by_side([_small(read_image(path)) for path in (finding.file, finding.other)], ["this", "the other"])
    if finding.kind == "picture-turned":
        turned = read_image(finding.file)  # first, as it says in one way what cannot be read
        with opened(finding.file) as stored:
            as_stored = np.array(stored.convert("RGB"))
        return side_by_side([_small(as_stored), _small(turned)], ["as stored", "turned"])
    return _small(read_image(finding.file))


def _draw_pair(finding: Finding, check: SemanticCheck) -> np.ndarray | None:
    split = next(split for split in check.splits if split.name == finding.split)
    if finding.kind in ("picture-in-two-splits", "picture-repeated", "picture-turned", "picture-converted"):
        return _draw_picture(finding)
    pair = next((pair for pair in split.pairs.values() if pair[1].path == finding.file), None)
    if pair is None:
        return None
    picture, label = pair
    if finding.kind == "label-colours":
        return side_by_side(
            [_small(read_image(picture.path)), _small(read_image(label.path))], ["image", "label picture"]
        )
    values = read_label(label.path)
    colours = np.array(class_colours(_LABEL_COLOURS), np.uint8)[values % _LABEL_COLOURS]
    if check.label_map is not None:
        colours = colours // 2
        colours[np.isin(values, list(unknown_values(label, check.label_map)))] = _UNKNOWN
    return side_by_side([_small(read_image(picture.path)), _small(colours)], ["image", "label picture"])


def _small(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE))
    return np.array(picture)
