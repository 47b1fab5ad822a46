"""What kinds of errors a detector makes, for which classes, and at which score threshold it does best.

Kinds of errors: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", 2020,
https://arxiv.org/abs/2008.08115
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

FOREGROUND_IOU = 0.5
"""From this overlap on a detection belongs to an object (TIDE, section 2.2)."""

BACKGROUND_IOU = 0.1
"""Below this overlap with every object it lies on background (TIDE, section 2.2)."""

ERROR_KINDS = ("position", "class", "duplicate", "background", "class_and_position", "missed")
"""What can be wrong with a detection, and last, with an object."""

_POSITION, _CLASS, _DUPLICATE, _BACKGROUND, _CLASS_AND_POSITION, _CORRECT, _IGNORED = range(7)
_FALSE_KINDS = ERROR_KINDS[:_CORRECT]

_DETECTION = np.dtype([("score", np.float64), ("label", np.int32), ("kind", np.int8), ("object", np.int32)])
_OBJECT = np.dtype([("label", np.int32), ("found_at", np.float64), ("touched_at", np.float64)])


@dataclass(frozen=True)
class PrecisionRecall:
    """What every score threshold gives, the highest first.

    Attributes:
        thresholds: (T,) the scores that occur, descending; detections from one on count.
        correct: (T,) how many of these detections are correct.
        detections: (T,) how many there are.
        num_objects: how many there are to find.
    """

    thresholds: np.ndarray
    correct: np.ndarray
    detections: np.ndarray
    num_objects: int

    @property
    def precision(self) -> np.ndarray:
        """(T,) correct of the detections that count."""
        return self.correct / self.detections

    @property
    def recall(self) -> np.ndarray:
        """(T,) correct of the objects; NaN without any."""
        return self.correct / (self.num_objects or np.nan)

    def best(self) -> dict[str, float | None]:
        """The highest threshold with the best F1.

        Returns:
            {"score_threshold", "precision", "recall", "F1"}. All None without objects. Where no detection is correct,
            recall and F1 are 0, and there is neither threshold nor precision.
        """
        if not self.num_objects:
            return dict.fromkeys(("score_threshold", "precision", "recall", "F1"))
        if not self.correct.any():
            return {"score_threshold": None, "precision": None, "recall": 0.0, "F1": 0.0}
        f1 = 2 * self.correct / (self.detections + self.num_objects)
        row = int(f1.argmax())
        return {
            "score_threshold": float(self.thresholds[row]),
            "precision": float(self.precision[row]),
            "recall": float(self.recall[row]),
            "F1": float(f1[row]),
        }


class DetectionErrors:
    """Sorts the detections and objects of every image into right ones and kinds of errors.

    Detections are matched as COCO does at IoU 0.5: within a class the higher score chooses first, the object with the
    largest overlap of those left; ignored regions excuse what finds no object. What is not matched is, in the order in
    which TIDE asks,

    - `position`: overlap from 0.1 to below 0.5 with an object of its class, and no more with any of that class;
    - `class`: overlap of at least 0.5 with an object of another class;
    - `duplicate`: overlap of at least 0.5 with an object of its class that a higher score has;
    - `background`: overlap below 0.1 with every object;
    - `class_and_position`: overlap from 0.1 to below 0.5 with an object of another class.

    An object is `missed` where no detection is matched to it and none is a position or class error because of it.

    Nothing of this but `missed` depends on a score threshold, so images are matched once, when they are added, and only
    a few numbers per detection and object are kept. Boxes and masks are treated alike: only their overlaps count.

    Args:
        label_map: The classes, by index.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self.label_map = label_map
        self._images: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(
        self,
        image_id: int,
        ious: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        object_labels: np.ndarray,
        ignored: np.ndarray,
    ) -> None:
        """Takes one image; one without detections or objects too.

        Args:
            image_id: Any number that no other image has.
            ious: (D, G) overlap of each detection with each object, whatever their classes. For an ignored region: how
                much of the detection lies in it, as pycocotools gives for crowds.
            scores: (D,) higher is surer.
            labels: (D,) class indices.
            object_labels: (G,) class indices.
            ignored: (G,) bool, whether it is an ignored region.

        Raises:
            DataError: The image was added before, lengths differ, a score or overlap is not finite, or a class index
                is out of range.
        """
        ious, scores, labels = np.asarray(ious), np.asarray(scores), np.asarray(labels)
        object_labels, ignored = np.asarray(object_labels), np.asarray(ignored, bool)
        self._check(image_id, ious, scores, labels, object_labels, ignored)
        detections, objects = np.zeros(len(scores), _DETECTION), np.zeros(len(ignored), _OBJECT)
        detections["score"], detections["label"], objects["label"] = scores, labels, object_labels
        same_class = labels[:, None] == object_labels
        matches = _match(ious, scores, same_class & ~ignored)
        detections["kind"], detections["object"] = _kinds(ious, same_class, ignored, matches)
        objects["found_at"] = _highest_scores(detections, len(objects), (_CORRECT,))
        objects["touched_at"] = _highest_scores(detections, len(objects), (_POSITION, _CLASS))
        # Numbers of objects have to lead to those that are kept.
        detections["object"] = np.append(np.cumsum(~ignored) - 1, -1)[detections["object"]]
        self._images[image_id] = detections, objects[~ignored]

    def merge(self, other: DetectionErrors) -> None:
        """Takes over what another one over the same classes collected, as that of another process.

        Raises:
            DataError: The classes differ, or both hold the same image.
        """
        if self.label_map.names != other.label_map.names:
            raise DataError(f"The classes differ: {self.label_map.names} and {other.label_map.names}.")
        both = sorted(self._images.keys() & other._images.keys())
        if both:
            raise DataError(f"{len(both)} images were added twice, image {both[0]} among them. Add every image once.")
        self._images.update(other._images)

    def precision_recall(self, label: int | None = None) -> PrecisionRecall:
        """The curve of one class, or without a class that of all detections and objects together.

        Args:
            label: class index.
        """
        detections, objects = self._all()
        if label is not None:
            detections, objects = detections[detections["label"] == label], objects[objects["label"] == label]
        return _curve(detections, len(objects))

    def best_thresholds(self) -> dict[str, dict[str, float | None]]:
        """{name: {"score_threshold", "precision", "recall", "F1"}}: of each class `PrecisionRecall.best`."""
        detections, objects = self._all()
        num_classes = len(self.label_map)
        num_objects = np.bincount(objects["label"], minlength=num_classes).tolist()
        detections = detections[np.argsort(detections["label"], kind="stable")]
        borders = np.searchsorted(detections["label"], np.arange(num_classes + 1))
        return {
            name: _curve(detections[borders[index] : borders[index + 1]], count).best()
            for index, (name, count) in enumerate(zip(self.label_map.names, num_objects, strict=True))
        }

    def counts(self, score_threshold: float | None = None) -> dict[str, dict[str, int]]:
        """Right detections and errors of each class at a score threshold.

        Args:
            score_threshold: Detections from this score on count; None: all do.

        Returns:
            ```
            {name: {"objects", "detections", "correct",
                    "position", "class", "duplicate", "background", "class_and_position", "missed"}}
            ```
            Detections, those in ignored regions left out, are the sum of correct ones and of all errors but missed.
            An object counts under its own class, a detection under the class that was predicted.
        """
        detections, objects = self._counted(score_threshold)
        num_classes = len(self.label_map)
        table = np.zeros((_IGNORED, num_classes), np.int64)
        np.add.at(table, (detections["kind"], detections["label"]), 1)
        rows = {
            "objects": np.bincount(objects["label"], minlength=num_classes),
            "detections": table.sum(axis=0),
            "correct": table[_CORRECT],
            **dict(zip(_FALSE_KINDS, table[:_CORRECT], strict=True)),
            "missed": np.bincount(objects["label"][_missed(objects, score_threshold)], minlength=num_classes),
        }
        columns = zip(*(values.tolist() for values in rows.values()), strict=True)
        names = self.label_map.names
        return {name: dict(zip(rows, values, strict=True)) for name, values in zip(names, columns, strict=True)}

    def confusion(self, score_threshold: float | None = None) -> np.ndarray:
        """Which class was taken for which, and for background, at one score threshold for all classes.

        One threshold, as a detector has one; with one for each class, rows would compare what no detector puts out.

        Every object counts once in the row of its class: in the column of its class where it is found; else in that of
        the surest class error that lies on it; else in that of the background. Every detection counts once in the
        column of its class: in the row of the object that counts with it, else in that of the background.

        Args:
            score_threshold: Detections from this score on count; None: all do.

        Returns:
            (K + 1, K + 1) int64; row = class of the object, column = class of the detection, last = background. Rows
            add up to the objects of a class, columns to its detections that no ignored region excuses.
        """
        detections, objects = self._counted(score_threshold)
        background = len(self.label_map)
        taken_for = np.full(len(objects), background)
        standing_for = np.full(len(detections), background)
        # The surest of each object comes last and stays; a correct one after all others.
        candidates = np.flatnonzero(np.isin(detections["kind"], (_CORRECT, _CLASS)))
        kind, score = detections["kind"][candidates], detections["score"][candidates]
        candidates = candidates[np.lexsort((-candidates, score, kind == _CORRECT))]
        chosen = np.full(len(objects), -1)
        chosen[detections["object"][candidates]] = candidates
        there = chosen >= 0
        taken_for[there] = detections["label"][chosen[there]]
        standing_for[chosen[there]] = objects["label"][there]
        matrix = np.zeros((background + 1, background + 1), np.int64)
        np.add.at(matrix, (objects["label"], taken_for), 1)
        matrix[background] = np.bincount(detections["label"][standing_for == background], minlength=background + 1)
        return matrix

    def worst_images(self, count: int, score_threshold: float | None = None) -> list[tuple[int, int]]:
        """The images with the most errors, the worst first, of equal ones the lower id.

        Args:
            count: At most so many; images without errors are not among them.
            score_threshold: Detections from this score on count; None: all do.

        Returns:
            (image id, number of errors of all kinds) of each.
        """
        errors = {image_id: _num_errors(*image, score_threshold) for image_id, image in self._images.items()}
        worst = sorted(errors.items(), key=lambda image: (-image[1], image[0]))
        return [(image_id, number) for image_id, number in worst[:count] if number]

    def compute(self) -> dict[str, Any]:
        """All of it at the best threshold of all classes together; at none where no detection is correct.

        Returns:
            ```
            {"best": {"score_threshold", "precision", "recall", "F1"} of all detections and objects together
             "best_of_class": {name: the same of its own}
             "errors": {"position", "class", "duplicate", "background", "class_and_position", "missed"} of all classes
             "per_class": {name: {"objects", "detections", "correct" and the errors}}
             "confusion": rows of `confusion`}
            ```
        """
        best = self.precision_recall().best()
        counts = self.counts(best["score_threshold"])
        return {
            "best": best,
            "best_of_class": self.best_thresholds(),
            "errors": {kind: sum(of_class[kind] for of_class in counts.values()) for kind in ERROR_KINDS},
            "per_class": counts,
            "confusion": self.confusion(best["score_threshold"]).tolist(),
        }

    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """Detections and objects of all images, by image id; a detection's object is its row among all of them."""
        images = [self._images[image_id] for image_id in sorted(self._images)]
        detections = np.concatenate([np.zeros(0, _DETECTION), *(each for each, _ in images)])
        objects = np.concatenate([np.zeros(0, _OBJECT), *(each for _, each in images)])
        starts = np.cumsum([0, *(len(each) for _, each in images)])[:-1]
        shifts = np.repeat(starts, [len(each) for each, _ in images])
        detections["object"] = np.where(detections["object"] < 0, -1, detections["object"] + shifts)
        return detections, objects

    def _counted(self, score_threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
        """The same without detections below a threshold or in ignored regions."""
        detections, objects = self._all()
        counts = (detections["kind"] != _IGNORED) & (detections["score"] >= _least(score_threshold))
        return detections[counts], objects

    def _check(
        self,
        image_id: int,
        ious: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        object_labels: np.ndarray,
        ignored: np.ndarray,
    ) -> None:
        where = f"Detections of image {image_id}"
        if image_id in self._images:
            raise DataError(f"{where} were added twice. Add every image once.")
        if (
            scores.ndim != 1
            or labels.shape != scores.shape
            or ignored.shape != object_labels.shape
            or ious.shape != (*scores.shape, *ignored.shape)
        ):
            raise DataError(
                f"{where}: wanted ious (D, G), scores and labels (D,), object labels and ignored (G,), "
                f"got {ious.shape}, {scores.shape}, {labels.shape}, {object_labels.shape} and {ignored.shape}."
            )
        if not (np.isfinite(scores).all() and np.isfinite(ious).all()):
            raise DataError(f"{where}: a score or an overlap is not finite. The model has diverged.")
        for name, values in (("labels", labels), ("object labels", object_labels)):
            if values.size and not np.issubdtype(values.dtype, np.integer):
                raise DataError(f"{where}: {name} must be integers, got {values.dtype}.")
            if values.size and not 0 <= values.min() <= values.max() < len(self.label_map):
                raise DataError(
                    f"{where}: {name} reach from {values.min()} to {values.max()}, "
                    f"wanted 0 to {len(self.label_map) - 1}."
                )


def _match(ious: np.ndarray, scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """COCO's matching: (D,) the object of each detection, -1 for none."""
    matches = np.full(len(scores), -1)
    fits = allowed & (ious >= FOREGROUND_IOU)
    free = np.ones(ious.shape[1], bool)
    order = np.argsort(-scores, kind="stable")
    for row in order[fits[order].any(axis=1)]:
        objects = np.flatnonzero(fits[row] & free)
        if len(objects):
            # Of equal overlaps the last one, as pycocotools takes.
            matches[row] = objects[len(objects) - 1 - ious[row, objects][::-1].argmax()]
            free[matches[row]] = False
    return matches


def _kinds(
    ious: np.ndarray, same_class: np.ndarray, ignored: np.ndarray, matches: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(D,) what each detection is, and (D,) the object because of which it is that, -1 for none."""
    # A column that overlaps with nothing, for images without objects.
    own, other = (
        np.pad(np.where(each, ious, -1), ((0, 0), (0, 1)), constant_values=-1)
        for each in (same_class & ~ignored, ~same_class & ~ignored)
    )
    best_own, best_other = own.max(axis=1), other.max(axis=1)
    excused = (same_class & ignored & (ious >= FOREGROUND_IOU)).any(axis=1)
    kinds = np.select(
        [
            matches >= 0,
            excused,
            (best_own >= BACKGROUND_IOU) & (best_own < FOREGROUND_IOU),
            best_other >= FOREGROUND_IOU,
            best_own >= FOREGROUND_IOU,
            best_other < BACKGROUND_IOU,
        ],
        [_CORRECT, _IGNORED, _POSITION, _CLASS, _DUPLICATE, _BACKGROUND],
        default=_CLASS_AND_POSITION,
    )
    objects = np.select(
        [kinds == _CORRECT, kinds == _POSITION, kinds == _CLASS],
        [matches, own.argmax(axis=1), other.argmax(axis=1)],
        default=-1,
    )
    return kinds, objects


def _highest_scores(detections: np.ndarray, num_objects: int, kinds: tuple[int, ...]) -> np.ndarray:
    """(G,) the highest score of the detections of some kinds that each object has; -inf without any."""
    highest = np.full(num_objects, -np.inf)
    chosen = detections[np.isin(detections["kind"], kinds)]
    np.maximum.at(highest, chosen["object"], chosen["score"])
    return highest


def _least(score_threshold: float | None) -> float:
    """A threshold that all scores reach for None; -inf, the score of what there is not, does not reach it."""
    return float(np.finfo(np.float64).min) if score_threshold is None else score_threshold


def _num_errors(detections: np.ndarray, objects: np.ndarray, score_threshold: float | None) -> int:
    false = (detections["kind"] < _CORRECT) & (detections["score"] >= _least(score_threshold))
    return int(false.sum() + _missed(objects, score_threshold).sum())


def _missed(objects: np.ndarray, score_threshold: float | None) -> np.ndarray:
    """(G,) bool, whether no detection from a score on found an object or is an error because of it."""
    return np.maximum(objects["found_at"], objects["touched_at"]) < _least(score_threshold)


def _curve(detections: np.ndarray, num_objects: int) -> PrecisionRecall:
    counted = detections[detections["kind"] != _IGNORED]
    counted = counted[np.argsort(-counted["score"], kind="stable")]
    # Detections of equal scores come in together.
    last = np.flatnonzero(np.diff(counted["score"], append=-np.inf))
    correct = np.cumsum(counted["kind"] == _CORRECT)
    return PrecisionRecall(counted["score"][last], correct[last], last + 1, num_objects)
