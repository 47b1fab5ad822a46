"""COCO results files and the annotations that they are scored against, read without images and without a model."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.coco_annotations import parse_segmentation
from swin_dense.datasets.coco_json import (
    collection_paused,
    describe_bad_json,
    is_id,
    read_categories,
    read_coco_json,
    read_json_text,
)
from swin_dense.datasets.coco_matching import KINDS, Detections
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.run_length_batches import compress_masks, measure_masks
from swin_dense.errors import AnnotationError

_NUM_SHOWN = 10


@dataclass(frozen=True)
class ResultsTruth:
    """The annotations that results are scored against.

    Attributes:
        content: COCO's three sections, as the file has them.
        label_map: its categories in the order of their ids.
        has_masks: whether every annotation has a segmentation.
    """

    content: dict[str, Any]
    label_map: LabelMap
    has_masks: bool

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images, in file order."""
        return [image["id"] for image in self.content["images"]]

    def only(self, image_ids: Sequence[int]) -> "ResultsTruth":
        """The same for some of the images."""
        wanted = set(image_ids)
        content = {
            **self.content,
            "images": [image for image in self.content["images"] if image["id"] in wanted],
            "annotations": [each for each in self.content["annotations"] if each["image_id"] in wanted],
        }
        return ResultsTruth(content, self.label_map, self.has_masks)


def read_results_truth(path: str | Path) -> ResultsTruth:
    """Reads annotations to score results against: less is asked of them than of those that a model is trained on.

    Images need an id, a width and a height, but no file; annotations may lack segmentation, area and crowd flag.

    Raises:
        AnnotationError: an image, category or annotation cannot be scored against; names its id and field.
    """
    content = read_coco_json(path)
    label_map = read_categories(path, content["categories"])
    sizes_hw = _checked_sizes(path, content["images"])
    categories, has_masks = set(label_map.raw_ids), True
    for position, annotation in enumerate(content["annotations"]):
        try:
            has_masks &= _check_annotation(annotation, sizes_hw, categories)
        except AnnotationError as error:
            number = annotation.get("id") if isinstance(annotation, dict) else None
            where = f"annotations[{position}]" if number is None else f"annotation id={number}"
            raise AnnotationError(f"{path}: {where}: {str(error).rstrip('.')}. Correct the entry.") from None
    return ResultsTruth(content, label_map, has_masks)


def read_results(path: str | Path, truth: ResultsTruth) -> dict[int, list[dict[str, Any]]]:
    """Reads a COCO results file: [{"image_id", "category_id", "score", "bbox" or "segmentation" or both}, …].

    Args:
        path: the file.
        truth: the annotations that it belongs to.

    Returns:
        image id -> its detections as they are in the file, in its order; boxes are x, y, width, height in pixels of the
        image. Images without any are left out.

    Raises:
        AnnotationError: the file is no results file, or an entry is not finite, incomplete, or of an image or category
            that the annotations do not have; names the entry's position and field. Run lengths are not looked into.
    """
    detections = _read_list(Path(path))
    _check_ids(path, detections, "image_id", set(truth.image_ids), "images")
    _check_ids(path, detections, "category_id", set(truth.label_map.raw_ids), "categories")
    by_image: dict[int, list[dict[str, Any]]] = {}
    fields = _fields(path, detections[0]) if detections else ()
    for position, detection in enumerate(detections):
        try:
            _check_detection(detection, fields)
        except AnnotationError as error:
            raise AnnotationError(f"{path}: result [{position}]: {str(error).rstrip('.')}.") from None
        by_image.setdefault(detection["image_id"], []).append(detection)
    return by_image


def as_detections(
    results: Sequence[Mapping[str, Any]], label_map: LabelMap, size_hw: tuple[int, int], kinds: Sequence[str]
) -> Detections:
    """The results of one image as the evaluation takes them, with the numbers that pycocotools' loadRes gives them.

    With boxes in the file, a detection's size class follows from its box, for masks too; otherwise from its mask.

    Args:
        results: of one image, from `read_results`; may be empty.
        label_map: from category ids to class indices.
        size_hw: (height, width) of the image.
        kinds: what is scored, as `CocoEvaluator` names it; masks are left out where boxes are enough.

    Raises:
        AnnotationError: run lengths do not fill the image; begins with "mask" and its place.
    """
    index_of = {raw_id: index for index, raw_id in enumerate(label_map.raw_ids)}
    labels = np.array([index_of[each["category_id"]] for each in results], np.int32)
    scores = np.array([each["score"] for each in results], np.float64)
    masks = areas = None
    needs_masks = any(KINDS[kind].needs_masks for kind in kinds)
    if needs_masks or (results and not results[0].get("bbox")):
        masks = compress_masks([each["segmentation"] for each in results], size_hw)
        areas = measure_masks(masks, size_hw)
    if not results or results[0].get("bbox"):
        boxes_xywh = np.array([each["bbox"] for each in results], np.float64).reshape(-1, 4)
        areas = None if masks is None else boxes_xywh[:, 2] * boxes_xywh[:, 3]
    else:
        from pycocotools import mask as coco_mask

        boxes_xywh = coco_mask.toBbox(masks)
    return Detections(labels, scores, boxes_xywh, masks if needs_masks else None, areas)


def _read_list(path: Path) -> list[dict[str, Any]]:
    text = read_json_text(path)
    try:
        with collection_paused():
            content = json.loads(text)
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: {describe_bad_json(text, error)}") from None
    except RecursionError:
        raise AnnotationError(f"{path}: brackets are nested too deeply; this is no results file.") from None
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        raise AnnotationError(f"{path}: wanted a results file, a list of detections; got an annotation file.")
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise AnnotationError(f"{path}: wanted a results file, a list of detections; got {type(content).__name__}.")
    return content


def _fields(path: str | Path, first: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of both every detection must have: those of the first, as pycocotools takes it."""
    fields = tuple(field for field in ("bbox", "segmentation") if first.get(field))
    if not fields:
        raise AnnotationError(f"{path}: a result needs bbox, segmentation or both; the first has {sorted(first)}.")
    return fields


def _checked_sizes(path: str | Path, images: Sequence[Any]) -> dict[int, tuple[int, int]]:
    sizes_hw: dict[int, tuple[int, int]] = {}
    for position, image in enumerate(images):
        if not isinstance(image, dict) or not is_id(image.get("id")):
            raise AnnotationError(f"{path}: images[{position}]: id must be a whole number, got {image!r}.")
        for field in ("height", "width"):
            if type(image.get(field)) is not int or image[field] < 1:
                raise AnnotationError(
                    f"{path}: image id={image['id']}: {field} must be a whole number of pixels, at least 1, "
                    f"got {image.get(field)!r}."
                )
        if image["id"] in sizes_hw:
            raise AnnotationError(f"{path}: image id={image['id']} stands twice in images. Keep one of them.")
        sizes_hw[image["id"]] = (image["height"], image["width"])
    return sizes_hw


def _check_annotation(annotation: object, sizes_hw: Mapping[int, tuple[int, int]], categories: set[int]) -> bool:
    if not isinstance(annotation, dict):
        raise AnnotationError(f"wanted an object with image_id and category_id, got {annotation!r}")
    if annotation.get("image_id") not in sizes_hw:
        raise AnnotationError(f"image_id {annotation.get('image_id')!r} is not among the images of the file")
    if annotation.get("category_id") not in categories:
        raise AnnotationError(f"category_id {annotation.get('category_id')!r} is not among the categories")
    if annotation.get("bbox") is None and not annotation.get("segmentation"):
        raise AnnotationError("it has neither a bbox nor a segmentation")
    if annotation.get("bbox") is not None:
        _check_box(annotation["bbox"])
    if annotation.get("area") is not None and not _is_finite(annotation["area"]):
        raise AnnotationError(f"area must be a finite number, got {annotation['area']!r}")
    for field in ("iscrowd", "ignore"):
        if annotation.get(field, 0) not in (0, 1, None):
            raise AnnotationError(f"{field} must be 0 or 1, got {annotation[field]!r}")
    if not annotation.get("segmentation"):
        return bool(annotation.get("iscrowd") or annotation.get("ignore"))
    parse_segmentation(annotation["segmentation"], sizes_hw[annotation["image_id"]])
    return True


def _check_detection(detection: Mapping[str, Any], fields: Sequence[str]) -> None:
    for field in fields:
        if not detection.get(field):
            raise AnnotationError(
                f"{field} is missing, but the first result has it; every result needs the same fields"
            )
    if "score" not in detection:
        raise AnnotationError("it has no score; every detection needs one")
    if not _is_finite(detection["score"]):
        raise AnnotationError(f"score must be a finite number, got {detection['score']!r}")
    if "bbox" in fields:
        _check_box(detection["bbox"])
    if "segmentation" in fields:
        if not isinstance(detection["segmentation"], dict):
            raise AnnotationError('segmentation must be run lengths, {"size": [height, width], "counts": …}')


def _check_ids(
    path: str | Path, detections: Sequence[Mapping[str, Any]], field: str, known: set[int], section: str
) -> None:
    unknown = sorted({repr(each.get(field)) for each in detections if not _is_known(each.get(field), known)})
    if not unknown:
        return
    shown = ", ".join(unknown[:_NUM_SHOWN]) + (", …" if len(unknown) > _NUM_SHOWN else "")
    there = ", ".join(map(str, sorted(known)[:_NUM_SHOWN])) + (", …" if len(known) > _NUM_SHOWN else "")
    advice = "Write the ids of the annotation file, not class indices."
    if section == "images":
        advice = "Write the ids of the annotation file, or name the annotation file that the results belong to."
    raise AnnotationError(
        f"{path}: {len(unknown)} values of {field} are not in the {section} of the annotations: {shown}; there are "
        f"{there}. {advice}"
    )


def _is_known(value: object, known: set[int]) -> bool:
    return is_id(value) and value in known


def _check_box(box: object) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(number) for number in box):
        raise AnnotationError(f"bbox must be four finite numbers x, y, width, height, got {box!r}")
    if box[2] < 0 or box[3] < 0:
        raise AnnotationError(f"bbox {box}: width and height must not be negative")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
