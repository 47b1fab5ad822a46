import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.datasets.classification_evaluation import ClassificationAccuracy
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError


def labels_of(count):
    return LabelMap(tuple(f"c{index}" for index in range(count)), tuple(range(count)))


def scored(scores, labels):
    accuracy = ClassificationAccuracy(labels_of(scores.shape[1]))
    for row, label in zip(scores, labels, strict=True):
        accuracy.add(row, int(label))
    return accuracy


@given(st.integers(2, 9), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_accuracy_is_that_of_sorted_scores(num_classes, count, seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 4, (count, num_classes)).astype(np.float32)  # many ties
    labels = generator.integers(0, num_classes, count)
    order = np.argsort(-scores, axis=1, kind="stable")
    result = scored(scores, labels).compute()
    for top in (1, 5):
        hits = (order[:, :top] == labels[:, None]).any(axis=1)
        if top == 5 and num_classes <= 5:
            assert "top-5" not in result
            continue
        assert result[f"top-{top}"] == pytest.approx(hits.mean())
        for index in range(num_classes):
            of_class = result["per_class"][f"c{index}"]
            if (labels == index).any():
                assert of_class[f"top-{top}"] == pytest.approx(hits[labels == index].mean())
            else:
                assert of_class is None and f"c{index}" in result["absent"]


def test_perfect_scores_are_one():
    result = scored(np.eye(7), np.arange(7)).compute()
    assert result["top-1"] == result["top-5"] == 1.0 and result["absent"] == []


def test_merging_is_counting_together():
    generator = np.random.default_rng(0)
    scores, labels = generator.random((31, 6)), generator.integers(0, 6, 31)
    first, second = scored(scores[:13], labels[:13]), scored(scores[13:], labels[13:])
    first.merge(second)
    assert first.compute() == scored(scores, labels).compute()
    with pytest.raises(DataError, match="The classes differ"):
        first.merge(ClassificationAccuracy(labels_of(5)))


def test_without_images_there_is_no_score():
    result = ClassificationAccuracy(labels_of(2)).compute()
    assert result == {"top-1": None, "per_class": {"c0": None, "c1": None}, "absent": ["c0", "c1"]}


@pytest.mark.parametrize(
    ("scores", "label", "message"),
    [
        (np.zeros(3), 0, r"one score for each of 2 classes, got \(3,\)"),
        (np.zeros((2, 1)), 0, "one score for each of 2 classes"),
        (np.array([0.5, np.nan]), 0, "nan"),
        (np.zeros(2), 2, r"label must be 0 to 1, got 2"),
        (np.zeros(2), -1, r"label must be 0 to 1, got -1"),
    ],
)
def test_wrong_scores_and_labels_are_refused(scores, label, message):
    with pytest.raises(DataError, match=message):
        ClassificationAccuracy(labels_of(2)).add(scores, label)
