import contextlib
import io

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.coco_accumulation import (
    METRIC_NAMES,
    RECALL_THRESHOLDS,
    ImageMatches,
    accumulate,
    pack_marks,
    precision_and_recall,
    summarize,
)
from swin_dense.datasets.coco_matching import AREA_RANGES, IOU_THRESHOLDS, MAX_DETECTIONS, best_of_each_class

AREAS = [list(bounds) for bounds in AREA_RANGES.values()]


class RandomMarks:
    """Marks of a few images, with equal scores among them, as the evaluator keeps them and as pycocotools does."""

    def __init__(self, seed, num_images=5, num_classes=3):
        random = np.random.default_rng(seed)
        self.num_images, self.num_classes = num_images, num_classes
        self.images, self.tables = [], []
        for _ in range(num_images):
            count = int(random.choice([0, 1, 23, 211]))
            labels, scores = random.integers(0, num_classes, count), random.integers(0, 9, count) / 8
            rows, ranks = best_of_each_class(labels, scores)
            shape = (len(AREA_RANGES), len(IOU_THRESHOLDS), len(rows))
            is_matched, is_neutral = random.random(shape) < 0.4, random.random(shape) < 0.2
            marks = {"box": pack_marks(is_matched, is_neutral)}
            self.images.append(ImageMatches(labels[rows], scores[rows], ranks, marks, count))
            self.tables.append((is_matched, is_neutral))
        self.num_objects = random.integers(0, 40, (len(AREA_RANGES), num_classes))
        self.num_objects[:, -1] = 0

    def pycocotools(self):
        evaluation = COCOeval(iouType="bbox")
        evaluation.params.imgIds, evaluation.params.catIds = list(range(self.num_images)), list(range(self.num_classes))
        evaluation._paramsEval = evaluation.params
        evaluation.evalImgs = [
            self._image(label, area, number)
            for label in range(self.num_classes)
            for area in range(len(AREAS))
            for number in range(self.num_images)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _image(self, label, area, number):
        own = self.images[number].labels == label
        is_matched, is_neutral = (table[area][:, own] for table in self.tables[number])
        return {
            "dtScores": self.images[number].scores[own],
            "dtMatches": is_matched,
            "dtIgnore": is_neutral,
            # All objects in the first image: only their number counts.
            "gtIgnore": np.zeros(self.num_objects[area, label] if number == 0 else 0),
        }


@pytest.mark.parametrize("seed", range(10))
def test_curves_and_numbers_equal_pycocotools_to_the_last_bit(seed):
    marks = RandomMarks(seed)
    accumulated, expected = accumulate(marks.images, "box", marks.num_objects), marks.pycocotools()
    assert np.array_equal(accumulated.precision, expected.eval["precision"])
    assert np.array_equal(accumulated.recall, expected.eval["recall"])
    assert np.array_equal(accumulated.scores, expected.eval["scores"])
    numbers = summarize(accumulated, range(marks.num_classes))
    assert tuple(numbers) == METRIC_NAMES
    assert [-1 if number is None else number for number in numbers.values()] == expected.stats.tolist()


def test_recalls_are_those_of_pycocotools():
    assert np.array_equal(RECALL_THRESHOLDS, COCOeval(iouType="bbox").params.recThrs)


def test_classes_without_objects_have_no_number():
    marks = RandomMarks(3)
    accumulated = accumulate(marks.images, "box", marks.num_objects)
    assert set(summarize(accumulated, [marks.num_classes - 1]).values()) == {None}
    assert None not in summarize(accumulated, [0]).values()


def test_curve_of_a_small_example_by_hand():
    is_matched = np.array([[True, False, True, False, True]])
    is_neutral = np.array([[False, False, False, True, False]])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    precision, recall, reached = precision_and_recall(is_matched, is_neutral, scores, num_objects=4)
    assert recall.tolist() == [0.75]
    assert precision[0, :76] == pytest.approx([1.0] * 26 + [0.75] * 50) and not precision[0, 76:].any()
    assert reached[0, [0, 25, 26, 50, 51, 75, 76]].tolist() == [0.9, 0.9, 0.7, 0.7, 0.5, 0.5, 0.0]


def test_no_detection_reaches_nothing():
    nothing = np.zeros((10, 0), bool)
    for array in precision_and_recall(nothing, nothing, np.zeros(0), num_objects=3):
        assert array.shape[0] == 10 and not array.any()


def test_marks_take_ten_bytes_a_detection():
    is_matched = np.zeros((len(AREA_RANGES), len(IOU_THRESHOLDS), 7), bool)
    assert pack_marks(is_matched, ~is_matched).nbytes == 10 * 7
    assert pack_marks(is_matched[..., :0], is_matched[..., :0]).shape == (2, 5, 0)
    assert MAX_DETECTIONS == (1, 10, 100)
