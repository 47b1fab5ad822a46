import numpy as np
import pytest

from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_evaluation import BoundaryIoU, ConfusionMatrix
from swin_dense.datasets.semantic_scores import SemanticScores

LABELS = LabelMap(("road", "tree", "car", "(nothing)"), (1, 2, 3, 4))


def pictures(seed=0, count=5):
    generator = np.random.default_rng(seed)
    for index in range(count):
        label = np.kron(generator.choice([0, 1, 2, 255], (5, 7)), np.ones((4, 3), int)).astype(np.uint8)
        wrong = generator.random(label.shape) < 0.05 * index
        prediction = np.where(label == 255, 0, label)
        yield np.where(wrong, generator.integers(0, 3, label.shape), prediction), label


def collected(indices, **options):
    scores = SemanticScores(LABELS, **options)
    for index, pair in enumerate(pictures()):
        if index in indices:
            scores.add(index, *pair)
    return scores


def test_scores_are_those_of_the_parts():
    scores = collected(range(5)).compute()
    confusion, boundary = ConfusionMatrix(LABELS), BoundaryIoU(LABELS)
    for pair in pictures():
        confusion.add(*pair)
        boundary.add(*pair)
    whole, outlines = confusion.compute(), boundary.compute()
    assert scores["mIoU"] == whole["mIoU"] and scores["boundary_mIoU"] == outlines["boundary_mIoU"]
    assert scores["per_class"]["tree"] == {**whole["per_class"]["tree"], **outlines["per_class"]["tree"]}
    assert scores["per_class"]["(nothing)"] is None and scores["absent"] == ["(nothing)"]
    assert scores["confusion"] == confusion.matrix.tolist()
    assert any("'(nothing)'" in sentence for sentence in scores["explanations"])


def test_merged_scores_are_those_of_all_images():
    one, other = collected([0, 3]), collected([1, 2, 4])
    other.merge(one)
    whole = collected(range(5))
    assert other.compute() == whole.compute() and other.worst_images(9) == whole.worst_images(9)


def test_worst_images_have_the_lowest_mean_iou_and_perfect_ones_are_none():
    worst = collected(range(5)).worst_images(9)
    assert len(worst) == 4 and {index for index, _ in worst} == {1, 2, 3, 4}
    assert [iou for _, iou in worst] == sorted(iou for _, iou in worst)
    index, iou = worst[0]
    confusion = ConfusionMatrix(LABELS)
    confusion.add(*list(pictures())[index])
    assert iou == pytest.approx(confusion.compute()["mIoU"])
    assert collected(range(5)).worst_images(1) == worst[:1]


def test_classes_without_a_score_are_not_mentioned():
    scores = collected(range(5), unscored=("(nothing)",)).compute()
    assert list(scores["per_class"]) == ["road", "tree", "car"]
    assert scores["absent"] == [] and not any("nothing" in sentence for sentence in scores["explanations"])
