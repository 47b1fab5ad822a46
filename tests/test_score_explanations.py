import numpy as np
import pytest

from swin_dense.datasets.instance_facts import InstanceFacts
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.score_explanations import explain_instance_scores, explain_semantic_scores
from swin_dense.datasets.semantic_evaluation import ConfusionMatrix

LABELS = LabelMap(names=("cat", "dog", "cow"), raw_ids=(3, 5, 8))
SIZE_HW = (211, 307)
ZERO = {"AP": 0.0, "APs": 0.0, "APm": 0.0, "APl": 0.0}
FINE = {"AP": 0.4, "APs": 0.1, "APm": 0.4, "APl": 0.5}


def objects_of(seed, count=4):
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 90, (count, 2))
    return np.concatenate([corners, corners + random.uniform(30, 110, (count, 2))], axis=1)


def facts_of(change=None, images=9, object_labels=(0, 1, 2, 0), ignored=False):
    """Facts of detections that lie right, unless `change` alters an image's boxes, scores and labels."""
    facts = InstanceFacts(LABELS)
    for seed in range(images):
        objects, labels = objects_of(seed), np.array(object_labels)
        detections = objects.copy(), np.random.default_rng(seed).random(4), labels.copy()
        if change is not None:
            detections = change(*detections)
        facts.add(*detections, objects, labels, np.full(4, ignored), SIZE_HW)
    return facts


def nothing(boxes, scores, labels):
    return boxes[:0], scores[:0], labels[:0]


def as_size(boxes, scores, labels):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), scores, labels


def as_fractions(boxes, scores, labels):
    return boxes / np.tile((SIZE_HW[1], SIZE_HW[0]), 2), scores, labels


def not_finite(boxes, scores, labels):
    return boxes, np.where(np.arange(4) == 2, np.nan, scores), labels


PLANTED = {
    "no detection": (nothing, "There is no detection in 9 images"),
    "width and height": (as_size, "The boxes look like x, y, width, height in pixels: read so, "),
    "fractions": (as_fractions, "The boxes look like x1, y1, x2, y2 in fractions of the image's width and height"),
    "not finite": (not_finite, "9 of 36 detections have a score or box that is not finite"),
    "beyond the image": (lambda b, s, c: (b + 500, s, c), "100% of the detections reach beyond their image"),
    "resized image": (lambda b, s, c: (b / 3.5, s, c), "Detections have 0.3 times the side of objects"),
    "class too high": (lambda b, s, c: (b, s, np.array([1, 2, 1, 1])), "Classes look shifted by one: 100% of the"),
    "other order": (lambda b, s, c: (b, s, np.array([2, 0, 0, 2])), "Boxes fit, classes do not: 100% of the objects"),
    "equal scores": (lambda b, s, c: (b, np.full(4, 0.5), c), "All 36 detections have the same score, 0.5"),
    "one class": (
        lambda b, s, c: (b, s, np.zeros(4, int)),
        "All detections are of class 'cat', while there are objects",
    ),
}


@pytest.mark.parametrize("cause", PLANTED)
def test_planted_cause_comes_first(cause):
    change, beginning = PLANTED[cause]
    assert explain_instance_scores(ZERO, facts_of(change))[0].startswith(beginning)


def test_size_of_few_detections_by_chance_is_not_explained():
    seldom = iter(range(9))

    def resized(boxes, scores, labels):
        kept = slice(len(boxes) if next(seldom) < 3 else 0)
        return boxes[kept] / 3.5, scores[kept], labels[kept]

    sentences = explain_instance_scores(ZERO, facts_of(resized))
    assert any("of the images have no detection" in sentence for sentence in sentences)
    assert not any("times the side" in sentence for sentence in sentences)


def test_scores_that_are_fine_are_not_explained():
    assert explain_instance_scores(FINE, facts_of(), {"cat": 0.3, "dog": 0.5, "cow": 0.4}) == []


def test_right_boxes_below_many_wrong_ones_are_said_to_be_so():
    (sentence,) = explain_instance_scores(ZERO, facts_of())
    assert sentence.startswith("100% of the objects are overlapped by half by the box of a detection of their class")


def test_boxes_elsewhere_are_said_to_overlap_nothing():
    facts = InstanceFacts(LABELS)
    for seed in range(9):
        objects = objects_of(seed, count=1)
        boxes = objects + [0.8 * (objects[0, 2] - objects[0, 0]), 0] * 2
        label, score = np.array([seed % 3]), np.array([seed / 9])
        facts.add(boxes, score, label, objects, label, np.zeros(1, bool), SIZE_HW)
    (sentence,) = explain_instance_scores(ZERO, facts)
    assert sentence.startswith("No detection's box overlaps an object of its class by half")
    assert "the largest overlap is 0.11" in sentence


def test_a_single_detection_is_not_said_to_have_equal_scores():
    facts = facts_of(nothing)
    facts.add(
        objects_of(0)[:1], np.array([0.5]), np.array([0]), objects_of(0), np.arange(4) % 3, np.zeros(4, bool), SIZE_HW
    )
    assert not any("the same score" in sentence for sentence in explain_instance_scores(ZERO, facts))


def test_rows_before_columns_are_noticed():
    facts = InstanceFacts(LABELS)
    objects = np.array([[60.0, 3, 84, 12], [50, 40, 80, 47]])
    labels = np.zeros(2, int)
    facts.add(objects[:, [1, 0, 3, 2]], np.array([0.5, 0.6]), labels, objects, labels, np.zeros(2, bool), SIZE_HW)
    assert explain_instance_scores(ZERO, facts)[0].startswith("The boxes look like y1, x1, y2, x2 in pixels")


def test_class_too_low_is_told_from_class_too_high():
    facts = facts_of(lambda boxes, scores, labels: (boxes, scores, labels - 1), object_labels=(1, 2, 1, 2))
    assert "whose class index is 1 too low" in explain_instance_scores(ZERO, facts)[0]
    facts = facts_of(lambda boxes, scores, labels: (boxes, scores, labels + 1), object_labels=(0, 1, 1, 0))
    assert "whose class index is 1 too high" in explain_instance_scores(ZERO, facts)[0]


def test_detections_in_ignored_regions_are_noticed():
    facts = facts_of(ignored=True)
    no_boxes = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
    facts.add(*no_boxes, objects_of(0), np.arange(4) % 3, np.zeros(4, bool), SIZE_HW)
    assert explain_instance_scores(ZERO, facts)[0].startswith("100% of the detections lie in ignored regions (iscrowd)")


def test_classes_without_objects_are_named():
    facts = facts_of(lambda boxes, scores, labels: (boxes, scores, np.full(4, 2)), object_labels=(0, 1, 0, 1))
    first = explain_instance_scores(ZERO, facts)[0]
    assert first == "All detections are of classes without any object: 'cow'. There are objects of 'cat', 'dog'."


def test_images_without_detections_are_noticed():
    facts = facts_of(nothing, images=20)
    facts.merge(facts_of())
    assert explain_instance_scores(ZERO, facts)[0].startswith("69% of the images have no detection")


def test_unknown_ids_come_first_and_are_shown():
    facts = facts_of(nothing)
    facts.unknown_image_ids, facts.unknown_category_ids = {f"{number:02}.jpg" for number in range(7)}, {0, 1}
    images, categories, *_ = explain_instance_scores(ZERO, facts)
    assert images.startswith("7 image ids of the results are not in the annotations: '00.jpg', '01.jpg', ")
    assert "'04.jpg', and 2 more. The results" in images
    assert categories.startswith("2 category ids of the results are not in the annotations: 0, 1; there are 3, 5, 8.")


@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_to_find_is_said_to_be_nothing_to_measure(ignored):
    facts = facts_of(ignored=True) if ignored else InstanceFacts(LABELS)
    (sentence,) = explain_instance_scores(dict.fromkeys(ZERO), facts)
    assert sentence.startswith("All scores are None: there is no object") and "other tools print -1" in sentence
    assert ("only 36 ignored regions" in sentence) == ignored


def test_missing_size_is_said_to_have_no_object():
    (sentence,) = explain_instance_scores({**FINE, "APs": None}, facts_of())
    assert sentence == (
        "APs is None: there is no object smaller than 32 x 32 pixels, so there is nothing to measure; "
        "other tools print -1."
    )


def test_missing_masks_are_said_to_be_missing():
    (sentence,) = explain_instance_scores(dict.fromkeys(ZERO), facts_of())
    assert sentence.startswith("AP is None: the detections have none of what is scored")


def test_classes_are_explained_one_by_one():
    def change(boxes, scores, labels):
        return boxes[[0, 2]], scores[[0, 2]], labels[[0, 2]]

    facts = facts_of(change, object_labels=(0, 1, 0, 1))
    assert explain_instance_scores(FINE, facts, {"cat": 0.0, "dog": 0.0, "cow": None}) == [
        "AP is 0 of 1 class, which have objects but no detection: 'dog'.",
        "AP is 0 of 1 class, where wrong detections have higher scores or masks do not fit: 'cat'.",
        "AP is None of 1 class, which have no object; other tools print -1: 'cow'.",
    ]
    facts = facts_of(lambda boxes, scores, labels: (boxes + 150, scores, labels))
    assert explain_instance_scores(FINE, facts, dict.fromkeys(LABELS.names, 0.0)) == [
        "AP is 0 of 3 classes, where no box overlaps an object by half: 'cat', 'dog', 'cow'."
    ]


def confusion_of(prediction, label):
    confusion = ConfusionMatrix(LABELS)
    confusion.add(np.asarray(prediction), np.asarray(label))
    return confusion


LABEL = np.repeat([[0, 1, 2]], 5, axis=0).repeat(7, axis=1)


def test_right_label_maps_are_not_explained():
    assert explain_semantic_scores(confusion_of(LABEL, LABEL)) == []
    noisy = np.where(np.arange(21) % 5 == 0, 1, LABEL)
    assert explain_semantic_scores(confusion_of(noisy, LABEL)) == []


@pytest.mark.parametrize(("shift", "words"), [(1, "with 1 taken from every"), (-1, "with 1 added to every")])
def test_shift_by_one_class_comes_first(shift, words):
    confusion = confusion_of((LABEL + shift).clip(0, 2), LABEL)
    first = explain_semantic_scores(confusion)[0]
    assert first.startswith("Predictions look shifted by one class") and words in first


def test_score_without_the_shift_is_that_of_predictions_without_it():
    label = LABEL.clip(0, 1)
    first = explain_semantic_scores(confusion_of(label + 1, label))[0]
    assert "mIoU would be 1.000 instead of 0.000" in first


def test_one_class_everywhere_comes_first():
    first, second = explain_semantic_scores(confusion_of(np.full_like(LABEL, 0), LABEL))
    assert first.startswith("Every pixel is predicted as 'cat', while 3 classes are labelled")
    assert second == "IoU is 0 of 2 classes, which are labelled but never predicted: 'dog', 'cow'."


def test_what_a_lost_class_is_taken_for_is_said():
    prediction = np.where(LABEL == 2, 0, LABEL)
    prediction[0, 0], prediction[4, -1] = 2, 1
    (sentence,) = explain_semantic_scores(confusion_of(prediction, LABEL))
    assert sentence == "IoU of 'cow' is 0: 97% of its pixels are predicted as 'cat'."


def test_all_ignored_is_nothing_to_measure():
    (sentence,) = explain_semantic_scores(confusion_of(LABEL, np.full_like(LABEL, 255)))
    assert sentence.startswith("All scores are None: all 105 pixels of 1 images are ignored (255)")
    assert explain_semantic_scores(ConfusionMatrix(LABELS)) == ["All scores are None: no image was scored."]


def test_absent_classes_are_named():
    label = LABEL.clip(0, 1)
    (sentence,) = explain_semantic_scores(confusion_of(label, label))
    assert sentence == "Scores are None of 1 class, which no pixel is labelled as; they leave the means alone: 'cow'."


def test_guessing_is_said_to_be_guessing():
    labels = LabelMap(tuple(f"class {index}" for index in range(60)), tuple(range(60)))
    confusion = ConfusionMatrix(labels)
    confusion.add(*np.random.default_rng(0).integers(0, 60, (2, 199, 211)))
    (sentence,) = explain_semantic_scores(confusion)
    assert sentence.startswith("1.7% of the pixels are right: the model is not trained enough")


def test_which_precision_is_explained_is_said():
    per_class = {"cat": 0.0, "dog": None}
    for kind, measure in (("", "AP"), ("mask", "Mask AP"), ("box", "Box AP")):
        sentences = explain_instance_scores({**ZERO, "APs": None}, facts_of(), per_class, kind)
        assert sum(sentence.startswith(f"{measure} is ") for sentence in sentences) == 2
        assert any(sentence.startswith(f"{measure}s is None") for sentence in sentences)
