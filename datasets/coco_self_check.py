"""The evaluator's proof on a ground truth, before it judges a model by it: what is annotated, predicted, scores 1."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.coco_matching import KINDS, MAX_DETECTIONS
from swin_dense.datasets.coco_objects import ImageObjects, objects_by_image
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

# pycocotools adds the smallest number to a denominator, so that a single right detection has a precision of 1 - 2e-16.
_LEAST_SCORE = 1 - 1e-12
_METRICS = ("AP", "AR100")
_NUM_SHOWN = 10


def require_perfect_score(
    ground_truth: Mapping[str, Any], label_map: LabelMap, kinds: Sequence[str] = ("box", "mask")
) -> list[str]:
    """Feeds the objects of a ground truth to the evaluator as detections; every class must reach AP 1 and AR 1.

    Two sorts of objects no detector can ever find by COCO's rules. They are left out of the proof and told:
    objects without extent, which overlap nothing, and those beyond 100 of one class in an image.

    Args:
        ground_truth: As `CocoEvaluator` takes it; "mask" and "boundary" need segmentations.
        label_map: As `CocoEvaluator` takes it.
        kinds: What to prove.

    Returns:
        Sentences about objects that cost every detector score; empty for most data sets.

    Raises:
        DataError: The ground truth cannot be scored, or a class stays below 1: names the class, the first image and the
            annotation ids.
    """
    with_masks = any(KINDS[kind].needs_masks for kind in kinds)
    empty: list[int] = []
    surplus: list[int] = []
    for objects in objects_by_image(ground_truth, label_map).values():
        has_extent = _has_extent(objects, with_masks)
        empty += objects.rows[~has_extent].tolist()
        surplus += objects.rows[_is_beyond_limit(objects, has_extent)].tolist()
    annotations = ground_truth["annotations"]
    provable = _without(ground_truth, {*empty, *surplus})
    imperfect = next(_imperfect(provable, label_map, kinds), None)
    if imperfect is not None:
        name, kind, metric, score = imperfect
        raise DataError(
            f"The ground truth, predicted as it is, must score 1, but the class {name!r} has a {kind} {metric} of "
            f"{score:.6g}. {_culprit(provable, label_map, kind, name)}"
        )
    notes = []
    if empty:
        ids = _listing([annotations[row].get("id") for row in empty])
        notes.append(
            f"Objects without extent: {len(empty)}, annotation ids {ids}. No detection can ever match them, so each "
            "counts as missed."
        )
    if surplus:
        images = list(dict.fromkeys(annotations[row]["image_id"] for row in surplus))
        notes.append(
            f"Images with more than {MAX_DETECTIONS[-1]} objects of one class: {len(images)}, ids {_listing(images)}. "
            f"COCO scores no more detections than that, so {len(surplus)} objects count as missed."
        )
    return notes


def _has_extent(objects: ImageObjects, with_masks: bool) -> np.ndarray:
    from pycocotools import mask as coco_mask

    # Sides as the intersection has them: far from the corner, the smallest ones vanish.
    corners = objects.boxes_xywh[:, :2] + objects.boxes_xywh[:, 2:]
    has_extent = (corners > objects.boxes_xywh[:, :2]).all(axis=1)
    if with_masks and len(objects):
        has_extent &= coco_mask.area(objects.masks) > 0
    return has_extent | objects.is_crowd


def _is_beyond_limit(objects: ImageObjects, is_scored: np.ndarray) -> np.ndarray:
    counts = is_scored & ~objects.is_crowd
    is_same_class = objects.labels[:, np.newaxis] == objects.labels
    before = np.tril(is_same_class, k=-1) @ counts.astype(np.int64)
    return counts & (before >= MAX_DETECTIONS[-1])


def _without(ground_truth: Mapping[str, Any], rows: Collection[int]) -> dict[str, Any]:
    kept = [annotation for row, annotation in enumerate(ground_truth["annotations"]) if row not in rows]
    return {**ground_truth, "annotations": kept}


def _imperfect(
    ground_truth: Mapping[str, Any], label_map: LabelMap, kinds: Sequence[str]
) -> Iterator[tuple[str, str, str, float]]:
    """(class, kind, metric, score) of everything below 1."""
    per_class = _scores_of_itself(ground_truth, label_map, kinds)["per_class"]
    for name, scores in per_class.items():
        for kind in kinds:
            for metric in _METRICS:
                score = scores[f"{kind}_{metric}"]
                if score is not None and not score >= _LEAST_SCORE:
                    yield name, kind, metric, score


def _scores_of_itself(ground_truth: Mapping[str, Any], label_map: LabelMap, kinds: Sequence[str]) -> dict[str, Any]:
    with_masks = any(KINDS[kind].needs_masks for kind in kinds)
    evaluator = CocoEvaluator(ground_truth, label_map, kinds=kinds, keep_results=False)
    for image_id, objects in objects_by_image(ground_truth, label_map).items():
        rows = np.flatnonzero(~objects.is_crowd)
        boxes_xyxy = objects.boxes_xywh[rows]
        boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
        masks = [objects.masks[row] for row in rows] if with_masks else None
        evaluator.add(image_id, boxes_xyxy, np.ones(len(rows)), objects.labels[rows], masks)
    return evaluator.compute()


def _culprit(ground_truth: Mapping[str, Any], label_map: LabelMap, kind: str, name: str) -> str:
    """Scores image by image, then object by object, until one is found that fails alone."""
    images = {image["id"]: image for image in ground_truth["images"]}
    for image_id, objects in objects_by_image(ground_truth, label_map).items():
        rows = objects.rows[objects.labels == label_map.names.index(name)]
        own = [ground_truth["annotations"][row] for row in rows]
        if _fails(ground_truth, images[image_id], own, label_map, kind):
            alone = [each for each in own if _fails(ground_truth, images[image_id], [each], label_map, kind)]
            ids = _listing([each.get("id") for each in alone or own])
            why = "do not match themselves" if alone else "match themselves one by one, but not together"
            return f"In image {image_id}, the annotation ids {ids} {why}. Look at their {kind}."
    return "Every image scores 1 by itself: the fault is the evaluator's, not the data's."


def _fails(
    ground_truth: Mapping[str, Any],
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    label_map: LabelMap,
    kind: str,
) -> bool:
    part = {**ground_truth, "images": [image], "annotations": annotations}
    return next(_imperfect(part, label_map, [kind]), None) is not None


def _listing(ids: Sequence[object]) -> str:
    shown = ", ".join(map(str, ids[:_NUM_SHOWN]))
    return f"{shown} and {len(ids) - _NUM_SHOWN} more" if len(ids) > _NUM_SHOWN else shown
