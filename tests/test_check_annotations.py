import json

import numpy as np
import pytest

from swin_dense.datasets.check_annotations import AnnotationChecker
from swin_dense.datasets.check_values import read_segmentation, segmentation_of

SIZE_HW = (41, 67)


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def checker():
    return AnnotationChecker("train", "a.json", {5: 0}, [SIZE_HW], {3: 0})


def annotation(number, polygon, **fields):
    x, y, side = polygon[0], polygon[1], polygon[2] - polygon[0]
    entry = {"id": number, "image_id": 5, "category_id": 3, "bbox": [x, y, side, side], "area": side * side}
    return {**entry, "iscrowd": 0, "segmentation": [polygon], **fields}


def test_facts_are_those_of_the_file():
    faces = checker()
    table = faces.check([annotation(7, square(3, 5, 11)), "x", annotation(8, square(20, 9, 13), area=None, iscrowd=1)])
    assert table.positions.tolist() == [0, 2] and table.labels.tolist() == [0, 0]
    assert table.boxes_xyxy.tolist() == table.extents_xyxy.tolist() == [[3, 5, 14, 16], [20, 9, 33, 22]]
    assert table.areas.tolist() == [121, 169] and table.is_crowd.tolist() == [False, True]
    assert [finding.kind for finding in faces.findings] == ["annotation-invalid", "area-missing"]


def test_habits_of_a_file_are_one_finding_with_their_count():
    faces = checker()
    entries = [annotation(number + 1, square(number, 5, 11)) for number in range(7)]
    for entry in entries:
        del entry["iscrowd"], entry["bbox"]
    faces.check(entries)
    assert [(finding.kind, finding.count) for finding in faces.findings] == [("crowd-missing", 7), ("box-missing", 7)]


def test_few_boxes_that_fit_as_corners_are_single_faults():
    entries = [annotation(number + 1, square(number, 5, 11)) for number in range(30)]
    entries[4]["bbox"] = [4, 5, 15, 16]
    faces = checker()
    faces.check(entries)
    assert [finding.kind for finding in faces.findings] == ["box-loose"]
    for number in (5, 6):
        entries[number]["bbox"] = [number, 5, number + 11, 16]
    faces = checker()
    faces.check(entries)
    assert [finding.kind for finding in faces.findings] == ["box-xyxy"] * 3


def test_annotations_of_images_of_unknown_size_are_checked_without_geometry():
    faces = AnnotationChecker("train", "a.json", {5: 0}, [None], {3: 0})
    faces.check([annotation(1, square(3, 5, 11), bbox=[900, 900, 5, 5]), annotation(1, square(3, 5, 11), area="x")])
    assert [finding.kind for finding in faces.findings] == ["area-invalid", "annotation-id-repeated"]


def test_progress_ends_with_all():
    told = []
    checker().check(
        [annotation(number + 1, square(3, 5, 11), area=120 + number) for number in range(9)], lambda *s: told.append(s)
    )
    assert told == [(0, 9), (9, 9)]


@pytest.mark.parametrize("sliver", [[3.6, 2, 3.8, 2, 3.8, 30, 3.6, 30], [2, 3.6, 30, 3.6, 30, 3.8, 2, 3.8]])
def test_slivers_between_pixels_are_drawn_before_they_are_judged(sliver):
    faces = checker()
    faces.check([annotation(1, sliver, bbox=[2, 2, 28, 28], area=5)])
    kinds = {finding.kind for finding in faces.findings}
    drawn = read_segmentation([sliver], SIZE_HW).run_lengths(SIZE_HW)[1::2].sum()
    assert ("mask-empty" in kinds) == (drawn == 0)


def test_polygons_and_run_lengths_of_one_mask_give_one_box():
    polygon = read_segmentation([square(3, 5, 11)], SIZE_HW)
    runs = polygon.run_lengths(SIZE_HW)
    again = read_segmentation({"size": list(SIZE_HW), "counts": runs.tolist()}, SIZE_HW)
    assert (again.run_lengths(SIZE_HW) == runs).all() and again.faults == polygon.faults == []
    entry = annotation(1, square(3, 5, 11), segmentation={"size": list(SIZE_HW), "counts": runs.tolist()})
    faces = checker()
    assert faces.check([entry]).extents_xyxy.tolist() == [[3, 5, 14, 16]] and not faces.findings


def test_findings_do_not_grow_with_good_annotations():
    entries = json.loads(json.dumps([annotation(number + 1, square(number % 50, 5, 7)) for number in range(500)]))
    for number, entry in enumerate(entries):
        entry["segmentation"][0][1] += number / 1e4  # so that none is repeated
    faces = checker()
    facts = faces.check(entries)
    assert not faces.findings and len(facts.positions) == 500 and not np.isnan(facts.extents_xyxy).any()


@pytest.mark.parametrize("segmentation", [None, [], {}])
def test_ignored_region_may_have_its_box_alone(segmentation):
    faces = checker()
    entry = annotation(1, square(3, 5, 11), segmentation=segmentation, ignore=1)
    facts = faces.check([entry])
    assert not faces.findings and facts.is_crowd.tolist() == [True] and facts.extents_xyxy.tolist() == [[3, 5, 14, 16]]
    assert segmentation_of({**entry, "bbox": None}, SIZE_HW).faults[0][0] == "segmentation-missing"
    faces = checker()
    faces.check([{**entry, "ignore": "yes"}])
    assert {finding.kind for finding in faces.findings} >= {"ignore-invalid"}
