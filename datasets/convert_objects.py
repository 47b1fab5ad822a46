"""Objects on their way into a COCO file: run lengths stay run lengths and polygons stay polygons, never made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.labels import LabelMap


@dataclass(frozen=True)
class ConvertedObject:
    """One object.

    Attributes:
        label: class index.
        segmentation: COCO polygons, or COCO run lengths as text.
        box_xywh: the smallest box of whole pixels around the mask.
        area: pixels of the mask.
    """

    label: int
    segmentation: list[list[float]] | dict[str, Any]
    box_xywh: tuple[float, ...]
    area: int


@dataclass(frozen=True)
class ConvertedImage:
    """One image with its objects.

    Attributes:
        path: the picture in the source.
        file_name: its name in the result.
        size_hw: (height, width) of the frame that the objects are drawn in.
        objects: none for an image of background.
    """

    path: Path
    file_name: str
    size_hw: tuple[int, int]
    objects: tuple[ConvertedObject, ...]


def run_lengths_by_value(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts a map into the run lengths of each of its values, in one pass over the pixels.

    Args:
        values: (H, W) integers.

    Yields:
        (value, (R,) int64 lengths of runs of other pixels and of that value in turn, column by column), by value.
    """
    flat = values.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(flat[starts], kind="stable")
    found, first = np.unique(flat[starts][order], return_index=True)
    for value, runs in zip(found, np.split(order, first[1:]), strict=True):
        borders = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        rest = [] if borders[-1] == flat.size else [flat.size]
        yield int(value), np.diff(np.concatenate([[0], borders, rest]).astype(np.int64))


def object_from_run_lengths(label: int, counts: np.ndarray, size_hw: tuple[int, int]) -> ConvertedObject:
    """Returns the object whose mask these run lengths are, bit for bit.

    Args:
        label: class index.
        counts: (R,) run lengths that fill the picture.
        size_hw: (height, width) of the image.
    """
    from pycocotools import mask as coco_mask

    code = coco_mask.frPyObjects({"size": list(size_hw), "counts": counts.tolist()}, *size_hw)
    text = {"size": list(size_hw), "counts": code["counts"].decode("ascii")}
    return ConvertedObject(label, text, tuple(coco_mask.toBbox(code).tolist()), int(coco_mask.area(code)))


def object_from_polygons(
    label: int, polygons: Sequence[Sequence[float]], size_hw: tuple[int, int]
) -> ConvertedObject | None:
    """Returns the object of polygons, or None where their mask has no pixel.

    Args:
        label: class index.
        polygons: checked, each x and y in turn of at least 3 points, in pixels.
        size_hw: (height, width) of the image.
    """
    from pycocotools import mask as coco_mask

    # Rounded first, so that box and area are those of the polygons in the file.
    segmentation = [[round(float(number), 3) for number in polygon] for polygon in polygons]
    code = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size_hw))
    area = int(coco_mask.area(code))
    if not area:
        return None
    return ConvertedObject(label, segmentation, tuple(coco_mask.toBbox(code).tolist()), area)


def coco_content(images: Sequence[ConvertedImage], label_map: LabelMap) -> dict[str, Any]:
    """Returns the content of a COCO annotation file; ids count from 1 in the order given."""
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for each in image.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label_map.raw_ids[each.label],
                    "bbox": list(each.box_xywh),
                    "area": each.area,
                    "iscrowd": 0,
                    "segmentation": each.segmentation,
                }
            )
    return {
        "images": [
            {"id": image_id, "file_name": image.file_name, "height": image.size_hw[0], "width": image.size_hw[1]}
            for image_id, image in enumerate(images, start=1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": raw_id, "name": name} for raw_id, name in zip(label_map.raw_ids, label_map.names, strict=True)
        ],
    }
