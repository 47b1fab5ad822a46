"""All that is known of a detector's results: COCO's numbers, kinds of errors, and why a score is 0, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.coco_matching import KINDS, Detections, best_of_each_class
from swin_dense.datasets.coco_objects import ImageObjects
from swin_dense.datasets.detection_errors import DetectionErrors
from swin_dense.datasets.instance_facts import InstanceFacts, corner_and_size
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.score_explanations import explain_instance_scores


class InstanceScores:
    """Collects the detections of every image; processes collect apart and merge.

    Args:
        ground_truth: As `CocoEvaluator` takes it.
        label_map: Likewise.
        kinds: What COCO's numbers are wanted of.
        keep_results: Whether `coco.write_results` is wanted.

    Attributes:
        coco: COCO's numbers.
        errors: Kinds of errors, by masks where there are any.
        facts: What explanations need.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        label_map: LabelMap,
        *,
        kinds: Sequence[str] = ("box", "mask"),
        keep_results: bool = False,
    ) -> None:
        self.coco = CocoEvaluator(ground_truth, label_map, kinds=kinds, keep_results=keep_results)
        self.errors = DetectionErrors(label_map)
        self.facts = InstanceFacts(label_map)

    def add(self, image_id: int, detections: Detections) -> None:
        """Take the detections of one image, as `CocoEvaluator.detections` checks them.

        Raises:
            DataError: As `CocoEvaluator.add`.
        """
        objects = self.coco.objects(image_id)
        self.coco.add_detections(detections, image_id)
        rows, _ = best_of_each_class(detections.labels, detections.scores)
        scored = detections[rows]
        self.errors.add(
            image_id, _ious(scored, objects), scored.scores, scored.labels, objects.labels, objects.is_crowd
        )
        self.facts.add(
            corner_and_size(scored.boxes_xywh),
            scored.scores,
            scored.labels,
            corner_and_size(objects.boxes_xywh),
            objects.labels,
            objects.is_crowd,
            objects.size_hw,
        )

    def merge(self, other: InstanceScores) -> None:
        """Take what another process has collected of the same ground truth."""
        self.coco.merge(other.coco)
        self.errors.merge(other.errors)
        self.facts.merge(other.facts)

    def worst_images(self, count: int) -> list[tuple[int, int]]:
        """The images with the most errors at the best threshold of all classes: (image id, number of errors).

        Args:
            count: At most so many; images without errors are not among them.
        """
        return self.errors.worst_images(count, self.errors.precision_recall().best()["score_threshold"])

    def compute(self) -> dict[str, Any]:
        """Scores of everything that was added.

        Returns:
            What `CocoEvaluator.compute` gives, and
            ```
            {"errors": as `DetectionErrors.compute` gives them
             "explanations": [sentences, empty where there is nothing to explain]}
            ```

        Raises:
            DataError: Images of the ground truth were not added.
        """
        scores = self.coco.compute()
        kind = "mask" if "mask" in scores and self.coco.with_masks else next(kind for kind in scores if kind in KINDS)
        per_class = {name: values[f"{kind}_AP"] for name, values in scores["per_class"].items()}
        explanations = explain_instance_scores(scores[kind], self.facts, per_class, kind)
        return {**scores, "errors": self.errors.compute(), "explanations": explanations}


def _ious(detections: Detections, objects: ImageObjects) -> np.ndarray:
    if not len(detections.labels) or not len(objects):
        return np.zeros((len(detections.labels), len(objects)))
    kind = KINDS["box" if detections.masks is None else "mask"]
    return kind.ious(detections, objects, np.arange(len(objects)))
