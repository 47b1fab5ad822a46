import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.datasets.boundaries import boundary_distance, boundary_of_labels
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_evaluation import BoundaryIoU, ConfusionMatrix
from swin_dense.errors import ConfigError, DataError

LABELS = LabelMap(names=("sky", "road", "tree"), raw_ids=(1, 2, 3))


def counted(*pairs, labels=LABELS, kind=ConfusionMatrix):
    counts = kind(labels)
    for prediction, label in pairs:
        counts.add(np.asarray(prediction), np.asarray(label))
    return counts


def scores_of(*pairs, labels=LABELS, kind=ConfusionMatrix):
    return counted(*pairs, labels=labels, kind=kind).compute()


def random_pair(seed, size_hw=(13, 17), num_classes=3):
    random = np.random.default_rng(seed)
    label = random.integers(0, num_classes, size_hw).astype(np.uint8)
    label[random.random(size_hw) < 0.2] = 255
    return random.integers(0, num_classes, size_hw), label


def test_perfect_prediction_scores_one():
    label = random_pair(0)[1]
    scores = scores_of((np.where(label == 255, 0, label), label))
    assert scores["mIoU"] == scores["mAcc"] == scores["aAcc"] == scores["image_mIoU"] == 1.0
    assert scores["absent"] == []
    for of_class in scores["per_class"].values():
        del of_class["pixel_share"]
        assert set(of_class.values()) == {1.0}


def test_scores_of_a_small_example_by_hand():
    scores = scores_of(([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 0, 255]]))
    assert scores["per_class"]["sky"] == {
        "IoU": 1 / 3,
        "accuracy": 1 / 2,
        "precision": 1 / 2,
        "F1": 2 / 4,
        "image_IoU": 1 / 3,
        "pixel_share": 2 / 5,
    }
    assert scores["per_class"]["road"] == {
        "IoU": 2 / 4,
        "accuracy": 2 / 3,
        "precision": 2 / 3,
        "F1": 4 / 6,
        "image_IoU": 2 / 4,
        "pixel_share": 3 / 5,
    }
    assert scores["per_class"]["tree"] is None and scores["absent"] == ["tree"]
    assert scores["mIoU"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores["image_mIoU"] == scores["mIoU"]  # of one image
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
    singly, at_once = counted(*pairs), counted(joined)
    assert np.array_equal(singly.matrix, at_once.matrix)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert singly.compute()[name] == at_once.compute()[name]


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_order_of_images_changes_no_bit(kind):
    pairs = [random_pair(seed, (7 + seed % 5, 11)) for seed in range(31)]
    shuffled = [pairs[index] for index in np.random.default_rng(0).permutation(len(pairs))]
    assert scores_of(*pairs, kind=kind) == scores_of(*shuffled, kind=kind)


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_merging_is_counting_together(kind):
    pairs = [random_pair(seed, (7 + seed % 5, 11)) for seed in range(13)]
    one, other, whole = counted(*pairs[1::3], kind=kind), counted(*pairs[::3], kind=kind), counted(*pairs, kind=kind)
    one.merge(counted(*pairs[2::3], kind=kind))
    other.merge(one)
    assert other.compute() == whole.compute()
    if kind is ConfusionMatrix:
        assert (other.num_images, other.num_ignored) == (whole.num_images, whole.num_ignored)
        assert np.array_equal(other.matrix, whole.matrix)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_image_means_are_those_of_each_image_alone(seeds):
    pairs = [random_pair(seed, (2, 3)) for seed in seeds]
    scores, alone = scores_of(*pairs), [scores_of(pair) for pair in pairs]
    means = [each["mIoU"] for each in alone if each["mIoU"] is not None]
    assert scores["image_mIoU"] == (pytest.approx(np.mean(means), abs=1e-15) if means else None)
    for name in LABELS.names:
        of_class = [each["per_class"][name]["IoU"] for each in alone if each["per_class"][name]]
        if of_class:
            assert scores["per_class"][name]["image_IoU"] == pytest.approx(np.mean(of_class), abs=1e-15)


def test_set_and_image_means_differ_where_images_do():
    large = np.zeros((30, 30), int), np.zeros((30, 30), int)
    small = np.ones((2, 2), int), np.zeros((2, 2), int)
    scores = scores_of(large, small)
    assert scores["mIoU"] == 900 / 904 and scores["image_mIoU"] == 1 / 2


def test_image_without_labelled_pixels_leaves_image_means_alone():
    pair, empty = random_pair(0), (np.zeros((3, 5), int), np.full((3, 5), 255))
    with_empty = counted(pair, empty)
    assert with_empty.compute() == scores_of(pair)
    assert with_empty.num_images == 2 and with_empty.num_ignored == 15 + (pair[1] == 255).sum()


def test_shares_are_rows_of_one():
    shares = counted(([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 0, 255]])).shares()
    assert np.array_equal(shares[:2], [[1 / 2, 1 / 2, 0], [1 / 3, 2 / 3, 0]])
    assert np.isnan(shares[2]).all()  # no tree is labelled


def test_class_that_is_never_predicted_has_no_precision():
    of_class = scores_of(([[0, 0]], [[0, 1]]))["per_class"]["road"]
    assert of_class["precision"] is None and of_class["IoU"] == of_class["F1"] == of_class["accuracy"] == 0.0


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
    assert scores["mIoU"] is scores["mAcc"] is scores["aAcc"] is scores["image_mIoU"] is None
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
@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_bad_arguments_are_named(kind, prediction, label, message):
    with pytest.raises(DataError, match=message):
        kind(LABELS).add(prediction, label)


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_other_classes_are_not_merged(kind):
    with pytest.raises(DataError, match=r"The classes differ: .*'road'.*'river'"):
        kind(LABELS).merge(kind(LabelMap(names=("river",), raw_ids=(1,))))


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_large_images_are_counted_in_bands_to_the_same_numbers(monkeypatch, kind):
    prediction, label = random_pair(3, (13, 17))
    whole = scores_of((prediction, label), kind=kind)
    monkeypatch.setattr("swin_dense.datasets.semantic_evaluation._PIXELS_AT_ONCE", 40)  # two rows
    assert scores_of((prediction, label), kind=kind) == whole
    counts = kind(LABELS)
    label[-1, -1] = 7
    with pytest.raises(DataError):
        counts.add(prediction, label)
    assert counts.compute() == kind(LABELS).compute()  # nothing of a refused image is counted


def shifted_square(shift, side=41):
    label = np.zeros((side, side), np.uint8)
    label[10:30, 10:30] = 1
    return np.roll(label, shift, axis=1).astype(int), label


def test_boundary_iou_of_a_perfect_prediction_is_one():
    label = random_pair(0)[1]
    scores = scores_of((np.where(label == 255, 999, label), label), kind=BoundaryIoU)
    assert scores["boundary_mIoU"] == 1.0
    assert scores["per_class"] == {name: {"boundary_IoU": 1.0} for name in LABELS.names}


@given(seed=st.integers(0, 2**32 - 1))
def test_boundary_iou_equals_sets_of_pixels(seed):
    pairs = [random_pair(seed + number, (5, 11 + number)) for number in range(2)]
    scores = scores_of(*pairs, kind=BoundaryIoU)
    both, either = np.zeros(3), np.zeros(3)
    for prediction, label in pairs:
        distance = boundary_distance(label.shape)
        near_label, near_prediction = (boundary_of_labels(each, label, distance) for each in (label, prediction))
        for index in range(3):
            one, other = near_label & (label == index), near_prediction & (prediction == index)
            both[index] += (one & other).sum()
            either[index] += (one | other).sum()
    assert [scores["per_class"][name]["boundary_IoU"] for name in LABELS.names] == (both / either).tolist()
    assert scores["boundary_mIoU"] == pytest.approx(np.mean(both / either))


def test_boundary_iou_sees_shifts_that_iou_hardly_sees():
    pair = shifted_square(1)
    assert scores_of(pair)["per_class"]["road"]["IoU"] > 0.9
    assert scores_of(pair, kind=BoundaryIoU)["per_class"]["road"]["boundary_IoU"] < 0.5


def test_boundary_iou_falls_with_the_distance():
    values = [scores_of(shifted_square(shift), kind=BoundaryIoU)["boundary_mIoU"] for shift in range(4)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4


def test_class_without_an_outline_has_no_boundary_iou():
    scores = scores_of(([[0, 0, 2, 2]], [[0, 0, 0, 0]]), kind=BoundaryIoU)
    assert scores["per_class"]["road"] is None and scores["per_class"]["tree"] is None
    assert scores["boundary_mIoU"] == scores["per_class"]["sky"]["boundary_IoU"]
    assert BoundaryIoU(LABELS).compute()["boundary_mIoU"] is None


def test_boundary_iou_of_other_widths_is_not_merged():
    with pytest.raises(DataError, match=r"widths differ: 0.02 and 0.05"):
        BoundaryIoU(LABELS).merge(BoundaryIoU(LABELS, dilation_ratio=0.05))


def test_boundary_iou_refuses_more_classes_than_a_label_map_holds():
    labels = LabelMap(names=tuple(f"class {i}" for i in range(256)), raw_ids=tuple(range(256)))
    with pytest.raises(ConfigError, match="wanted at most 255 classes, got 256"):
        BoundaryIoU(labels)
