import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.coco_results import as_detections, read_results, read_results_truth
from swin_dense.errors import AnnotationError

TRUTH = {
    "images": [{"id": 0, "height": 31, "width": 47}, {"id": 9, "height": 37, "width": 23}],
    "categories": [{"id": 90, "name": "cup"}, {"id": 1, "name": "dog"}],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 90, "bbox": [3, 5, 11, 7]},
        {"id": 1, "image_id": 9, "category_id": 1, "segmentation": [[3, 5, 14, 5, 14, 12]], "iscrowd": 0, "area": 9.5},
    ],
}
RUNS = {"size": [31, 47], "counts": [100, 7, 31 * 47 - 107]}
RESULTS = [
    {"image_id": 9, "category_id": 1, "bbox": [3, 5, 11.5, 7], "score": 0.25},
    {"image_id": 0, "category_id": 90, "bbox": [0, 0, 0, 7], "score": 1},
    {"image_id": 9, "category_id": 90, "bbox": [1, 2, 3, 4], "score": 0.25},
]


def written(tmp_path, content, name="results.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def truth_of(tmp_path, content=TRUTH):
    return read_results_truth(written(tmp_path, content, "truth.json"))


def test_truth_needs_neither_files_nor_masks_nor_areas(tmp_path):
    truth = truth_of(tmp_path)
    assert truth.content == TRUTH and truth.image_ids == [0, 9] and not truth.has_masks
    assert truth.label_map.names == ("dog", "cup") and truth.label_map.raw_ids == (1, 90)
    assert truth.only([9]).content["annotations"] == TRUTH["annotations"][1:]
    assert truth.only([9]).image_ids == [9]


def test_truth_has_masks_where_only_regions_to_ignore_lack_them(tmp_path):
    content = copy.deepcopy(TRUTH)
    content["annotations"][0]["ignore"] = 1
    assert truth_of(tmp_path, content).has_masks


def test_results_come_back_by_image_in_the_order_of_the_file(tmp_path):
    found = read_results(written(tmp_path, RESULTS), truth_of(tmp_path))
    assert found == {9: [RESULTS[0], RESULTS[2]], 0: [RESULTS[1]]}
    assert read_results(written(tmp_path, []), truth_of(tmp_path)) == {}


def test_run_lengths_may_be_numbers(tmp_path):
    masks = [{"image_id": 0, "category_id": 90, "segmentation": RUNS, "score": 0.5}]
    assert read_results(written(tmp_path, masks), truth_of(tmp_path)) == {0: masks}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("images", {"id": "0"}, r"images\[0\]: id must be a whole number"),
        ("images", {"height": None}, "image id=0: height must be a whole number of pixels, at least 1, got None"),
        ("images", {"id": 9}, "image id=9 stands twice"),
        ("annotations", {"image_id": 5}, "annotation id=0: image_id 5 is not among the images"),
        ("annotations", {"category_id": 2}, "annotation id=0: category_id 2 is not among the categories"),
        ("annotations", {"bbox": None}, "neither a bbox nor a segmentation"),
        ("annotations", {"bbox": [3, 5, float("inf"), 7]}, "bbox must be four finite numbers"),
        ("annotations", {"area": "9"}, "area must be a finite number, got '9'"),
        ("annotations", {"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
        ("annotations", {"segmentation": [[1, 2, 3, 4]]}, "at least 3 points"),
    ],
)
def test_bad_truth_is_named(tmp_path, section, change, message):
    content = copy.deepcopy(TRUTH)
    content[section][0].update(change)
    with pytest.raises(AnnotationError, match=message):
        truth_of(tmp_path, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 4}, "1 values of image_id are not in the images .* 4; there are 0, 9. .* the results belong to"),
        ({"category_id": 0}, "category_id are not in the categories .* 0; there are 1, 90. .* not class indices"),
        ({"category_id": True}, "category_id are not in the categories"),
        ({"score": float("nan")}, r"result \[1\]: score must be a finite number, got nan"),
        ({"score": None}, "score must be a finite number"),
        ({"bbox": [1, 2, 3]}, r"result \[1\]: bbox must be four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "width and height must not be negative"),
        ({"bbox": None}, "bbox is missing, but the first result has it"),
    ],
)
def test_bad_results_are_named(tmp_path, change, message):
    results = copy.deepcopy(RESULTS)
    results[1].update(change)
    with pytest.raises(AnnotationError, match=message):
        read_results(written(tmp_path, results), truth_of(tmp_path))


def test_missing_score_is_named(tmp_path):
    results = copy.deepcopy(RESULTS)
    del results[1]["score"]
    with pytest.raises(AnnotationError, match=r"result \[1\]: it has no score"):
        read_results(written(tmp_path, results), truth_of(tmp_path))


@pytest.mark.parametrize(
    ("counts", "message"),
    [([100, 7], "must add up to"), ("garbage~", "counts"), (None, "counts must be text or a list")],
)
def test_bad_masks_are_named(tmp_path, counts, message):
    truth = truth_of(tmp_path)
    masks = [
        {"image_id": 0, "category_id": 90, "segmentation": run, "score": 0.5}
        for run in (RUNS, {**RUNS, "counts": counts})
    ]
    found = read_results(written(tmp_path, masks), truth)
    with pytest.raises(AnnotationError, match=f"mask 1.*{message}"):
        as_detections(found[0], truth.label_map, (31, 47), ["mask"])


def shapes_and_results(fields, seed=0):
    """Shapes as annotations, and as results moved a little; the sides are such that sizes by box and by mask differ."""
    generator = np.random.default_rng(seed)
    images = [{"id": number, "height": 131, "width": 157} for number in (4, 2)]
    annotations, results = [], []
    for number in range(24):
        x, y, width, height = generator.uniform([0, 0, 25, 25], [60, 40, 90, 90])
        for target, move in ((annotations, 0.0), (results, generator.uniform(-6, 6))):
            corners = [x + move, y, x + move + width, y, x + move, y + height]
            mask = coco_mask.merge(coco_mask.frPyObjects([np.clip(corners, 0, 131).tolist()], 131, 157))
            entry = {
                "image_id": images[number % 2]["id"],
                "category_id": 1 + number % 3,
                "bbox": [x + move, y, width, height],
                "segmentation": {"size": [131, 157], "counts": mask["counts"].decode()},
            }
            target.append(entry)
        annotations[-1].update(id=number + 1, area=float(coco_mask.area(mask)), iscrowd=int(number == 7))
        results[-1] = {name: results[-1][name] for name in ("image_id", "category_id", *fields)}
        results[-1]["score"] = float(generator.integers(1, 9)) / 8
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize("fields", [("bbox",), ("segmentation",), ("bbox", "segmentation")])
def test_scores_of_a_file_are_pycocotools_to_the_last_digit(tmp_path, fields):
    content, results = shapes_and_results(fields)
    truth = truth_of(tmp_path, content)
    found = read_results(written(tmp_path, results), truth)
    kinds = [{"bbox": "box", "segmentation": "mask"}[field] for field in fields]
    evaluator = CocoEvaluator(truth.content, truth.label_map, kinds=kinds)
    for image_id in truth.image_ids:
        evaluator.add_detections(as_detections(found[image_id], truth.label_map, (131, 157), kinds), image_id)
    scores = evaluator.compute()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        loaded = coco.loadRes(str(tmp_path / "results.json"))
        for kind in kinds:
            evaluation = COCOeval(coco, loaded, {"box": "bbox", "mask": "segm"}[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ours = [-1.0 if value is None else value for value in scores[kind].values()]
            assert ours == list(evaluation.stats)
            assert 0.05 < ours[0] < 0.95 and ours[3] > -1 and ours[4] > -1


def test_boxes_of_masks_are_those_around_them(tmp_path):
    truth = truth_of(tmp_path)
    masks = [{"image_id": 0, "category_id": 90, "segmentation": RUNS, "score": 0.5}]
    alone = as_detections(masks, truth.label_map, (31, 47), ["box"])
    assert alone.masks is None and alone.boxes_xywh.tolist() == [
        coco_mask.toBbox(coco_mask.frPyObjects(RUNS, 31, 47)).tolist()
    ]
    assert as_detections([], truth.label_map, (31, 47), ["box", "mask"]).masks == []
    assert as_detections([], truth.label_map, (31, 47), ["box"]).masks is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TRUTH, "wanted a results file, a list of detections; got an annotation file"),
        ({"detections": []}, "got dict"),
        ([1, 2], "got list"),
        ("", "the file is empty"),
        ('[{"image_id": 9, ', "cut short"),
        ("[" * 200000, "nested too deeply"),
        ([{"image_id": 9, "category_id": 1, "score": 0.5}], "needs bbox, segmentation or both"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(AnnotationError, match=message):
        read_results(written(tmp_path, content), truth_of(tmp_path))
