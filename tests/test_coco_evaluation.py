import copy
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.coco_evaluation import METRIC_NAMES, CocoEvaluator
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.segmentations import parse_run_lengths
from swin_dense.datasets.shapes import CATEGORY_IDS, SHAPE_NAMES, write_shapes
from swin_dense.errors import DataError

LABELS = LabelMap(names=SHAPE_NAMES, raw_ids=CATEGORY_IDS)
NO_BOXES, NO_SCORES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    paths = write_shapes(tmp_path_factory.mktemp("shapes"), num_training=60, num_validation=1)
    return json.loads(paths.training.annotation_file.read_text())


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def indexed(truth):
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    coco.createIndex()
    return coco


@pytest.fixture(scope="module")
def perfect(truth):
    """image id -> (boxes, scores, labels, masks_rle) that repeat the ground truth without its crowds."""
    coco = indexed(truth)
    found = {}
    for image in truth["images"]:
        annotations = [each for each in coco.imgToAnns[image["id"]] if not each["iscrowd"]]
        boxes = np.array([each["bbox"] for each in annotations], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([CATEGORY_IDS.index(each["category_id"]) for each in annotations], dtype=np.int64)
        rles = [coco.annToRLE(each) for each in annotations]
        found[image["id"]] = (boxes, np.full(len(labels), 0.9, np.float32), labels, rles)
    return found


def noisy(truth, seed):
    """Shifted, missed, doubled, wrongly named and invented detections, with equal scores among them."""
    random = np.random.default_rng(seed)
    found = {}
    for image in truth["images"]:
        height, width = image["height"], image["width"]
        boxes, labels, rles = [], [], []
        for each in truth["annotations"]:
            if each["image_id"] != image["id"]:
                continue
            for _ in range(random.integers(0, 3)):
                x, y, w, h = np.array(each["bbox"]) + random.normal(0, 2, 4)
                boxes.append((x, y, x + max(w, 1), y + max(h, 1)))
                labels.append(CATEGORY_IDS.index(each["category_id"]) if random.random() < 0.8 else 0)
        for _ in range(random.integers(0, 3)):
            x, y = random.uniform(0, width - 9), random.uniform(0, height - 9)
            boxes.append((x, y, x + random.uniform(3, 60), y + random.uniform(3, 60)))
            labels.append(int(random.integers(6)))
        for x1, y1, x2, y2 in boxes:
            mask = np.zeros((height, width), np.uint8)
            mask[max(int(y1), 0) : int(y2), max(int(x1), 0) : int(x2)] = 1
            rles.append(encode(mask))
        scores = random.integers(1, 20, len(boxes)).astype(np.float32) / np.float32(20)
        found[image["id"]] = (
            np.array(boxes, np.float32).reshape(-1, 4),
            scores,
            np.array(labels, np.int64),
            rles,
        )
    return found


def evaluator_of(truth, found, labels=LABELS):
    evaluator = CocoEvaluator(truth, labels)
    for image_id, detections in found.items():
        evaluator.add(image_id, *detections)
    return evaluator


def plain_pycocotools(truth, results, kind):
    coco = indexed(truth)
    dropped = {"bbox": "segmentation", "segm": "bbox"}[kind]
    kept = [{key: value for key, value in each.items() if key != dropped} for each in copy.deepcopy(results)]
    evaluation = COCOeval(coco, coco.loadRes(kept), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_plain_pycocotools_to_the_last_digit(truth, seed):
    assert any(each["iscrowd"] for each in truth["annotations"])
    evaluator = evaluator_of(truth, noisy(truth, seed))
    scores = evaluator.compute()
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        evaluation = plain_pycocotools(truth, evaluator.results(), kind)
        assert list(scores[name]) == list(METRIC_NAMES)
        assert [-1.0 if value is None else value for value in scores[name].values()] == list(evaluation.stats)
        for row, raw_id in enumerate(sorted(CATEGORY_IDS)):
            precision = evaluation.eval["precision"][:, :, row, 0, 2]
            class_name = SHAPE_NAMES[CATEGORY_IDS.index(raw_id)]
            assert scores["per_class"][class_name][f"{name}_AP"] == precision[precision > -1].mean()
    assert 0.02 < scores["box"]["AP"] < 0.9 and 0.02 < scores["mask"]["AP"] < 0.9


def test_perfect_detections_score_one(truth, perfect):
    scores = evaluator_of(truth, perfect).compute()
    for kind in ("box", "mask"):
        assert all(scores[kind][name] == 1.0 for name in ("AP", "AP50", "AP75", "APs", "APm", "AR100"))
        assert scores[kind]["APl"] is None and scores[kind]["ARl"] is None
    assert all(each == {"box_AP": 1.0, "mask_AP": 1.0} for each in scores["per_class"].values())


def test_every_id_may_start_at_zero(truth, perfect):
    shifted = copy.deepcopy(truth)
    first_image = min(image["id"] for image in truth["images"])
    for image in shifted["images"]:
        image["id"] -= first_image
    for each in shifted["annotations"]:
        each["id"] -= 1
        each["image_id"] -= first_image
        each["category_id"] -= 1
    for category in shifted["categories"]:
        category["id"] -= 1
    assert min(each["id"] for each in shifted["annotations"]) == 0
    found = {image_id - first_image: detections for image_id, detections in perfect.items()}
    labels = LabelMap(names=SHAPE_NAMES, raw_ids=tuple(raw_id - 1 for raw_id in CATEGORY_IDS))
    assert labels.raw_ids[0] == 0
    scores = evaluator_of(shifted, found, labels).compute()
    assert scores == evaluator_of(truth, perfect).compute()
    assert scores["box"]["AP"] == scores["mask"]["AP"] == 1.0


def test_missing_area_box_and_crowd_flag_are_filled_in(truth):
    found = noisy(truth, 4)
    bare = copy.deepcopy(truth)
    coco = indexed(truth)
    for each in bare["annotations"]:
        each["area"] = float(coco_mask.area(coco.annToRLE(each)))
    expected = evaluator_of(bare, found).compute()["mask"]
    for each in bare["annotations"]:
        del each["area"], each["bbox"]
        if not each["iscrowd"]:
            del each["iscrowd"]
    assert evaluator_of(bare, found).compute()["mask"] == expected


def test_order_of_images_does_not_matter(truth):
    found = noisy(truth, 5)
    backwards = dict(reversed(found.items()))
    assert evaluator_of(truth, found).compute() == evaluator_of(truth, backwards).compute()


def test_merged_evaluators_equal_one(truth):
    found = noisy(truth, 6)
    whole = evaluator_of(truth, found)
    even = evaluator_of(truth, {key: value for key, value in found.items() if key % 2 == 0})
    even.merge(evaluator_of(truth, {key: value for key, value in found.items() if key % 2}))
    assert even.results() == whole.results() and even.compute() == whole.compute()
    with pytest.raises(DataError, match=r"Both evaluators hold detections of 1, 2, 3.* and 50 more"):
        even.merge(whole)


def test_no_detections_at_all_score_zero(truth):
    evaluator = evaluator_of(truth, {image["id"]: (NO_BOXES, NO_SCORES, NO_LABELS, []) for image in truth["images"]})
    scores = evaluator.compute()
    assert evaluator.num_detections == 0 and evaluator.results() == []
    assert scores["box"]["AP"] == scores["mask"]["AP"] == scores["box"]["AR100"] == 0.0
    assert all(each == {"box_AP": 0.0, "mask_AP": 0.0} for each in scores["per_class"].values())


def test_class_without_objects_has_no_score(truth, perfect):
    fewer = copy.deepcopy(truth)
    fewer["annotations"] = [each for each in truth["annotations"] if each["category_id"] != 7]
    scores = evaluator_of(fewer, perfect).compute()
    assert scores["per_class"]["triangle"] == {"box_AP": None, "mask_AP": None}
    assert scores["box"]["AP"] == 1.0


def test_detections_on_crowds_cost_nothing(truth, perfect):
    found = dict(perfect)
    crowd = next(each for each in truth["annotations"] if each["iscrowd"])
    boxes, scores, labels, rles = found[crowd["image_id"]]
    x, y, w, h = crowd["bbox"]
    found[crowd["image_id"]] = (
        np.concatenate([boxes, np.array([(x, y, x + w, y + h)] * 2, np.float32)]),
        np.concatenate([scores, np.array([0.99, 0.98], np.float32)]),
        np.concatenate([labels, [CATEGORY_IDS.index(crowd["category_id"])] * 2]),
        [*rles, *[coco_mask.frPyObjects(crowd["segmentation"], *crowd["segmentation"]["size"])] * 2],
    )
    scores = evaluator_of(truth, found).compute()
    assert scores["box"]["AP"] == scores["mask"]["AP"] == 1.0


def test_without_masks_only_boxes_are_scored(truth, perfect):
    boxes_only = copy.deepcopy(truth)
    for each in boxes_only["annotations"]:
        del each["segmentation"]
    scores = evaluator_of(boxes_only, {key: (*value[:3], None) for key, value in perfect.items()}).compute()
    assert scores["box"]["AP"] == 1.0
    assert set(scores["mask"].values()) == {None}
    assert scores["per_class"]["star"] == {"box_AP": 1.0, "mask_AP": None}
    with pytest.raises(DataError, match=r"An object of image \d+ has no segmentation.*masks_rle=None"):
        evaluator_of(boxes_only, perfect).compute()


def test_nothing_is_printed_and_nothing_of_the_caller_changes(truth, perfect, capsys):
    before, found = copy.deepcopy(truth), copy.deepcopy(perfect)
    evaluator = evaluator_of(truth, found)
    assert evaluator.compute() == evaluator.compute()
    evaluator.results()[0]["bbox"][0] = -5.0
    assert evaluator.results()[0]["bbox"][0] >= 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert truth == before
    for image_id, detections in perfect.items():
        assert all(np.array_equal(a, b) for a, b in zip(detections[:3], found[image_id][:3], strict=True))
        assert detections[3] == found[image_id][3]


def test_results_are_plain_json_in_raw_ids(truth, perfect):
    results = evaluator_of(truth, perfect).results()
    assert json.loads(json.dumps(results)) == results
    assert {each["category_id"] for each in results} == set(CATEGORY_IDS)
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_rle_counts_may_be_text_bytes_or_numbers(truth, perfect):
    image = next(image for image in truth["images"] if len(perfect[image["id"]][2]))
    boxes, scores, labels, rles = perfect[image["id"]]
    runs = [parse_run_lengths(rle, tuple(rle["size"])).tolist() for rle in rles]
    as_numbers = [{"size": rle["size"], "counts": each} for rle, each in zip(rles, runs, strict=True)]
    as_bytes = [coco_mask.frPyObjects(each, *each["size"]) for each in as_numbers]
    as_text = [{"size": each["size"], "counts": each["counts"].decode()} for each in as_bytes]
    listed = []
    for variant in (as_bytes, as_text, as_numbers):
        evaluator = CocoEvaluator(truth, LABELS)
        evaluator.add(image["id"], boxes, scores, labels, variant)
        listed.append(evaluator.results())
    assert listed[0] == listed[1] == listed[2]


def test_missing_and_repeated_and_unknown_images_are_named(truth, perfect):
    evaluator = CocoEvaluator(truth, LABELS)
    evaluator.add(1, *perfect[1])
    with pytest.raises(DataError, match=r"59 of 60 images have no detections: 2, 3, 4, .* and 49 more"):
        evaluator.compute()
    with pytest.raises(DataError, match="image 1 were added twice"):
        evaluator.add(1, *perfect[1])
    with pytest.raises(DataError, match="Image id 999 is not in the ground truth, which has 60 images"):
        evaluator.add(999, *perfect[1])


GOOD = {
    "boxes_xyxy": np.array([[1.0, 2, 30, 40], [5, 5, 9, 9]], np.float32),
    "scores": np.array([0.5, 0.25], np.float32),
    "labels": np.array([0, 5]),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boxes_xyxy", np.array([[1, 2, 3, 4], [5, 5, np.nan, 9]]), r"image 1: box 1 is not finite.*nan"),
        ("boxes_xyxy", np.array([[1, 2, np.inf, 4], [5, 5, 9, 9]]), "box 0 is not finite.*inf"),
        ("boxes_xyxy", np.array([[9, 2, 3, 4], [5, 5, 9, 9]]), "box 0 is .*wanted x1, y1, x2, y2"),
        ("boxes_xyxy", np.ones((2, 5)), r"wanted boxes \(N, 4\).* got \(2, 5\)"),
        ("scores", np.array([np.nan, 0.5]), "score 0 is not finite: nan"),
        ("scores", np.array([0.5]), r"got \(2, 4\), \(1,\) and \(2,\)"),
        ("labels", np.array([0, 6]), "labels reach from 0 to 6, wanted 0 to 5"),
        ("labels", np.array([-1, 5]), "labels reach from -1 to 5"),
        ("labels", np.array([0.0, 5.0]), "labels must be integers, got float64"),
        ("masks_rle", [], "2 boxes but 0 masks"),
        ("masks_rle", [{"size": [3, 5], "counts": "?0"}] * 2, "mask 0: segmentation size must be"),
        ("masks_rle", [{"size": None, "counts": "zzz"}] * 2, "mask 0: counts"),
        ("masks_rle", [{"size": None, "counts": [1, 2]}] * 2, r"mask 0: counts must add up"),
    ],
)
def test_bad_detections_are_named(truth, field, value, message):
    size = [truth["images"][0]["height"], truth["images"][0]["width"]]
    detections = {**GOOD, "masks_rle": [encode(np.ones(size))] * 2}
    if field == "masks_rle":
        value = [{**rle, "size": rle["size"] or size} for rle in value]
    with pytest.raises(DataError, match=message):
        CocoEvaluator(truth, LABELS).add(1, **{**detections, field: value})


def test_masks_come_everywhere_or_nowhere(truth):
    evaluator = CocoEvaluator(truth, LABELS)
    evaluator.add(1, NO_BOXES, NO_SCORES, NO_LABELS, [])
    with pytest.raises(DataError, match="Image 2 comes without masks, the images before it with"):
        evaluator.add(2, NO_BOXES, NO_SCORES, NO_LABELS, None)
    other = CocoEvaluator(truth, LABELS)
    other.add(2, NO_BOXES, NO_SCORES, NO_LABELS, None)
    with pytest.raises(DataError, match="Only one of the two evaluators holds masks"):
        evaluator.merge(other)


def test_label_map_of_other_categories_is_refused(truth):
    with pytest.raises(DataError, match=r"category ids \[1, 3, 7, 12, 20, 90\], the label map \[0, 1\]"):
        CocoEvaluator(truth, LabelMap(names=("a", "b"), raw_ids=(0, 1)))
