"""Box, mask and boundary average precision as COCO counts it, image by image: nothing but marks is kept of a detection.

The numbers are those of pycocotools to the last digit, with the guards that it lacks. Lin et al., "Microsoft COCO:
Common Objects in Context", 2014, https://arxiv.org/abs/1405.0312

    add         detections of an image -> coco_matching: which are right, at 4 size ranges and 10 thresholds
    compute     marks of all images -> coco_accumulation: precision, recall, 12 numbers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.coco_accumulation import (
    METRIC_NAMES,
    Accumulated,
    ImageMatches,
    accumulate,
    pack_marks,
    summarize,
)
from swin_dense.datasets.coco_matching import KINDS, Detections, best_of_each_class, is_ignored, match_image
from swin_dense.datasets.coco_objects import ImageObjects, objects_by_image
from swin_dense.datasets.coco_results_spool import ResultsSpool
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.run_length_batches import compress_masks, measure_masks
from swin_dense.errors import AnnotationError, ConfigError, DataError

__all__ = ["METRIC_NAMES", "CocoEvaluator"]

_PER_CLASS_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_NUM_SHOWN = 10


class CocoEvaluator:
    """Scores the detections of every image of a data set, one image at a time.

    An image is matched as it is added; then its masks are forgotten, the detections' and the objects'. Run lengths are
    compared as they are: no mask is ever drawn, so that memory does not depend on the images' sizes.

    Example:
        ```
        evaluator = CocoEvaluator(dataset.ground_truth, dataset.label_map)
        for image_id, detections in ...:
            evaluator.add(image_id, detections.boxes_xyxy, detections.scores, detections.labels, detections.masks_rle)
        evaluator.compute()["mask"]["AP50"]
        ```

    Args:
        ground_truth: COCO annotations that passed the checks of the data set. Ids may start at 0; `area`, `iscrowd`
            and `bbox` may be missing; `"ignore": 1` makes a crowd region. It must not be changed before all images
            are added.
        label_map: Turns class indices into category ids; must hold just the categories of `ground_truth`.
        kinds: What to score, of "box", "mask" and "boundary" (Boundary IoU of the masks).
        keep_results: Keep the detections too, on disk, for `results` and `write_results`.

    Raises:
        ConfigError: There is no such kind.
        DataError: Label map and categories differ, there is no image, an annotation is of an unknown image, has numbers
            that are not finite, or has neither a segmentation nor a box.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        label_map: LabelMap,
        *,
        kinds: Sequence[str] = ("box", "mask"),
        keep_results: bool = True,
    ) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigError(f"kinds must be some of {', '.join(KINDS)}, got {list(kinds)}.")
        self.label_map = label_map
        self._kinds = tuple(kinds)
        self._objects = objects_by_image(ground_truth, label_map)
        self._num_objects = _count_objects(self._objects, len(label_map))
        self._num_images = len(self._objects)
        self._maskless_image = next((key for key, each in self._objects.items() if each.lacks_masks), None)
        self._matches: dict[int, ImageMatches] = {}
        self._with_masks: bool | None = None
        self._results = ResultsSpool() if keep_results else None

    @property
    def with_masks(self) -> bool:
        """Whether the detections that were added have masks."""
        return bool(self._with_masks)

    @property
    def num_detections(self) -> int:
        """How many detections were added; with none of them every AP is 0."""
        return sum(matches.num_detections for matches in self._matches.values())

    def add(
        self,
        image_id: int,
        boxes_xyxy: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks_rle: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """Takes the detections of one image; an image without any is added with empty arrays.

        Args:
            image_id: As in the ground truth.
            boxes_xyxy: (N, 4) in pixels of the original image.
            scores: (N,) any finite numbers, higher is surer.
            labels: (N,) class indices, 0-based.
            masks_rle: N RLEs {"size": [H, W], "counts": str, bytes or list}, as large as the original image.
                None for a detector without masks; then no mask metrics are computed.

        Raises:
            DataError: The image is not in the ground truth or was added before, lengths differ, a box or score is not
                finite, a label is out of range, a mask has another size than its image, or the detections have masks
                and an object has none.
        """
        self.add_detections(self.detections(image_id, boxes_xyxy, scores, labels, masks_rle), image_id)

    def objects(self, image_id: int) -> ImageObjects:
        """The objects of an image that was not added yet.

        Raises:
            DataError: The image is not in the ground truth or was added before.
        """
        if image_id in self._matches:
            raise DataError(f"The detections of image {image_id} were added twice. Add every image once.")
        if image_id not in self._objects:
            raise DataError(f"Image id {image_id} is not in the ground truth, which has {self._num_images} images.")
        return self._objects[image_id]

    def detections(
        self,
        image_id: int,
        boxes_xyxy: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks_rle: Sequence[Mapping[str, Any]] | None,
    ) -> Detections:
        """Checks the detections of an image; arguments and errors as in `add`, to which it belongs."""
        objects = self.objects(image_id)
        boxes, numbers, indices = np.asarray(boxes_xyxy), np.asarray(scores), np.asarray(labels)
        _check_detections(image_id, boxes, numbers, indices, len(self.label_map))
        return _detections(objects, boxes, numbers, indices, masks_rle)

    def add_detections(self, detections: Detections, image_id: int) -> None:
        """Takes checked detections of one image; errors as in `add`."""
        objects = self.objects(image_id)
        with_masks = detections.masks is not None
        self._check_masks(image_id, with_masks)
        rows, ranks = best_of_each_class(detections.labels, detections.scores)
        ranked = detections[rows]
        marks = {
            kind: pack_marks(*match_image(KINDS[kind], ranked, objects)) for kind in self._scored_kinds(with_masks)
        }
        self._matches[image_id] = ImageMatches(ranked.labels, ranked.scores, ranks, marks, len(detections.labels))
        self._with_masks = with_masks
        del self._objects[image_id]
        if self._results is not None:
            self._results.add(image_id, self._as_results(image_id, detections))

    def merge(self, other: CocoEvaluator) -> None:
        """Takes over what another evaluator of the same ground truth collected, as that of another process.

        Raises:
            DataError: Both hold the same image, or only one holds masks.
            ConfigError: Only the other one was built with `keep_results=False`.
        """
        both = sorted(self._matches.keys() & other._matches.keys())
        if both:
            raise DataError(f"Both evaluators hold detections of {_listing(both)}. Add every image once.")
        if None not in (self._with_masks, other._with_masks) and self._with_masks != other._with_masks:
            raise DataError("Only one of the two evaluators holds masks; add them everywhere or nowhere.")
        if self._results is not None:
            self._results.merge(other._kept_results())
        self._matches.update(other._matches)
        self._with_masks = other._with_masks if self._with_masks is None else self._with_masks
        for image_id in other._matches:
            del self._objects[image_id]

    def results(self) -> list[dict[str, Any]]:
        """The detections as COCO results: raw category ids, boxes as x, y, width, height, RLE counts as str.

        To score the masks with pycocotools itself, drop "bbox" first: it would sort them into sizes by their boxes.

        Raises:
            ConfigError: The evaluator was built with `keep_results=False`.
        """
        return list(self._kept_results())

    def write_results(self, path: Path) -> None:
        """Writes `results` to a JSON file, without holding them all in memory.

        Raises:
            ConfigError: The evaluator was built with `keep_results=False`.
        """
        self._kept_results().write(path)

    def accumulated(self, kind: str) -> Accumulated:
        """Precision and recall of every class, size range and threshold, as for precision-recall curves.

        Args:
            kind: One of the `kinds`.

        Raises:
            ConfigError: `kind` is not scored, or needs masks and there are none.
            DataError: Images of the ground truth were not added.
        """
        if kind not in self._kinds or (KINDS[kind].needs_masks and not self._with_masks):
            masks = "with" if self._with_masks else "without"
            raise ConfigError(
                f"{kind} is not scored: the kinds are {', '.join(self._kinds)}, images came {masks} masks."
            )
        self._require_all_images()
        return accumulate([self._matches[image_id] for image_id in sorted(self._matches)], kind, self._num_objects)

    def compute(self) -> dict[str, dict[str, Any]]:
        """Scores everything that was added.

        Returns:
            ```
            {"box": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"},
             "mask": the same,
             "per_class": {name: {"box_AP", "box_AP50", "box_AP75", "box_APs", "box_APm", "box_APl", "box_AR100",
                                  "mask_AP", …}}}
            ```
            for all `kinds`. Fractions of 1; None where there is nothing to measure: no object of that size or class, or
            no masks.

        Raises:
            DataError: Images of the ground truth were not added.
        """
        self._require_all_images()
        scores: dict[str, dict[str, Any]] = {}
        per_class: dict[str, dict[str, float | None]] = {name: {} for name in self.label_map.names}
        # The mean depends on the order in its last digit; pycocotools has that of the ids.
        by_raw_id = np.argsort(self.label_map.raw_ids).tolist()
        for kind in self._kinds:
            if KINDS[kind].needs_masks and not self._with_masks:
                own, of_classes = dict.fromkeys(METRIC_NAMES), [dict.fromkeys(METRIC_NAMES)] * len(self.label_map)
            else:
                accumulated = self.accumulated(kind)
                own = summarize(accumulated, by_raw_id)
                of_classes = [summarize(accumulated, [label]) for label in range(len(self.label_map))]
            scores[kind] = own
            for name, of_class in zip(self.label_map.names, of_classes, strict=True):
                per_class[name].update({f"{kind}_{metric}": of_class[metric] for metric in _PER_CLASS_NAMES})
        return {**scores, "per_class": per_class}

    def _check_masks(self, image_id: int, with_masks: bool) -> None:
        if self._with_masks not in (None, with_masks):
            now, before = ("with", "without") if with_masks else ("without", "with")
            raise DataError(f"Image {image_id} comes {now} masks, the images before it {before}. Add all alike.")
        if with_masks and self._maskless_image is not None and any(KINDS[kind].needs_masks for kind in self._kinds):
            raise DataError(
                f"An object of image {self._maskless_image} has no segmentation, so masks cannot be scored. "
                "Add the detections with masks_rle=None, or score the kind box only."
            )

    def _scored_kinds(self, with_masks: bool) -> list[str]:
        return [kind for kind in self._kinds if with_masks or not KINDS[kind].needs_masks]

    def _as_results(self, image_id: int, detections: Detections) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": self.label_map.raw_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(
                detections.labels.tolist(), detections.boxes_xywh.tolist(), detections.scores.tolist(), strict=True
            )
        ]
        for result, mask in zip(results, detections.masks or (), strict=detections.masks is not None):
            result["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
        return results

    def _kept_results(self) -> ResultsSpool:
        if self._results is None:
            raise ConfigError("The evaluator was built with keep_results=False, so it has no results to give.")
        return self._results

    def _require_all_images(self) -> None:
        if self._objects:
            missing = sorted(self._objects)
            raise DataError(
                f"{len(missing)} of {self._num_images} images have no detections: {_listing(missing)}. "
                "Add every image, those where nothing was found with empty arrays."
            )


def _count_objects(objects: Mapping[int, ImageObjects], num_classes: int) -> np.ndarray:
    """(A, K) objects that count, by size range and class."""
    labels = np.concatenate([each.labels for each in objects.values()])
    counts = ~np.concatenate([is_ignored(each) for each in objects.values()], axis=1)
    return np.stack([np.bincount(labels[row], minlength=num_classes) for row in counts])


def _detections(
    objects: ImageObjects,
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    masks_rle: Sequence[Mapping[str, Any]] | None,
) -> Detections:
    boxes_xywh = boxes_xyxy.astype(np.float64)
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    labels, scores = labels.astype(np.int32), scores.astype(np.float64)
    if masks_rle is None:
        return Detections(labels, scores, boxes_xywh)
    if len(masks_rle) != len(labels):
        raise DataError(f"Detections of image {objects.image_id}: {len(labels)} boxes but {len(masks_rle)} masks.")
    try:
        masks = compress_masks(masks_rle, objects.size_hw)
        areas = measure_masks(masks, objects.size_hw)
    except AnnotationError as error:
        raise DataError(f"Detections of image {objects.image_id}, {error}.") from error
    return Detections(labels, scores, boxes_xywh, masks, areas)


def _check_detections(
    image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, num_classes: int
) -> None:
    where = f"Detections of image {image_id}"
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.shape[:1] == scores.shape == labels.shape:
        raise DataError(
            f"{where}: wanted boxes (N, 4), scores (N,) and labels (N,), "
            f"got {boxes.shape}, {scores.shape} and {labels.shape}."
        )
    for name, values in (("box", boxes), ("score", scores)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row = bad[0, 0]
            # pycocotools would count a box of NaN as a perfect match.
            raise DataError(f"{where}: {name} {row} is not finite: {values[row]}. The model has diverged.")
    reversed_rows = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
    if len(reversed_rows):
        row = reversed_rows[0]
        raise DataError(f"{where}: box {row} is {boxes[row]}, wanted x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.")
    if len(labels) and not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels must be integers, got {labels.dtype}.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f"{where}: labels reach from {labels.min()} to {labels.max()}, wanted 0 to {num_classes - 1}.")


def _listing(image_ids: Sequence[int]) -> str:
    shown = ", ".join(str(image_id) for image_id in image_ids[:_NUM_SHOWN])
    return f"{shown} and {len(image_ids) - _NUM_SHOWN} more" if len(image_ids) > _NUM_SHOWN else shown
