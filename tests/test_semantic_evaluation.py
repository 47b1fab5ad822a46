import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_evaluation import ConfusionMatrix
from swin_dense.errors import DataError

LABELS = LabelMap(names=("sky", "road", "tree"), raw_ids=(1, 2, 3))


def scores_of(*pairs, labels=LABELS):
    matrix = ConfusionMatrix(labels)
    for prediction, label in pairs:
        matrix.add(np.asarray(prediction), np.asarray(label))
    return matrix.compute()


def random_pair(seed, size_hw=(13, 17), num_classes=3):
    random = np.random.default_rng(seed)
    label = random.integers(0, num_classes, size_hw).astype(np.uint8)
    label[random.random(size_hw) < 0.2] = 255
    return random.integers(0, num_classes, size_hw), label


def test_perfect_prediction_scores_one():
    label = random_pair(0)[1]
    scores = scores_of((np.where(label == 255, 0, label), label))
    assert scores["mIoU"] == scores["mAcc"] == scores["aAcc"] == 1.0
    assert scores["absent"] == [] and scores["per_class"]["road"] == {"IoU": 1.0, "accuracy": 1.0}


def test_scores_of_a_small_example_by_hand():
    scores = scores_of(([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 0, 255]]))
    assert scores["per_class"]["sky"] == {"IoU": 1 / 3, "accuracy": 1 / 2}
    assert scores["per_class"]["road"] == {"IoU": 2 / 4, "accuracy": 2 / 3}
    assert scores["per_class"]["tree"] is None and scores["absent"] == ["tree"]
    assert scores["mIoU"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores["mAcc"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["aAcc"] == 3 / 5


@given(seed=st.integers(0, 2**32 - 1))
def test_scores_equal_sets_of_pixels(seed):
    prediction, label = random_pair(seed, (5, 7))
    scores = scores_of((prediction, label))
    prediction = np.where(label == 255, 255, prediction)
    for index, name in enumerate(LABELS.names):
        is_predicted, is_labelled = prediction == index, label == index
        if not is_labelled.any():
            assert scores["per_class"][name] is None
            continue
        both = (is_predicted & is_labelled).sum()
        assert scores["per_class"][name]["IoU"] == both / (is_predicted | is_labelled).sum()
        assert scores["per_class"][name]["accuracy"] == both / is_labelled.sum()


def test_image_by_image_equals_all_pixels_at_once():
    pairs = [random_pair(seed, (7 + seed, 11)) for seed in range(5)]
    joined = tuple(np.concatenate([pair[side] for pair in pairs]) for side in range(2))
    assert scores_of(*pairs) == scores_of(joined) == scores_of(*reversed(pairs))


def test_merged_matrices_equal_one():
    one, other, whole = (ConfusionMatrix(LABELS) for _ in range(3))
    for seed in range(4):
        (one if seed % 2 else other).add(*random_pair(seed))
        whole.add(*random_pair(seed))
    one.merge(other)
    assert np.array_equal(one.matrix, whole.matrix) and one.compute() == whole.compute()


def test_ignored_pixels_change_nothing():
    prediction, label = random_pair(3)
    changed = np.where(label == 255, 2 - prediction, prediction)
    assert scores_of((prediction, label)) == scores_of((changed, label))


def test_prediction_may_hold_anything_where_the_label_is_ignored():
    prediction, label = random_pair(3)
    assert scores_of((np.where(label == 255, 999, prediction), label)) == scores_of((prediction, label))


def test_predicting_an_absent_class_costs_only_the_classes_present():
    scores = scores_of(([[0, 0, 2, 2]], [[0, 0, 0, 0]]))
    assert scores["absent"] == ["road", "tree"]
    assert scores["mIoU"] == scores["per_class"]["sky"]["IoU"] == 0.5


def test_nothing_labelled_has_no_score():
    scores = scores_of((np.zeros((3, 5), int), np.full((3, 5), 255)))
    assert scores["mIoU"] is scores["mAcc"] is scores["aAcc"] is None
    assert scores["absent"] == list(LABELS.names)
    assert scores == ConfusionMatrix(LABELS).compute()


def test_uint8_values_do_not_overflow():
    labels = LabelMap(names=tuple(f"class {i}" for i in range(150)), raw_ids=tuple(range(1, 151)))
    label = np.arange(150, dtype=np.uint8).reshape(10, 15)
    assert scores_of((label, label), labels=labels)["mIoU"] == 1.0


def test_arguments_are_not_changed():
    prediction, label = random_pair(1)
    before = prediction.copy(), label.copy()
    scores_of((prediction, label))
    assert np.array_equal(prediction, before[0]) and np.array_equal(label, before[1])


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (np.zeros((3, 5), int), np.zeros((5, 3), int), r"same shape \(H, W\), got \(3, 5\) and \(5, 3\)"),
        (np.zeros(3, int), np.zeros(3, int), r"got \(3,\) and \(3,\)"),
        (np.full((2, 2), 3), np.zeros((2, 2), int), "prediction holds values from 3 to 3, wanted 0 to 2"),
        (np.full((2, 2), -1), np.zeros((2, 2), int), "prediction holds values from -1 to -1"),
        (np.zeros((2, 2), int), np.full((2, 2), 150), "label holds values from 150 to 150.*255 in a label"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "prediction must hold integers, got float64"),
    ],
)
def test_bad_arguments_are_named(prediction, label, message):
    with pytest.raises(DataError, match=message):
        ConfusionMatrix(LABELS).add(prediction, label)


def test_other_classes_are_not_merged():
    with pytest.raises(DataError, match=r"The classes differ: .*'road'.*'river'"):
        ConfusionMatrix(LABELS).merge(ConfusionMatrix(LabelMap(names=("river",), raw_ids=(1,))))


def test_large_images_are_counted_in_bands_to_the_same_numbers(monkeypatch):
    prediction, label = random_pair(3, (13, 17))
    whole = scores_of((prediction, label))
    monkeypatch.setattr("swin_dense.datasets.semantic_evaluation._PIXELS_AT_ONCE", 40)  # two rows
    assert scores_of((prediction, label)) == whole
    matrix = ConfusionMatrix(LABELS)
    label[-1, -1] = 7
    with pytest.raises(DataError):
        matrix.add(prediction, label)
    assert not matrix.matrix.any()  # nothing of a refused image is counted
