"""Scores of predictions that lie in files, without a model: COCO results, or folders of label pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swin_dense.datasets.coco_results import ResultsTruth, as_detections, read_results, read_results_truth
from swin_dense.datasets.coco_self_check import require_perfect_score
from swin_dense.datasets.instance_scores import InstanceScores
from swin_dense.datasets.label_folders import NO_CLASS, LabelFolders, label_map_of_values
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_scores import SemanticScores
from swin_dense.errors import AnnotationError, ConfigError, DataError
from swin_dense.tools.semantic_task import SemanticTask
from swin_dense.tools.tasks import NUM_WORST

KIND_OF_IOU_TYPE = {"bbox": "box", "segm": "mask", "boundary": "boundary"}
"""The words of COCO's tools, and ours."""

Show = Callable[[int, int], None]


def score_results(
    predictions: Path, annotations: Path, iou_types: Sequence[str] | None, *, only_predicted: bool, show: Show
) -> dict[str, Any]:
    """Score a COCO results file; the annotations are proved first to score 1 against themselves.

    Args:
        predictions: The results file.
        annotations: The annotation file.
        iou_types: "bbox", "segm", "boundary"; None: what the first result has.
        only_predicted: Score only the images that have results. Otherwise objects in the others are missed.
        show: Gets how many images were scored, of how many.

    Returns:
        `InstanceScores.compute`, with the twelve numbers of each kind under COCO's word for it, and
        ```
        {"images": number scored, "notes": [sentences about the files]}
        ```

    Raises:
        DataError: A file or one of its entries cannot be scored.
        ConfigError: Masks are asked for, and there are none.
    """
    truth = read_results_truth(annotations)
    by_image = read_results(predictions, truth)
    notes = _note_of_images(truth, by_image, only_predicted)
    if only_predicted:
        if not by_image:
            raise DataError(f"{predictions}: there is no result, so no image has one to score.")
        truth = truth.only(list(by_image))
    kinds = _kinds(iou_types, truth, by_image, annotations)
    notes += require_perfect_score(truth.content, truth.label_map, kinds)
    scores = InstanceScores(truth.content, truth.label_map, kinds=kinds)
    for number, image_id in enumerate(truth.image_ids, start=1):
        objects = scores.coco.objects(image_id)
        try:
            detections = as_detections(by_image.pop(image_id, []), truth.label_map, objects.size_hw, kinds)
        except AnnotationError as error:
            raise AnnotationError(f"{predictions}: results of image {image_id}: {error}.") from None
        scores.add(image_id, detections)
        show(number, len(truth.image_ids))
    words = {kind: word for word, kind in KIND_OF_IOU_TYPE.items()}
    computed = {words.get(name, name): value for name, value in scores.compute().items()}
    return {**computed, "images": len(truth.image_ids), "notes": notes}


def _kinds(
    iou_types: Sequence[str] | None, truth: ResultsTruth, by_image: Mapping[int, Sequence[Any]], where: Path
) -> list[str]:
    first: Mapping[str, Any] = next(iter(by_image.values()), [{}])[0]
    has_masks = truth.has_masks and (bool(first.get("segmentation")) or not first)
    if iou_types is None:
        kinds = ["box"] if first.get("bbox") or not first or not has_masks else []
        return [*kinds, "mask"] if has_masks else kinds
    unknown = ", ".join(word for word in iou_types if word not in KIND_OF_IOU_TYPE)
    if unknown:
        raise ConfigError(f"--iou-type must be some of {', '.join(KIND_OF_IOU_TYPE)}, got {unknown}.")
    if set(iou_types) - {"bbox"} and not has_masks:
        reason = "the results hold no segmentation" if truth.has_masks else f"{where} has objects without segmentation"
        raise ConfigError(f"--iou-type {','.join(iou_types)}: {reason}; score --iou-type bbox.")
    return [KIND_OF_IOU_TYPE[word] for word in iou_types]


def _note_of_images(truth: ResultsTruth, by_image: Mapping[int, Any], only_predicted: bool) -> list[str]:
    missing = len(truth.image_ids) - len(by_image)
    if not missing or only_predicted:
        return []
    return [
        f"{missing} of {len(truth.image_ids)} images have no result: their objects count as missed. Where only a part "
        "was predicted, score that part with --only-predicted."
    ]


def score_label_folders(predictions: Path, annotations: Path, label_map: LabelMap | None, show: Show) -> dict[str, Any]:
    """Score a folder of predicted label pictures.

    Args:
        predictions: The folder.
        annotations: The folder of annotated ones, of the same names.
        label_map: What the values mean; None makes a class of each value of the annotations.
        show: Gets how many pictures were scored, of how many.

    Returns:
        `SemanticScores.compute`, and
        ```
        {"worst_images": [{"name", "mIoU"}], "images": number scored, "notes": [sentences about the files]}
        ```

    Raises:
        DataError: A folder or picture cannot be scored.
    """
    folders = LabelFolders(predictions, annotations, label_map or label_map_of_values(annotations))
    collected = SemanticScores(folders.label_map, unscored=(NO_CLASS,))
    for index in range(len(folders)):
        collected.add(index, *folders.pair(index))
        show(index + 1, len(folders))
    scores = collected.compute()
    worst = [{"name": folders.names[index], "mIoU": iou} for index, iou in collected.worst_images(NUM_WORST)]
    return {**scores, "worst_images": worst, "images": len(folders), "notes": _note_of_absent(scores)}


def _note_of_absent(scores: Mapping[str, Any]) -> list[str]:
    num_absent, num_classes = len(scores["absent"]), len(scores["per_class"])
    if not num_absent or scores["mIoU"] is None:
        return []
    over_all = scores["mIoU"] * (num_classes - num_absent) / num_classes
    return [
        f"{num_absent} of {num_classes} classes are labelled nowhere and take no part in the means. Tools that count "
        f"them as 0, as that of the ADE20K benchmark does, give a mIoU of {over_all:.4f}."
    ]


def table(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores to show, by name, as fractions of 1."""
    if "mIoU" in scores:
        return {name: scores[name] for name in ("mIoU", "mAcc", "aAcc", "image_mIoU", "boundary_mIoU")}
    words = [word for word in KIND_OF_IOU_TYPE if word in scores]
    return {f"{word} {name}": value for word in words for name, value in scores[word].items()}


def class_columns(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """The scores of a class that fit a terminal."""
    if "mIoU" in scores:
        return SemanticTask.class_columns
    kinds = [kind for word, kind in KIND_OF_IOU_TYPE.items() if word in scores]
    return tuple(f"{kind}_{name}" for kind in kinds for name in ("AP", "AP50"))
