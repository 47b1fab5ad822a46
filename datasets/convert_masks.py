"""Label pictures into objects: each instance number, or each connected component of a class, becomes one mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.convert_findings import Findings, listed_values
from swin_dense.datasets.convert_objects import (
    ConvertedImage,
    ConvertedObject,
    object_from_run_lengths,
    run_lengths_by_value,
)
from swin_dense.datasets.convert_pictures import paired_pictures, require_size
from swin_dense.datasets.images import read_label
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError, DataError

Objects = tuple[ConvertedObject, ...]
_BACKGROUND = 0


class NumberedInstances:
    """Reads a mask whose values number its objects, 0 the background; all objects are of class 0.

    Args:
        ignored_values: values that are no objects; None stops at 255, which may be either.
    """

    def __init__(self, ignored_values: tuple[int, ...] | None = None) -> None:
        self._ignored_values = ignored_values

    def __call__(self, values: np.ndarray) -> Objects:
        """Returns the objects of an (H, W) mask, by their numbers.

        Raises:
            DataError: 255 occurs and nothing says what it is, or a value is negative.
        """
        if values.min() < 0:
            raise DataError(f"instance numbers must be 0 or more, got {values.min()}")
        ignored = self._ignored_values
        if ignored is None and (values == IGNORED_LABEL).any():
            raise DataError(
                f"value {IGNORED_LABEL} ({(values == IGNORED_LABEL).sum()} px) may be an object or an area to ignore. "
                f"Pass --ignored-values {IGNORED_LABEL}, or --ignored-values without a value to take it as an object"
            )
        left_out = {_BACKGROUND, *(ignored or ())}
        size_hw = (values.shape[0], values.shape[1])
        return tuple(
            object_from_run_lengths(0, counts, size_hw)
            for value, counts in run_lengths_by_value(values)
            if value not in left_out
        )


class ComponentInstances:
    """Reads a mask whose values are classes; pixels of a class that touch, also at corners, make one object.

    Args:
        label_map: the classes and their values, and the values that are background or ignored.

    Raises:
        ConfigError: the label map has a value that no label picture can hold.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self._label_map = label_map
        self._value_table = label_map.value_table()

    def __call__(self, values: np.ndarray) -> Objects:
        """Returns the objects of an (H, W) mask, class by class.

        Raises:
            DataError: a value is not in the label map.
        """
        import cv2

        indices = self._value_table[values.clip(0, len(self._value_table) - 1)]
        unknown = (indices < 0) | (values < 0) | (values >= len(self._value_table))
        if unknown.any():
            raise DataError(self._describe_unknown(values[unknown]))
        size_hw = (values.shape[0], values.shape[1])
        objects: list[ConvertedObject] = []
        for index in np.unique(indices[indices != IGNORED_LABEL]):
            _, components = cv2.connectedComponents((indices == index).astype(np.uint8), connectivity=8)
            objects += [
                object_from_run_lengths(int(index), counts, size_hw)
                for number, counts in run_lengths_by_value(components)
                if number
            ]
        return tuple(objects)

    def _describe_unknown(self, values: np.ndarray) -> str:
        found = [f"{value} ({count} px)" for value, count in zip(*np.unique(values, return_counts=True), strict=True)]
        known = [f"{value} {name}" for value, name in zip(self._label_map.raw_ids, self._label_map.names, strict=True)]
        return (
            f"no class has the value {listed_values(found)}; the classes are {listed_values(known, 20)}. "
            f"Add names, change --first-value, or pass --ignored-values"
        )


def component_labels(names: tuple[str, ...], first_value: int, ignored_values: tuple[int, ...] | None) -> LabelMap:
    """Returns the label map of class values in turn; 0, where it is no class, and 255 are no objects."""
    values = tuple(range(first_value, first_value + len(names)))
    left_out = {_BACKGROUND, *(ignored_values or ())}
    if ignored_values is not None:
        clash = sorted(set(values) & set(ignored_values))
        if clash:
            raise ConfigError(f"value {clash[0]} is both a class and an ignored value; keep one of the two.")
    return LabelMap(names, values, tuple(sorted(left_out - set(values))))


def read_masks(
    image_folder: Path,
    mask_folder: Path,
    read_objects: Callable[[np.ndarray], Objects],
    findings: Findings,
    mask_suffix: str = "",
    report: Callable[[int, int], None] | None = None,
) -> Iterator[ConvertedImage]:
    """Reads images with masks of the same names.

    Args:
        image_folder: folder of images.
        mask_folder: folder of 8- or 16-bit grey or palette pictures; of a palette the indices count, not the colours.
        read_objects: `NumberedInstances` or `ComponentInstances`.
        findings: takes faults and notes.
        mask_suffix: what a mask's name has after the image's.
        report: called as `report(done, in_all)`.

    Yields:
        The images in the order of their names.

    Raises:
        DataError: a folder is missing or empty.
    """
    pairs = paired_pictures(image_folder, mask_folder, findings, mask_suffix)
    for done, (image_path, mask_path) in enumerate(pairs, start=1):
        with findings.collected():
            values = read_label(mask_path)
            size_hw = (values.shape[0], values.shape[1])
            require_size(image_path, size_hw)
            try:
                objects = read_objects(values)
            except DataError as error:
                raise DataError(f"{mask_path}: {str(error).rstrip('.')}.") from None
            yield ConvertedImage(image_path, image_path.name, size_hw, objects)
        if report is not None:
            report(done, len(pairs))
