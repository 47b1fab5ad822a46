import numpy as np
import pytest

from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.instance_scores import InstanceScores
from swin_dense.datasets.labels import LabelMap

LABELS = LabelMap(("cat", "dog"), (3, 8))
SIZE_HW = (61, 97)


def annotation(number, image_id, category_id, bbox, **more):
    x, y, width, height = bbox
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": width * height}
    return {**entry, "segmentation": [corners], "iscrowd": 0, **more}


TRUTH = {
    "images": [{"id": number, "height": SIZE_HW[0], "width": SIZE_HW[1]} for number in (5, 6, 7)],
    "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    "annotations": [
        annotation(0, 5, 3, [4, 6, 40, 30]),
        annotation(1, 5, 8, [50, 10, 20, 40]),
        annotation(2, 6, 3, [10, 10, 50, 40]),
        annotation(3, 6, 3, [70, 5, 20, 20], iscrowd=1),
    ],
}
BOXES = {
    5: [([4, 6, 44, 36], 0.9, 0), ([50, 10, 70, 50], 0.8, 0)],  # right; a dog taken for a cat
    6: [
        ([10, 10, 60, 50], 0.7, 0),
        ([11, 10, 60, 50], 0.6, 0),
        ([72, 6, 88, 20], 0.95, 0),
    ],  # right, again, in the crowd
    7: [],
}


def add(scores, image_id, with_masks):
    boxes = np.array([box for box, _, _ in BOXES[image_id]], np.float64).reshape(-1, 4)
    given = (boxes, np.array([s for _, s, _ in BOXES[image_id]]), np.array([n for _, _, n in BOXES[image_id]], int))
    masks = None
    if with_masks:
        masks = []
        for left, top, right, bottom in boxes.astype(int).tolist():
            mask = np.zeros(SIZE_HW, bool)
            mask[top:bottom, left:right] = True
            changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
            masks.append({"size": SIZE_HW, "counts": np.diff(changes, prepend=0, append=mask.size).tolist()})
    scores.add(image_id, scores.coco.detections(image_id, *given, masks))


@pytest.fixture(params=[True, False], ids=["masks", "boxes"])
def with_masks(request):
    return request.param


def scored(image_ids, with_masks):
    scores = InstanceScores(TRUTH, LABELS)
    for image_id in image_ids:
        add(scores, image_id, with_masks)
    return scores


def test_numbers_are_cocos_and_errors_are_told_apart(with_masks):
    scores = scored(BOXES, with_masks)
    computed = scores.compute()
    plain = CocoEvaluator(TRUTH, LABELS)
    again = InstanceScores(TRUTH, LABELS)
    again.coco = plain
    for image_id in BOXES:
        add(again, image_id, with_masks)
    assert {name: computed[name] for name in ("box", "mask", "per_class")} == plain.compute()
    assert (computed["mask"]["AP"] is None) != with_masks
    at_all_scores = scores.errors.counts()
    assert at_all_scores["cat"]["correct"] == 2 and at_all_scores["cat"]["duplicate"] == 1
    assert at_all_scores["cat"]["class"] == 1 and at_all_scores["dog"]["missed"] == 0
    assert computed["errors"]["best"]["F1"] == pytest.approx(4 / 6)


def test_explanations_are_about_what_is_scored(with_masks):
    sentences = scored(BOXES, with_masks).compute()["explanations"]
    assert any("'dog'" in sentence for sentence in sentences)
    assert not any("none of what is scored" in sentence for sentence in sentences)


def test_worst_images_come_first(with_masks):
    worst = scored(BOXES, with_masks).worst_images(5)
    assert worst[0][0] == 5 and 7 not in dict(worst)


def test_merged_scores_are_those_of_all_images(with_masks):
    one, other = scored([7, 5], with_masks), scored([6], with_masks)
    one.merge(other)
    assert one.compute() == scored([5, 6, 7], with_masks).compute()
