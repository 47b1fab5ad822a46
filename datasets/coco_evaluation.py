"""Box and mask average precision as COCO counts it: pycocotools underneath, with the guards that it lacks.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, https://arxiv.org/abs/1405.0312
"""

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.segmentations import parse_run_lengths
from swin_dense.errors import AnnotationError, DataError

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In the order in which pycocotools summarises them."""

_ANNOTATION_KEYS = ("image_id", "category_id", "bbox", "area", "segmentation")
_NUM_SHOWN = 10


class CocoEvaluator:
    """Collects the detections of every image of a data set, and scores them.

    Example:
        ```
        evaluator = CocoEvaluator(dataset.ground_truth, dataset.label_map)
        for image_id, detections in ...:
            evaluator.add(image_id, detections.boxes_xyxy, detections.scores, detections.labels, detections.masks_rle)
        evaluator.compute()["mask"]["AP50"]
        ```

    Args:
        ground_truth: COCO annotations that passed the checks of the data set. The evaluator works on a copy with
            annotation ids from 1, because pycocotools takes the id 0 for "no match".
        label_map: Turns class indices into category ids; must hold just the categories of `ground_truth`.

    Raises:
        DataError: Label map and categories differ, or an annotation has neither area, segmentation nor box.
    """

    def __init__(self, ground_truth: Mapping[str, Any], label_map: LabelMap) -> None:
        categories = sorted(category["id"] for category in ground_truth["categories"])
        if categories != sorted(label_map.raw_ids):
            raise DataError(
                f"The ground truth has the category ids {categories}, the label map {sorted(label_map.raw_ids)}. "
                "Evaluate with the label map of the data set that the model was trained on."
            )
        self.label_map = label_map
        self._sizes_hw = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
        self._ground_truth = _private_copy(ground_truth, self._sizes_hw)
        self._results: dict[int, list[dict[str, Any]]] = {}
        self._with_masks: bool | None = None

    @property
    def num_detections(self) -> int:
        """How many detections were added; with none of them every AP is 0."""
        return sum(len(results) for results in self._results.values())

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
                finite, a label is out of range, or a mask has another size than its image.
        """
        if image_id not in self._sizes_hw:
            raise DataError(f"Image id {image_id} is not in the ground truth, which has {len(self._sizes_hw)} images.")
        if image_id in self._results:
            raise DataError(f"The detections of image {image_id} were added twice. Add every image once.")
        boxes, numbers, indices = np.asarray(boxes_xyxy), np.asarray(scores), np.asarray(labels)
        self._check_detections(image_id, boxes, numbers, indices)
        rles = None if masks_rle is None else self._checked_rles(image_id, masks_rle, len(boxes))
        if self._with_masks not in (None, rles is not None):
            now, before = ("without", "with") if rles is None else ("with", "without")
            raise DataError(f"Image {image_id} comes {now} masks, the images before it {before}. Add all alike.")
        self._with_masks = rles is not None
        self._results[image_id] = [
            {
                "image_id": image_id,
                "category_id": self.label_map.raw_ids[int(indices[row])],
                "bbox": _to_xywh(boxes[row]),
                "score": float(numbers[row]),
                **({} if rles is None else {"segmentation": rles[row]}),
            }
            for row in range(len(boxes))
        ]

    def merge(self, other: "CocoEvaluator") -> None:
        """Takes over what another evaluator of the same ground truth collected, as that of another process.

        Raises:
            DataError: Both hold the same image, or only one holds masks.
        """
        both = sorted(self._results.keys() & other._results.keys())
        if both:
            raise DataError(f"Both evaluators hold detections of {_listing(both)}. Add every image once.")
        if None not in (self._with_masks, other._with_masks) and self._with_masks != other._with_masks:
            raise DataError("Only one of the two evaluators holds masks; add them everywhere or nowhere.")
        self._results.update(other._results)
        self._with_masks = other._with_masks if self._with_masks is None else self._with_masks

    def results(self) -> list[dict[str, Any]]:
        """The detections as COCO results: raw category ids, boxes as x, y, width, height, RLE counts as str.

        To score the masks with pycocotools itself, drop "bbox" first: it would sort them into sizes by their boxes.
        """
        return copy.deepcopy(self._ordered_results())

    def compute(self) -> dict[str, dict[str, Any]]:
        """Scores everything that was added.

        Returns:
            ```
            {"box": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"},
             "mask": the same,
             "per_class": {name: {"box_AP", "mask_AP"}}}
            ```
            Fractions of 1; None where there is nothing to measure: no object of that size or class, or no masks.

        Raises:
            DataError: Images of the ground truth were not added, or the detections have masks and an object has none.
        """
        missing = sorted(self._sizes_hw.keys() - self._results.keys())
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self._sizes_hw)} images have no detections: {_listing(missing)}. "
                "Add every image, those where nothing was found with empty arrays."
            )
        box, box_per_class = self._evaluate("bbox", dropped="segmentation")
        if self._with_masks and self._require_segmentations():
            # The box is dropped so that a detection's size class follows from its mask, as in the COCO server.
            mask, mask_per_class = self._evaluate("segm", dropped="bbox")
        else:
            mask, mask_per_class = dict.fromkeys(METRIC_NAMES), [None] * len(self.label_map)
        per_class = {
            name: {"box_AP": box_ap, "mask_AP": mask_ap}
            for name, box_ap, mask_ap in zip(self.label_map.names, box_per_class, mask_per_class, strict=True)
        }
        return {"box": box, "mask": mask, "per_class": per_class}

    def _check_detections(self, image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
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
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.label_map):
            raise DataError(
                f"{where}: labels reach from {labels.min()} to {labels.max()}, wanted 0 to {len(self.label_map) - 1}."
            )

    def _checked_rles(self, image_id: int, rles: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
        if len(rles) != count:
            raise DataError(f"Detections of image {image_id}: {count} boxes but {len(rles)} masks.")
        checked = []
        for row, rle in enumerate(rles):
            try:
                # pycocotools never ends, or crashes the process, on counts that do not fill the picture.
                parse_run_lengths(dict(rle), self._sizes_hw[image_id])
            except AnnotationError as error:
                raise DataError(f"Detections of image {image_id}, mask {row}: {error}.") from error
            checked.append({"size": list(self._sizes_hw[image_id]), "counts": _text_counts(rle)})
        return checked

    def _require_segmentations(self) -> bool:
        for annotation in self._ground_truth["annotations"]:
            if not annotation.get("segmentation"):
                raise DataError(
                    f"An object of image {annotation['image_id']} has no segmentation, so masks cannot be scored. "
                    "Add the detections with masks_rle=None."
                )
        return True

    def _ordered_results(self) -> list[dict[str, Any]]:
        return [result for image_id in sorted(self._results) for result in self._results[image_id]]

    def _evaluate(self, kind: str, dropped: str) -> tuple[dict[str, float | None], list[float | None]]:
        from pycocotools.cocoeval import COCOeval

        detections = [{key: value for key, value in each.items() if key != dropped} for each in self._ordered_results()]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = _indexed(self._ground_truth)
            # loadRes cannot take an empty list.
            found = truth.loadRes(detections) if detections else _indexed({**self._ground_truth, "annotations": []})
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # (IoU thresholds, recalls, classes, sizes, detections per image): all sizes, 100 detections.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        rows = {int(raw_id): row for row, raw_id in enumerate(evaluation.params.catIds)}
        per_class = [_mean_of_defined(precision[:, :, rows[raw_id]]) for raw_id in self.label_map.raw_ids]
        stats = {
            name: None if value < 0 else float(value)
            for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True)
        }
        return stats, per_class


def _private_copy(ground_truth: Mapping[str, Any], sizes_hw: Mapping[int, tuple[int, int]]) -> dict[str, Any]:
    """Takes what the evaluation needs, numbers the annotations from 1, and adds what they may lack."""
    annotations = []
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        kept = {key: annotation[key] for key in _ANNOTATION_KEYS if key in annotation}
        is_ignored = annotation.get("iscrowd", 0) or annotation.get("ignore", 0)  # pycocotools knows iscrowd only
        kept.update(id=number, iscrowd=int(is_ignored))
        kept.update(_missing_extent(kept, sizes_hw[kept["image_id"]]))
        annotations.append(kept)
    return {
        "images": [
            {"id": image_id, "height": height, "width": width} for image_id, (height, width) in sizes_hw.items()
        ],
        "categories": [{"id": category["id"]} for category in ground_truth["categories"]],
        "annotations": annotations,
    }


def _missing_extent(annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    from pycocotools import mask as coco_mask

    wanted = [key for key in ("area", "bbox") if annotation.get(key) is None]
    if not wanted:
        return
    if annotation.get("segmentation"):
        rle = annotation["segmentation"]
        if isinstance(rle, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, *size_hw))
        elif isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *size_hw)
        extent = {"area": float(coco_mask.area(rle)), "bbox": [float(value) for value in coco_mask.toBbox(rle)]}
    elif annotation.get("bbox") is not None:
        extent = {"area": float(annotation["bbox"][2] * annotation["bbox"][3])}
    else:
        raise DataError(f"An object of image {annotation['image_id']} has neither a segmentation nor a box.")
    yield from ((key, extent[key]) for key in wanted)


def _indexed(content: Mapping[str, Any]) -> Any:  # noqa: ANN401
    from pycocotools.coco import COCO

    coco = COCO()
    # The evaluation puts other values under the keys of annotations; the next one must find the first ones.
    coco.dataset = {**content, "annotations": [dict(annotation) for annotation in content["annotations"]]}
    coco.createIndex()
    return coco


def _text_counts(rle: Mapping[str, Any]) -> str:
    from pycocotools import mask as coco_mask

    counts = rle["counts"]
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects(dict(rle), *rle["size"])["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _to_xywh(box_xyxy: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(value) for value in box_xyxy)
    return [left, top, right - left, bottom - top]


def _mean_of_defined(values: np.ndarray) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _listing(image_ids: Sequence[int]) -> str:
    shown = ", ".join(str(image_id) for image_id in image_ids[:_NUM_SHOWN])
    return f"{shown} and {len(image_ids) - _NUM_SHOWN} more" if len(image_ids) > _NUM_SHOWN else shown
