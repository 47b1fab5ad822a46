"""The objects of a COCO ground truth, image by image, as the evaluation takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from swin_dense.datasets.coco_annotations import parse_segmentation
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import AnnotationError, DataError


@dataclass(frozen=True)
class ImageObjects:
    """The objects and crowd regions of one image, in the order of the ground truth.

    Annotation ids play no part in scoring, so that they may start at 0 or repeat.

    Attributes:
        image_id: As in the ground truth.
        size_hw: (height, width) of the image.
        rows: (N,) int64, places in the ground truth's list of annotations.
        labels: (N,) int64 class indices.
        boxes_xywh: (N, 4) float64, pixels.
        areas: (N,) float64, pixels; decides about the size class.
        is_crowd: (N,) bool, regions in which detections cost nothing: `iscrowd` or `ignore`.
        segmentations: N polygons or run lengths as the ground truth has them; None where it has none.
    """

    image_id: int
    size_hw: tuple[int, int]
    rows: np.ndarray
    labels: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    segmentations: Sequence[Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lacks_masks(self) -> bool:
        """Whether an object has no segmentation; a region without one is its box."""
        return any(not mask and not crowd for mask, crowd in zip(self.segmentations, self.is_crowd, strict=True))

    @cached_property
    def masks(self) -> list[dict[str, Any]]:
        """N compressed run lengths, drawn as pycocotools draws.

        Raises:
            AnnotationError: A segmentation does not fit the image.
        """
        boxes = self.boxes_xywh.tolist()
        return [
            _compressed(segmentation or [_corners(box, self.size_hw)], self.size_hw, self.image_id)
            for segmentation, box in zip(self.segmentations, boxes, strict=True)
        ]


def objects_by_image(ground_truth: Mapping[str, Any], label_map: LabelMap) -> dict[int, ImageObjects]:
    """Sorts the annotations by image, and adds what they may lack: `iscrowd` 0, area and box those of the mask.

    Args:
        ground_truth: COCO's sections images, annotations and categories; it is not changed.
        label_map: From category ids to class indices.

    Returns:
        Image id -> its objects, images without any among them.

    Raises:
        DataError: A section is missing, there is no image, label map and categories differ, an annotation is of an
            unknown image or category, has a box or area that is not finite, or has neither a segmentation nor a box.
        AnnotationError: An area or box is missing, and the segmentation to take it from does not fit the image.
    """
    _check_sections(ground_truth, label_map)
    sizes_hw = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    index_of = {raw_id: index for index, raw_id in enumerate(label_map.raw_ids)}
    rows: dict[int, list[int]] = {image_id: [] for image_id in sizes_hw}
    annotations = ground_truth["annotations"]
    for row, annotation in enumerate(annotations):
        if annotation["image_id"] not in sizes_hw:
            raise DataError(f"{_name(annotation)} is of an image that is not among the {len(sizes_hw)} images.")
        if annotation["category_id"] not in index_of:
            raise DataError(f"{_name(annotation)}: category_id {annotation['category_id']} is not among {[*index_of]}.")
        rows[annotation["image_id"]].append(row)
    return {
        image_id: _image_objects(image_id, sizes_hw[image_id], rows[image_id], annotations, index_of)
        for image_id in sizes_hw
    }


def _check_sections(ground_truth: Mapping[str, Any], label_map: LabelMap) -> None:
    missing = {"images", "annotations", "categories"} - ground_truth.keys()
    if missing or not ground_truth["images"]:
        raise DataError(f"The ground truth has no {sorted(missing)[0] if missing else 'images'}.")
    categories = sorted(category["id"] for category in ground_truth["categories"])
    if categories != sorted(label_map.raw_ids):
        raise DataError(
            f"The ground truth has the category ids {categories}, the label map {sorted(label_map.raw_ids)}. "
            "Evaluate with the label map of the data set that the model was trained on."
        )


def _image_objects(
    image_id: int,
    size_hw: tuple[int, int],
    rows: Sequence[int],
    annotations: Sequence[Mapping[str, Any]],
    index_of: Mapping[int, int],
) -> ImageObjects:
    own = [annotations[row] for row in rows]
    extents = [_extent(annotation, size_hw) for annotation in own]
    return ImageObjects(
        image_id=image_id,
        size_hw=size_hw,
        rows=np.array(rows, np.int64),
        labels=np.array([index_of[each["category_id"]] for each in own], np.int64),
        boxes_xywh=np.array([box for box, _ in extents], np.float64).reshape(-1, 4),
        areas=np.array([area for _, area in extents], np.float64),
        # pycocotools overwrites "ignore" with "iscrowd", so that only this way both count.
        is_crowd=np.array([bool(each.get("iscrowd") or each.get("ignore")) for each in own], bool),
        segmentations=[each.get("segmentation") for each in own],
    )


def _extent(annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> tuple[Sequence[float], float]:
    box, area = annotation.get("bbox"), annotation.get("area")
    if annotation.get("segmentation") and (box is None or area is None):
        from pycocotools import mask as coco_mask

        mask = _compressed(annotation["segmentation"], size_hw, annotation["image_id"])
        box = coco_mask.toBbox(mask).tolist() if box is None else box
        area = float(coco_mask.area(mask)) if area is None else area
    if box is None:
        raise DataError(f"{_name(annotation)} has neither a segmentation nor a box.")
    if area is None:
        area = box[2] * box[3]
    # An intersection with NaN compares false everywhere, and pycocotools takes that for a match.
    if len(box) != 4 or not all(map(math.isfinite, (*box, area))):
        raise DataError(
            f"{_name(annotation)}: wanted a bbox of four finite numbers and a finite area, got {box}, {area}."
        )
    return box, area


def _compressed(segmentation: Any, size_hw: tuple[int, int], image_id: int) -> dict[str, Any]:  # noqa: ANN401
    from pycocotools import mask as coco_mask

    try:
        polygons, runs = parse_segmentation(segmentation, size_hw)
    except AnnotationError as error:
        raise AnnotationError(f"An object of image {image_id}: {error}.") from error
    if runs is None:
        return coco_mask.merge(coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], *size_hw))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size_hw)
    return segmentation


def _corners(box_xywh: Sequence[float], size_hw: tuple[int, int]) -> list[float]:
    x, y, width, height = box_xywh
    left, right = (min(max(side, 0.0), float(size_hw[1])) for side in (x, x + width))
    top, bottom = (min(max(side, 0.0), float(size_hw[0])) for side in (y, y + height))
    return [left, top, left, bottom, right, bottom, right, top]


def _name(annotation: Mapping[str, Any]) -> str:
    return f"Annotation {annotation.get('id')} of image {annotation['image_id']}"
