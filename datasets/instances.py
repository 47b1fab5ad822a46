"""The objects of one image in one record, so that a box, its label, its outline and its id never come apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from swin_dense.box_masks import BoxMasks
from swin_dense.datasets.outlines import Frame, MaskInBox, Outline
from swin_dense.errors import DataError

_DTYPES = {"boxes_xyxy": np.float32, "labels": np.int64, "is_crowd": np.bool_, "annotation_ids": np.int64}


@dataclass
class Instances:
    """The objects of one image; row i of every field is object i.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the image that the record belongs to.
        labels: (N,) int64, 0-based class indices without background.
        outlines: N outlines, in pixels of the file's picture, or of the image in which `drawn` drew them.
        is_crowd: (N,) bool, True where a region takes no part, neither as an object nor as background: a crowd, or one
            that the file says to ignore.
        annotation_ids: (N,) int64, the ids in the annotation file.
        frame: from the pixels of the outlines to the image.

    Raises:
        DataError: the fields have different lengths, or a wrong shape or type.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    outlines: Sequence[Outline]
    is_crowd: np.ndarray
    annotation_ids: np.ndarray
    frame: Frame

    def __post_init__(self) -> None:
        names = ("boxes_xyxy", "labels", "outlines", "is_crowd", "annotation_ids")
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) != 1:
            raise DataError(f"instances: every field needs one row per object, got {lengths}")
        if self.boxes_xyxy.shape[1:] != (4,):
            raise DataError(f"instances: wanted boxes (N, 4), got {self.boxes_xyxy.shape}")
        for name, dtype in _DTYPES.items():
            got = getattr(self, name).dtype
            if got != dtype:
                raise DataError(f"instances: {name} must be {np.dtype(dtype).name}, got {got}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.frame.size_hw

    def select(self, rows: np.ndarray) -> "Instances":
        """Returns the objects of some rows, all their fields together.

        Args:
            rows: bool (N,) or integer row numbers, in the order wanted.
        """
        outlines = [self.outlines[row] for row in np.arange(len(self))[rows]]
        return Instances(
            self.boxes_xyxy[rows],
            self.labels[rows],
            outlines,
            self.is_crowd[rows],
            self.annotation_ids[rows],
            self.frame,
        )

    def moved(self, boxes_xyxy: np.ndarray, frame: Frame) -> "Instances":
        """Returns the objects in another frame, without those whose box has no area there."""
        moved = Instances(boxes_xyxy, self.labels, self.outlines, self.is_crowd, self.annotation_ids, frame)
        has_box = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
        return moved if has_box.all() else moved.select(np.flatnonzero(has_box))

    def drawn(self) -> "Instances":
        """Returns the objects that have a mask pixel, with masks drawn in this image and boxes that bound them."""
        return self.with_drawn_masks([outline.draw(self.frame) for outline in self.outlines])

    def with_drawn_masks(self, masks: Sequence[MaskInBox]) -> "Instances":
        """Returns the objects with other masks, and boxes that bound them, without those whose mask is empty.

        Args:
            masks: N masks, each inside its bounding box, in pixels of this image.
        """
        boxes = np.array([(x, y, x + mask.shape[1], y + mask.shape[0]) for mask, (x, y) in masks], np.float32)
        outlines = [Outline(drawn=mask) for mask in masks]
        return replace(self, outlines=outlines).moved(boxes.reshape(-1, 4), Frame.of_file(self.size_hw))

    def followed_by(self, others: "Instances") -> "Instances":
        """Returns these objects and then others, of the same frame.

        Raises:
            DataError: the frames differ.
        """
        if others.frame != self.frame:
            raise DataError(f"instances: only those of one frame can be joined, got {self.frame} and {others.frame}")
        return Instances(
            np.concatenate([self.boxes_xyxy, others.boxes_xyxy]),
            np.concatenate([self.labels, others.labels]),
            [*self.outlines, *others.outlines],
            np.concatenate([self.is_crowd, others.is_crowd]),
            np.concatenate([self.annotation_ids, others.annotation_ids]),
            self.frame,
        )

    def with_masks(self) -> tuple["Instances", BoxMasks]:
        """Draws all masks, each inside its bounding box.

        Returns:
            the objects that have a mask pixel, and their masks.
        """
        drawn = [outline.draw(self.frame) for outline in self.outlines]
        has_pixel = np.array([mask.size > 0 for mask, _ in drawn], np.bool_)
        crops = [torch.from_numpy(mask) for mask, _ in drawn if mask.size]
        corners_xy = [corner_xy for mask, corner_xy in drawn if mask.size]
        kept = self if has_pixel.all() else self.select(has_pixel)
        return kept, BoxMasks.from_crops(crops, corners_xy, self.size_hw)

    @classmethod
    def empty(cls, size_hw: tuple[int, int]) -> "Instances":
        """Returns a record without objects for an image of this (height, width)."""
        none = np.zeros(0, np.int64)
        return cls(np.zeros((0, 4), np.float32), none, (), np.zeros(0, np.bool_), none, Frame.of_file(size_hw))
