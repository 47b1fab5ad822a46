"""Resize, crop and flip as values: once drawn, each is applied to image, label map and objects alike."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from swin_dense.datasets.instances import Instances


class Operation(Protocol):
    """A change of geometry with all its parameters fixed; it never changes its input in place."""

    def image(self, image: np.ndarray) -> np.ndarray:
        """Returns the changed (H, W, 3) uint8 image."""

    def label(self, label: np.ndarray) -> np.ndarray:
        """Returns the changed (H, W) uint8 label map; no value appears that was not there, except 255."""

    def instances(self, instances: Instances) -> Instances:
        """Returns the changed objects, without those whose box vanished; what has no mask pixel shows when drawn."""


@dataclass(frozen=True)
class Resize:
    """Scales to an exact size: bilinear on uint8 without antialiasing for the image, nearest for labels.

    This is the filter that the published models were trained and measured with (cv2's, through albumentations).

    Attributes:
        size_hw: (height, width) wanted.
    """

    size_hw: tuple[int, int]

    def image(self, image: np.ndarray) -> np.ndarray:
        """Returns (height, width, 3) uint8."""
        return self._albumentations_resize()(image=image)["image"]

    def label(self, label: np.ndarray) -> np.ndarray:
        """Returns (height, width) with values of the input only."""
        return self._albumentations_resize().apply_to_mask(label, interpolation=_cv2().INTER_NEAREST)

    def instances(self, instances: Instances) -> Instances:
        """Scales boxes and outlines."""
        old_height, old_width = instances.size_hw
        height, width = self.size_hw
        scale_xyxy = np.array([width / old_width, height / old_height] * 2, np.float32)
        return instances.moved(instances.boxes_xyxy * scale_xyxy, instances.frame.resized(self.size_hw))

    def _albumentations_resize(self) -> Any:  # noqa: ANN401 - albumentations is untyped
        cv2 = _cv2()
        return load_albumentations().Resize(
            *self.size_hw, interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST
        )


@dataclass(frozen=True)
class Crop:
    """Cuts a rectangle out, all of which lies in the image.

    Attributes:
        top: first row.
        left: first column.
        size_hw: (height, width) of the rectangle.
    """

    top: int
    left: int
    size_hw: tuple[int, int]

    def image(self, image: np.ndarray) -> np.ndarray:
        """Returns the rectangle of the image."""
        return image[self.top : self.top + self.size_hw[0], self.left : self.left + self.size_hw[1]]

    def label(self, label: np.ndarray) -> np.ndarray:
        """Returns the rectangle of the label map."""
        return self.image(label)

    def instances(self, instances: Instances) -> Instances:
        """Clips boxes to the rectangle, as published; objects whose box lies outside are left out."""
        shifted = instances.boxes_xyxy - np.array([self.left, self.top] * 2, np.float32)
        frame = instances.frame.cropped(self.top, self.left, self.size_hw)
        return instances.moved(clip_boxes(shifted, self.size_hw), frame)


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right."""

    def image(self, image: np.ndarray) -> np.ndarray:
        """Returns the mirrored image."""
        # More than ten times as fast as a copy that numpy makes backwards.
        return _cv2().flip(image, 1)

    def label(self, label: np.ndarray) -> np.ndarray:
        """Returns the mirrored label map."""
        return self.image(label)

    def instances(self, instances: Instances) -> Instances:
        """Mirrors boxes and outlines."""
        boxes = instances.boxes_xyxy.copy()
        boxes[:, [0, 2]] = instances.size_hw[1] - instances.boxes_xyxy[:, [2, 0]]
        return instances.moved(boxes, instances.frame.flipped())


@dataclass(frozen=True)
class Pad:
    """Fills up at the bottom and right to at least a size; what is new belongs to no object.

    Attributes:
        size_hw: the least (height, width).
        fill_rgb: colour of the new image pixels.
        fill_label: value of the new label pixels.
    """

    size_hw: tuple[int, int]
    fill_rgb: tuple[int, int, int]
    fill_label: int

    def image(self, image: np.ndarray) -> np.ndarray:
        """Returns an image of at least the size."""
        return self._fill(image, self.fill_rgb)

    def label(self, label: np.ndarray) -> np.ndarray:
        """Returns a label map of at least the size."""
        return self._fill(label, self.fill_label)

    def instances(self, instances: Instances) -> Instances:
        """Draws the masks before the image grows, as outlines may overshoot it; boxes become those of the masks."""
        drawn = instances.drawn()
        size_hw = (max(drawn.size_hw[0], self.size_hw[0]), max(drawn.size_hw[1], self.size_hw[1]))
        return drawn.moved(drawn.boxes_xyxy, drawn.frame.padded(size_hw))

    def _fill(self, picture: np.ndarray, value: int | tuple[int, int, int]) -> np.ndarray:
        bottom, right = (max(0, side - old) for side, old in zip(self.size_hw, picture.shape, strict=False))
        if not bottom and not right:
            return picture
        cv2 = _cv2()
        return cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=value)


def draw_crop(full_hw: tuple[int, int], crop_hw: tuple[int, int], generator: np.random.Generator) -> Crop:
    """Draws where a rectangle of a (height, width) lies in an image of another, each place with the same probability.

    Args:
        full_hw: of the image.
        crop_hw: of the rectangle, which must fit.
        generator: source of random numbers; two are taken.
    """
    top = int(generator.integers(full_hw[0] - crop_hw[0] + 1))
    left = int(generator.integers(full_hw[1] - crop_hw[1] + 1))
    return Crop(top, left, crop_hw)


def channels_first(image: np.ndarray) -> np.ndarray:
    """Returns a new (C, H, W) array of an (H, W, C) image."""
    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
    # Several times as fast as numpy's transposed copy; cv2 fills the arrays that it gets where type and size fit.
    _cv2().split(image, list(planes))
    return planes


def clip_boxes(boxes_xyxy: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Returns (N, 4) boxes cut off at the border of an image of this (height, width)."""
    height, width = size_hw
    return boxes_xyxy.clip(0, np.array([width, height] * 2, boxes_xyxy.dtype))


def scaled_size_hw(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """Returns (height, width) times a factor, rounded half up as mmcv does; each side is at least 1."""
    return max(1, int(size_hw[0] * scale + 0.5)), max(1, int(size_hw[1] * scale + 0.5))


def keep_ratio_size_hw(size_hw: tuple[int, int], edges: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size of the same shape whose short and long edge stay within two bounds.

    Args:
        size_hw: (height, width) of the image.
        edges: two bounds in pixels; the smaller one is for the short edge, the larger one for the long edge.
    """
    scale = min(min(edges) / min(size_hw), max(edges) / max(size_hw))
    return scaled_size_hw(size_hw, scale)


def load_albumentations() -> Any:  # noqa: ANN401 - albumentations is untyped
    """Imports albumentations without its look for updates on the network."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _cv2() -> Any:  # noqa: ANN401 - cv2 is untyped here
    import cv2

    return cv2
