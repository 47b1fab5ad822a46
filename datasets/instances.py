"""The objects of one image in one record, so that a box, its label, its mask and its id never come apart."""

from dataclasses import dataclass, fields

import numpy as np

from swin_dense.errors import DataError

_DTYPES = {
    "boxes_xyxy": np.float32,
    "labels": np.int64,
    "masks": np.uint8,
    "is_crowd": np.bool_,
    "annotation_ids": np.int64,
}


@dataclass
class Instances:
    """The objects of one image; row i of every field is object i.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the image that the record belongs to.
        labels: (N,) int64, 0-based class indices without background.
        masks: (N, H, W) uint8, 1 on the object, 0 elsewhere; H and W are the image's.
        is_crowd: (N,) bool, True where one region stands for many objects: no training target.
        annotation_ids: (N,) int64, the ids in the annotation file.

    Raises:
        DataError: the fields have different lengths, or a wrong shape or type.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    is_crowd: np.ndarray
    annotation_ids: np.ndarray

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1:
            raise DataError(f"instances: every field needs one row per object, got {lengths}")
        if self.boxes_xyxy.shape[1:] != (4,) or self.masks.ndim != 3:
            raise DataError(
                f"instances: wanted boxes (N, 4) and masks (N, H, W), "
                f"got {self.boxes_xyxy.shape} and {self.masks.shape}"
            )
        for name, dtype in _DTYPES.items():
            got = getattr(self, name).dtype
            if got != dtype:
                raise DataError(f"instances: {name} must be {np.dtype(dtype).name}, got {got}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) of the image, as the masks have it."""
        return self.masks.shape[1], self.masks.shape[2]

    def select(self, rows: np.ndarray) -> "Instances":
        """Returns the objects of some rows, all their fields together.

        Args:
            rows: bool (N,) or integer row numbers, in the order wanted.
        """
        return Instances(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def replace(self, boxes_xyxy: np.ndarray, masks: np.ndarray) -> "Instances":
        """Returns the same objects with other geometry."""
        return Instances(boxes_xyxy, self.labels, masks, self.is_crowd, self.annotation_ids)

    def without_vanished(self) -> "Instances":
        """Returns the objects that still have a box with an area and a mask with a pixel."""
        boxes = self.boxes_xyxy
        has_box = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        kept = has_box & np.array([mask.any() for mask in self.masks], np.bool_)
        return self if kept.all() else self.select(kept)

    @classmethod
    def empty(cls, size_hw: tuple[int, int]) -> "Instances":
        """Returns a record without objects for an image of this (height, width)."""
        return cls(
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
            np.zeros((0, *size_hw), np.uint8),
            np.zeros(0, np.bool_),
            np.zeros(0, np.int64),
        )
