import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.detection_errors import ERROR_KINDS, DetectionErrors
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

LABELS = LabelMap(names=("cat", "dog", "cow"), raw_ids=(3, 5, 8))
NOT_MISSED = ERROR_KINDS[:-1]


def overlaps(boxes_xywh, objects_xywh, ignored):
    if not len(boxes_xywh) or not len(objects_xywh):
        return np.zeros((len(boxes_xywh), len(objects_xywh)))
    return coco_mask.iou(np.array(boxes_xywh, float), np.array(objects_xywh, float), [int(flag) for flag in ignored])


def image_of(detections, objects):
    """Arguments of `add` from (box xywh, score, label) and (box xywh, label, ignored) of an image."""
    ignored = np.array([flag for *_, flag in objects], bool)
    return (
        overlaps([box for box, *_ in detections], [box for box, *_ in objects], ignored),
        np.array([score for _, score, _ in detections], float),
        np.array([label for *_, label in detections], int),
        np.array([label for _, label, _ in objects], int),
        ignored,
    )


def collected(*images):
    errors = DetectionErrors(LABELS)
    for image_id, image in enumerate(images):
        errors.add(image_id, *image)
    return errors


def random_image(seed, num_detections=17, num_objects=7, perfect=False):
    """Objects of all classes, some of them ignored, and boxes near them with few different scores."""
    random = np.random.default_rng(seed)
    corners, sizes = random.integers(0, 60, (num_objects, 2)), random.integers(8, 40, (num_objects, 2))
    objects = np.concatenate([corners, sizes], axis=1)
    labels, ignored = random.integers(0, 3, num_objects), random.random(num_objects) < 0.2
    if perfect:
        detections = [(box, 0.5, label) for box, label, flag in zip(objects, labels, ignored, strict=True) if not flag]
    else:
        origins = random.integers(0, num_objects, num_detections)
        boxes = objects[origins] + random.integers(-7, 8, (num_detections, 4))
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        guesses = np.where(random.random(num_detections) < 0.7, labels[origins], random.integers(0, 3, num_detections))
        scores = random.integers(1, 9, num_detections) / 8
        detections = list(zip(boxes, scores, guesses, strict=True))
    return detections, list(zip(objects, labels, ignored, strict=True))


def totals(errors, score_threshold=None):
    counts = errors.counts(score_threshold).values()
    return {kind: number for kind in ERROR_KINDS if (number := sum(each[kind] for each in counts))}


def test_perfect_detections_have_no_errors():
    errors = collected(*(image_of(*random_image(seed, perfect=True)) for seed in range(5)))
    result = errors.compute()
    assert result["best"] == {"score_threshold": 0.5, "precision": 1.0, "recall": 1.0, "F1": 1.0}
    assert set(result["errors"].values()) == {0} and errors.worst_images(9) == []
    for name in LABELS.names:
        counts = result["per_class"][name]
        assert counts["objects"] == counts["detections"] == counts["correct"] > 0
        assert result["best_of_class"][name] == result["best"]
    matrix = np.array(result["confusion"])
    assert np.array_equal(matrix, np.diag([counts["objects"] for counts in result["per_class"].values()] + [0]))


CAT = ([10, 10, 20, 20], 0, False)


@pytest.mark.parametrize(
    ("detections", "objects", "expected"),
    [
        ([], [CAT], {"missed": 1}),
        ([([10, 10, 20, 20], 0.9, 1)], [CAT], {"class": 1}),
        ([([10, 20, 20, 20], 0.9, 0)], [CAT], {"position": 1}),
        ([([10, 20, 20, 20], 0.9, 1)], [CAT], {"class_and_position": 1, "missed": 1}),
        ([([60, 60, 20, 20], 0.9, 0)], [CAT], {"background": 1, "missed": 1}),
        ([([10, 28, 20, 20], 0.9, 0)], [CAT], {"background": 1, "missed": 1}),  # IoU 0.05
        ([([10, 10, 20, 20], 0.9, 0), ([10, 11, 20, 20], 0.8, 0)], [CAT], {"duplicate": 1}),
        ([([10, 10, 20, 20], 0.9, 0), ([10, 11, 20, 20], 0.8, 1)], [CAT], {"class": 1}),
        ([([60, 60, 20, 20], 0.9, 0)], [], {"background": 1}),
        ([([62, 62, 9, 9], 0.9, 0)], [([60, 60, 20, 20], 0, True)], {}),
        ([([62, 62, 9, 9], 0.9, 1)], [([60, 60, 20, 20], 0, True)], {"background": 1}),  # of another class
        ([], [([60, 60, 20, 20], 0, True)], {}),
    ],
)
def test_planted_error_is_found_as_such(detections, objects, expected):
    errors = collected(image_of(detections, objects))
    assert totals(errors) == expected
    assert errors.worst_images(3) == ([(0, sum(expected.values()))] if expected else [])


def test_errors_count_under_the_predicted_class_and_missed_objects_under_their_own():
    errors = collected(image_of([([10, 20, 20, 20], 0.9, 1)], [CAT]))
    counts = errors.counts()
    assert counts["dog"]["class_and_position"] == 1 and counts["cat"]["missed"] == 1
    assert sum(counts["cow"].values()) == 0


def reference_kinds(ious, scores, labels, object_labels, ignored):
    """The kinds of one image, detection by detection as the paper and COCO describe them."""
    owner, kinds, reasons = {}, {}, {}
    for d in sorted(range(len(scores)), key=lambda d: -scores[d]):
        own = [g for g in range(len(ignored)) if object_labels[g] == labels[d]]
        regular = [g for g in own if not ignored[g]]
        others = [g for g in range(len(ignored)) if object_labels[g] != labels[d] and not ignored[g]]
        best_own = max((ious[d, g] for g in regular), default=0)
        best_other = max((ious[d, g] for g in others), default=0)
        free = [g for g in regular if g not in owner and ious[d, g] >= 0.5]
        if free:
            best = max(free, key=lambda g: (ious[d, g], g))
            owner[best], kinds[d] = d, "correct"
        elif any(ious[d, g] >= 0.5 for g in own if ignored[g]):
            kinds[d] = "ignored"
        elif 0.1 <= best_own < 0.5:
            kinds[d], reasons[d] = "position", max(regular, key=lambda g: (ious[d, g], -g))
        elif best_other >= 0.5:
            kinds[d], reasons[d] = "class", max(others, key=lambda g: (ious[d, g], -g))
        elif best_own >= 0.5:
            kinds[d] = "duplicate"
        else:
            kinds[d] = "background" if best_other < 0.1 else "class_and_position"
    return owner, kinds, reasons


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 17), st.integers(1, 7), st.sampled_from([None, 0.3, 0.5, 1.0, 2.0]))
def test_counts_equal_the_definitions(seed, num_detections, num_objects, threshold):
    image = image_of(*random_image(seed, num_detections, num_objects))
    _, scores, labels, object_labels, ignored = image
    owner, kinds, reasons = reference_kinds(*image)
    least = -np.inf if threshold is None else threshold
    counting = {d for d in kinds if scores[d] >= least and kinds[d] != "ignored"}
    seen = {reasons[d] for d in counting if d in reasons} | {g for g, d in owner.items() if d in counting}
    counts = collected(image).counts(threshold)
    for index, name in enumerate(LABELS.names):
        objects = [g for g in range(len(ignored)) if object_labels[g] == index and not ignored[g]]
        assert counts[name]["objects"] == len(objects)
        assert counts[name]["missed"] == sum(g not in seen for g in objects)
        for kind in ("correct", *NOT_MISSED):
            assert counts[name][kind] == sum(kinds[d] == kind and labels[d] == index for d in counting)
        assert counts[name]["detections"] == counts[name]["correct"] + sum(counts[name][kind] for kind in NOT_MISSED)


def test_correct_detections_are_those_of_pycocotools():
    images = [random_image(seed, num_detections=41) for seed in range(23)]
    truth, results = COCO(), []
    annotations = []
    for image_id, (detections, objects) in enumerate(images):
        for box, label, ignored in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": LABELS.raw_ids[label],
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(ignored),
                }
            )
        for box, score, label in detections:
            results.append(
                {
                    "image_id": image_id,
                    "category_id": LABELS.raw_ids[label],
                    "bbox": [float(value) for value in box],
                    "score": float(score),
                }
            )
    truth.dataset = {
        "images": [{"id": image_id, "height": 100, "width": 100} for image_id in range(len(images))],
        "categories": [{"id": raw_id} for raw_id in LABELS.raw_ids],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.evaluate()
    errors = collected(*(image_of(*image) for image in images))
    for index, raw_id in enumerate(LABELS.raw_ids):
        theirs = [each for each in evaluation.evalImgs if each is not None and each["category_id"] == raw_id]
        scores = np.concatenate([each["dtScores"] for each in theirs])
        counted = np.concatenate([~each["dtIgnore"][0].astype(bool) for each in theirs])
        correct = np.concatenate([each["dtMatches"][0] > 0 for each in theirs]) & counted
        curve = errors.precision_recall(index)
        assert curve.num_objects == sum((np.array(each["gtIgnore"]) == 0).sum() for each in theirs)
        assert curve.thresholds.tolist() == sorted(set(scores[counted]), reverse=True)
        assert curve.correct.tolist() == [correct[scores >= least].sum() for least in curve.thresholds]
        assert curve.detections.tolist() == [counted[scores >= least].sum() for least in curve.thresholds]
        assert 0 < curve.recall[-1] < 1 and 0 < curve.precision[-1] < 1


def test_of_equal_overlaps_the_last_object_is_taken_as_pycocotools_does():
    # Any other choice of the first detection would leave nothing to one of the others.
    ious = np.array([[0.6, 0.6, 0.5], [0.7, 0.0, 0.0], [0.0, 0.0, 0.7]])
    errors = collected((ious, np.array([0.9, 0.5, 0.5]), np.zeros(3, int), np.zeros(3, int), np.zeros(3, bool)))
    assert errors.counts()["cat"]["correct"] == 3


def test_best_threshold_is_the_best_of_all():
    errors = collected(*(image_of(*random_image(seed)) for seed in range(11)))
    best_of_class = errors.best_thresholds()
    thresholds = np.arange(1, 9) / 8
    for name in LABELS.names:
        f1 = []
        for threshold in thresholds:
            counts = errors.counts(threshold)[name]
            f1.append(2 * counts["correct"] / (counts["detections"] + counts["objects"]))
        best = best_of_class[name]
        assert best["F1"] == max(f1)
        assert best["score_threshold"] == thresholds[np.flatnonzero(np.array(f1) == max(f1))[-1]]
        counts = errors.counts(best["score_threshold"])[name]
        assert best["precision"] == counts["correct"] / counts["detections"]
        assert best["recall"] == counts["correct"] / counts["objects"]
        assert best["F1"] == pytest.approx(2 / (1 / best["precision"] + 1 / best["recall"]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_best_threshold_is_a_score_that_reaches_it(dtype):
    scores = np.array([0.8], dtype)
    errors = collected((np.ones((1, 1)), scores, np.zeros(1, int), np.zeros(1, int), np.zeros(1, bool)))
    assert errors.compute()["best"]["score_threshold"] == float(scores[0])
    assert errors.compute()["errors"] == dict.fromkeys(ERROR_KINDS, 0)


def test_classes_without_objects_or_right_detections_have_no_threshold():
    errors = collected(image_of([([60, 60, 20, 20], 0.9, 0), ([60, 60, 20, 20], 0.9, 1)], [CAT]))
    best = errors.compute()["best_of_class"]
    assert best["cat"] == {"score_threshold": None, "precision": None, "recall": 0.0, "F1": 0.0}
    assert best["dog"] == best["cow"] == {"score_threshold": None, "precision": None, "recall": None, "F1": None}
    assert np.isnan(errors.precision_recall(1).recall).all()
    # Where nothing is right, all detections are shown.
    assert errors.compute()["best"]["score_threshold"] is None
    assert errors.compute()["errors"] == {**dict.fromkeys(ERROR_KINDS, 0), "background": 2, "missed": 1}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0.3, 0.5, 2.0]))
def test_confusion_counts_every_object_and_every_detection_once(seed, threshold):
    errors = collected(*(image_of(*random_image(seed + number)) for number in range(3)))
    matrix, counts = errors.confusion(threshold), errors.counts(threshold)
    assert matrix.sum(axis=1)[:-1].tolist() == [counts[name]["objects"] for name in LABELS.names]
    assert matrix.sum(axis=0)[:-1].tolist() == [counts[name]["detections"] for name in LABELS.names]
    assert matrix.diagonal().tolist() == [*(counts[name]["correct"] for name in LABELS.names), 0]


def test_confusion_says_what_was_taken_for_what():
    errors = collected(
        image_of(
            [
                ([10, 10, 20, 20], 0.4, 1),  # the cat, taken for a dog
                ([10, 11, 20, 20], 0.6, 2),  # and, surer, for a cow
                ([60, 60, 20, 20], 0.8, 0),  # nothing there, taken for a cat
            ],
            [CAT, ([40, 40, 10, 10], 1, False)],  # the dog is taken for background
        )
    )
    expected = np.zeros((4, 4), int)
    expected[0, 2] = expected[1, 3] = expected[3, 0] = expected[3, 1] = 1
    assert np.array_equal(errors.confusion(), expected)
    expected[0, 2], expected[0, 3] = 0, 1
    expected[3, 1] = 0
    assert np.array_equal(errors.confusion(0.7), expected)


def test_a_found_object_is_not_confused_whatever_the_scores():
    errors = collected(image_of([([10, 10, 20, 20], 0.4, 0), ([10, 11, 20, 20], 0.6, 1)], [CAT]))
    assert errors.confusion()[0].tolist() == [1, 0, 0, 0] and errors.confusion()[3].tolist() == [0, 1, 0, 0]
    assert errors.confusion(0.5)[0].tolist() == [0, 1, 0, 0]  # only the dog is left


def test_merging_is_collecting_together_in_any_order():
    images = [image_of(*random_image(seed, num_detections=seed)) for seed in range(19)]
    whole = collected(*images)
    parts = [DetectionErrors(LABELS) for _ in range(3)]
    for image_id in np.random.default_rng(0).permutation(len(images)).tolist():
        parts[image_id % 3].add(image_id, *images[image_id])
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert parts[2].compute() == whole.compute()
    assert parts[2].worst_images(30) == whole.worst_images(30)


def test_worst_images_come_first():
    images = [image_of([([60, 60, 20, 20], 0.9, 0)] * count, []) for count in (2, 0, 5, 2, 1)]
    errors = collected(*images)
    assert errors.worst_images(9) == [(2, 5), (0, 2), (3, 2), (4, 1)]
    assert errors.worst_images(2) == [(2, 5), (0, 2)]
    assert errors.worst_images(2, score_threshold=0.95) == []


def test_nothing_added_has_no_score():
    result = DetectionErrors(LABELS).compute()
    assert set(result["best"].values()) == {None} and set(result["errors"].values()) == {0}


def test_arguments_are_not_changed():
    image = image_of(*random_image(0))
    before = [each.copy() for each in image]
    collected(image)
    assert all(np.array_equal(*pair) for pair in zip(image, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ious": np.zeros((2, 3))}, r"image 4: wanted ious \(D, G\).*got \(2, 3\), \(2,\), \(2,\), \(1,\) and \(1,\)"),
        ({"scores": np.array([0.5, np.nan])}, "image 4: a score or an overlap is not finite"),
        ({"labels": np.array([0, 3])}, "image 4: labels reach from 0 to 3, wanted 0 to 2"),
        ({"object_labels": np.array([-1])}, "image 4: object labels reach from -1 to -1"),
        ({"labels": np.array([0.0, 1.0])}, "image 4: labels must be integers, got float64"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {
        "ious": np.zeros((2, 1)),
        "scores": np.array([0.5, 0.4]),
        "labels": np.array([0, 1]),
        "object_labels": np.array([1]),
        "ignored": np.array([False]),
    }
    errors = DetectionErrors(LABELS)
    with pytest.raises(DataError, match=message):
        errors.add(4, **{**arguments, **changes})
    errors.add(4, **arguments)
    with pytest.raises(DataError, match="image 4 were added twice"):
        errors.add(4, **arguments)


def test_what_does_not_belong_together_is_not_merged():
    image = image_of(*random_image(0))
    with pytest.raises(DataError, match="1 images were added twice, image 0 among them"):
        collected(image).merge(collected(image))
    with pytest.raises(DataError, match=r"The classes differ: .*'cat'.*'sheep'"):
        collected(image).merge(DetectionErrors(LabelMap(("sheep",), (1,))))
