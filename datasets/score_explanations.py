"""Why a score is 0 or missing, in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from swin_dense.datasets.instance_facts import AS_GIVEN, HALF, InstanceFacts
from swin_dense.datasets.semantic_evaluation import ConfusionMatrix

LOW_SCORE = 0.01
"""Below this average precision a cause is looked for: detectors that work, however badly, have more."""

LOW_MEAN_IOU = 0.05
"""The same for label maps; guessing among many classes gives less."""

_NUM_SHOWN = 5
_SIZES = {
    "s": "smaller than 32 x 32 pixels",
    "m": "from 32 x 32 to 96 x 96 pixels",
    "l": "larger than 96 x 96 pixels",
}


def explain_instance_scores(
    scores: Mapping[str, float | None],
    facts: InstanceFacts,
    per_class: Mapping[str, float | None] | None = None,
    kind: str = "",
) -> list[str]:
    """Says why average precisions are 0 or None.

    Args:
        scores: {"AP", "APs", "APm", "APl", …} of boxes or of masks, fractions of 1; None where nothing is measured.
        facts: of all images that were scored.
        per_class: {class name: AP} of the same, if classes are to be explained too.
        kind: whether the scores are of "box", "mask" or "boundary", to be said; else they are just called AP.

    Returns:
        Sentences, the most likely cause first; empty where no score is 0 or None.
    """
    measure = f"{kind.capitalize()} AP".strip()
    if not facts.num_objects:
        return [*_reasons(facts, (_unknown_images, _unknown_categories)), _no_objects(facts)]
    if scores["AP"] is None:
        return [f"{measure} is None: the detections have none of what is scored, such as masks."]
    sentences = []
    if scores["AP"] < LOW_SCORE:
        sentences += _reasons(facts, _CAUSES) or [_low_precision(facts)]
    sentences += [
        f"{measure}{size} is None: there is no object {extent}, so there is nothing to measure; other tools print -1."
        for size, extent in _SIZES.items()
        if scores.get(f"AP{size}", 0) is None
    ]
    return sentences + _reasons_of_classes(per_class or {}, facts, measure)


def _reasons(facts: InstanceFacts, causes: Iterable[Callable[[InstanceFacts], str | None]]) -> list[str]:
    return [sentence for cause in causes if (sentence := cause(facts))]


def _no_objects(facts: InstanceFacts) -> str:
    regions = f", only {facts.num_ignored_regions} ignored regions" if facts.num_ignored_regions else ""
    return (
        f"All scores are None: there is no object in the annotations of {facts.num_images} images{regions}, so there "
        "is nothing to measure; other tools print -1."
    )


def _unknown_images(facts: InstanceFacts) -> str | None:
    ids = facts.unknown_image_ids
    if not ids:
        return None
    return (
        f"{len(ids)} image ids of the results are not in the annotations: {_listing(ids)}. The results belong to other "
        "annotations, or number the images differently."
    )


def _unknown_categories(facts: InstanceFacts) -> str | None:
    ids = facts.unknown_category_ids
    if not ids:
        return None
    return (
        f"{len(ids)} category ids of the results are not in the annotations: {_listing(ids)}; there are "
        f"{_listing(facts.label_map.raw_ids)}. Results need the ids of the annotations, not class indices."
    )


def _not_finite(facts: InstanceFacts) -> str | None:
    if not facts.not_finite:
        return None
    return (
        f"{facts.not_finite} of {facts.num_detections} detections have a score or box that is not finite: the model "
        "has diverged, or its weights are damaged."
    )


def _no_detections(facts: InstanceFacts) -> str | None:
    if facts.num_detections:
        return None
    return (
        f"There is no detection in {facts.num_images} images: every score was below the detector's score threshold. "
        "The model is not trained, does not have the weights it should have, or the threshold is too high."
    )


def _boxes_written_otherwise(facts: InstanceFacts) -> str | None:
    given = facts.covered[AS_GIVEN]
    reading, most = max(facts.covered.items(), key=lambda each: each[1])
    if most < max(3 * given, facts.num_objects / 4):
        return None
    return (
        f"The boxes look like {reading}: read so, {_share(most, facts.num_objects)} of the objects are overlapped by "
        f"half, as given {_share(given, facts.num_objects)}. They must be {AS_GIVEN} of the original image."
    )


def _only_in_ignored_regions(facts: InstanceFacts) -> str | None:
    if facts.in_ignored_regions <= 0.9 * facts.num_detections:
        return None
    return (
        f"{_share(facts.in_ignored_regions, facts.num_detections)} of the detections lie in ignored regions (iscrowd), "
        "where they count neither as right nor as wrong."
    )


def _only_classes_without_objects(facts: InstanceFacts) -> str | None:
    predicted = facts.detections_of_class > 0
    if not predicted.any() or facts.objects_of_class[predicted].any():
        return None
    return (
        f"All detections are of classes without any object: {_classes(facts, predicted)}. There are objects of "
        f"{_classes(facts, facts.objects_of_class > 0)}."
    )


def _other_classes(facts: InstanceFacts) -> str | None:
    own, some = facts.covered_by_shift[0], facts.covered[AS_GIVEN]
    if some < facts.num_objects / 4 or 3 * own > some:
        return None
    fits = (
        f"{_share(some, facts.num_objects)} of the objects are overlapped by half by some detection, "
        f"{_share(own, facts.num_objects)} by one of their class"
    )
    shift = max((-1, 1), key=lambda each: facts.covered_by_shift[each])
    shifted = facts.covered_by_shift[shift]
    if 2 * shifted < some:
        return f"Boxes fit, classes do not: {fits}. The model's classes may be in another order."
    return (
        f"Classes look shifted by one: {fits}, but {_share(shifted, facts.num_objects)} by one whose class index is 1 "
        f"too {'high' if shift > 0 else 'low'}. Class indices count from 0 and leave out background."
    )


def _beyond_images(facts: InstanceFacts) -> str | None:
    if facts.beyond_image <= facts.num_detections / 2:
        return None
    return (
        f"{_share(facts.beyond_image, facts.num_detections)} of the detections reach beyond their image: boxes are in "
        "pixels of another or of a resized image."
    )


def _other_scale(facts: InstanceFacts) -> str | None:
    few = facts.images_without_detections > facts.num_images / 2  # chance detections of a model without training
    if few or not facts.sides[0].any() or facts.covered[AS_GIVEN] > facts.num_objects / 10:
        return None
    detections, objects = facts.median_sides
    if 2 / 3 < detections / objects < 3 / 2:
        return None
    return (
        f"Detections have {detections / objects:.2g} times the side of objects ({detections:.2g} and {objects:.2g} "
        "pixels, medians): their boxes may be in pixels of a resized image."
    )


def _equal_scores(facts: InstanceFacts) -> str | None:
    if facts.num_detections < 2 or facts.lowest_score != facts.highest_score:
        return None
    return (
        f"All {facts.num_detections} detections have the same score, {facts.lowest_score:.3g}: their order says "
        "nothing. The model is not trained, or its scores were lost."
    )


def _only_one_class(facts: InstanceFacts) -> str | None:
    predicted, there = facts.detections_of_class > 0, facts.objects_of_class > 0
    if predicted.sum() != 1 or there.sum() < 2:
        return None
    return (
        f"All detections are of class {_classes(facts, predicted)}, while there are objects of {there.sum()} classes: "
        f"{_classes(facts, there)}."
    )


def _images_without_detections(facts: InstanceFacts) -> str | None:
    if not facts.num_detections or facts.images_without_detections <= facts.num_images / 2:
        return None
    return (
        f"{_share(facts.images_without_detections, facts.num_images)} of the images have no detection: their scores "
        "were below the detector's score threshold."
    )


def _no_overlap(facts: InstanceFacts) -> str | None:
    best = float(facts.best_iou_of_class.max())
    if not facts.num_detections or best >= HALF:
        return None
    return (
        "No detection's box overlaps an object of its class by half, the least that AP asks for; the largest overlap "
        f"is {best:.2f}. The model is not trained enough, or boxes are in the frame of another image."
    )


_CAUSES = (
    _unknown_images,
    _unknown_categories,
    _not_finite,
    _no_detections,
    _boxes_written_otherwise,
    _only_in_ignored_regions,
    _only_classes_without_objects,
    _other_classes,
    _beyond_images,
    _other_scale,
    _equal_scores,
    _only_one_class,
    _images_without_detections,
    _no_overlap,
)


def _low_precision(facts: InstanceFacts) -> str:
    return (
        f"{_share(facts.covered_by_shift[0], facts.num_objects)} of the objects are overlapped by half by the box of a "
        f"detection of their class, but too many others of the {facts.num_detections} detections have higher scores, "
        "or masks do not fit: the model is not trained enough."
    )


def _reasons_of_classes(per_class: Mapping[str, float | None], facts: InstanceFacts, measure: str) -> list[str]:
    row = {name: index for index, name in enumerate(facts.label_map.names)}
    missing = [name for name, score in per_class.items() if score is None]
    zero = [name for name, score in per_class.items() if score == 0]
    never = [name for name in zero if not facts.detections_of_class[row[name]]]
    apart = [name for name in zero if name not in never and facts.best_iou_of_class[row[name]] < HALF]
    others = [name for name in zero if name not in never and name not in apart]
    sentences = {
        "{} is 0 of {}, which have objects but no detection: {}.": never,
        "{} is 0 of {}, where no box overlaps an object by half: {}.": apart,
        "{} is 0 of {}, where wrong detections have higher scores or masks do not fit: {}.": others,
        "{} is None of {}, which have no object; other tools print -1: {}.": missing,
    }
    return [text.format(measure, _count(names), _listing(names)) for text, names in sentences.items() if names]


def explain_semantic_scores(confusion: ConfusionMatrix, unscored: Collection[str] = ()) -> list[str]:
    """Says why scores of label maps are 0 or None, or what looks like a mistake.

    Args:
        confusion: of all images that were scored.
        unscored: classes that are not meant to have a score.

    Returns:
        Sentences, the most likely cause first; empty where no score is 0 or None and nothing looks like a mistake.
    """
    if not confusion.num_images:
        return ["All scores are None: no image was scored."]
    if not confusion.matrix.any():
        return [
            f"All scores are None: all {confusion.num_ignored} pixels of {confusion.num_images} images are ignored "
            "(255), so there is nothing to measure. The values of the label pictures may not be those of the classes."
        ]
    scores = confusion.compute()
    sentences = [text for cause in (_shifted, _one_class_everywhere) if (text := cause(confusion))]
    if scores["mIoU"] < LOW_MEAN_IOU and not sentences:
        sentences.append(
            f"{scores['aAcc']:.1%} of the pixels are right: the model is not trained enough, does not have the weights "
            "it should have, or has its classes in another order."
        )
    return sentences + _reasons_of_labels(confusion, [name for name in scores["absent"] if name not in unscored])


def _shifted(confusion: ConfusionMatrix) -> str | None:
    score = _mean_iou(confusion.matrix, 0)
    shifted, shift = max((_mean_iou(confusion.matrix, each), each) for each in (-1, 1))
    if shifted < max(2 * score, score + 0.1):
        return None
    return (
        f"Predictions look shifted by one class: with 1 {'added to' if shift > 0 else 'taken from'} every predicted "
        f"class index mIoU would be {shifted:.3f} instead of {score:.3f}. The model and the label pictures may "
        "disagree on whether the value 0 is a class."
    )


def _mean_iou(matrix: np.ndarray, shift: int) -> float:
    """Mean IoU if a number were added to all predicted classes; those that leave the range match nothing."""
    num_classes = len(matrix)
    shifted = np.zeros_like(matrix)
    shifted[:, max(shift, 0) : num_classes + min(shift, 0)] = matrix[:, max(-shift, 0) : num_classes - max(shift, 0)]
    labelled, right = matrix.sum(axis=1), shifted.diagonal()
    present = labelled > 0
    return float((right[present] / (labelled + shifted.sum(axis=0) - right)[present]).mean())


def _one_class_everywhere(confusion: ConfusionMatrix) -> str | None:
    predicted = np.flatnonzero(confusion.matrix.sum(axis=0))
    num_labelled = int(confusion.matrix.any(axis=1).sum())
    if len(predicted) != 1 or num_labelled < 2:
        return None
    return (
        f"Every pixel is predicted as {confusion.label_map.names[predicted[0]]!r}, while {num_labelled} classes are "
        "labelled: the model is not trained, or its outputs are not finite."
    )


def _reasons_of_labels(confusion: ConfusionMatrix, absent: list[str]) -> list[str]:
    names, matrix = confusion.label_map.names, confusion.matrix
    zero = matrix.any(axis=1) & (matrix.diagonal() == 0)
    ever_predicted = matrix.any(axis=0)
    sentences = []
    if never := [names[index] for index in np.flatnonzero(zero & ~ever_predicted)]:
        sentences.append(f"IoU is 0 of {_count(never)}, which are labelled but never predicted: {_listing(never)}.")
    for index in np.flatnonzero(zero & ever_predicted)[:_NUM_SHOWN]:
        most = matrix[index].argmax()
        share = _share(int(matrix[index, most]), int(matrix[index].sum()))
        sentences.append(f"IoU of {names[index]!r} is 0: {share} of its pixels are predicted as {names[most]!r}.")
    if absent:
        sentences.append(
            f"Scores are None of {_count(absent)}, which no pixel is labelled as; they leave the means alone: "
            f"{_listing(absent)}."
        )
    return sentences


def _classes(facts: InstanceFacts, chosen: np.ndarray) -> str:
    return _listing([facts.label_map.names[index] for index in np.flatnonzero(chosen)])


def _count(names: Collection[str]) -> str:
    return "1 class" if len(names) == 1 else f"{len(names)} classes"


def _listing(values: Collection[object]) -> str:
    # A set has no order; of mixed ids the sorting is by what is written.
    ordered = sorted(map(repr, values)) if isinstance(values, set) else [repr(value) for value in values]
    more = [f"and {len(ordered) - _NUM_SHOWN} more"] if len(ordered) > _NUM_SHOWN else []
    return ", ".join(ordered[:_NUM_SHOWN] + more)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}"
