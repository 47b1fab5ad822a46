import copy
import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.coco_evaluation import METRIC_NAMES, CocoEvaluator
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.segmentations import parse_run_lengths
from swin_dense.datasets.shapes import CATEGORY_IDS, SHAPE_NAMES, write_shapes
from swin_dense.errors import ConfigError, DataError

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
    for each in scores["per_class"].values():
        assert {each[f"{kind}_{name}"] for kind in ("box", "mask") for name in ("AP", "AP50", "AP75", "AR100")} == {1.0}
        assert each["box_APl"] is None


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


@pytest.mark.parametrize("seed", [0, 1])
def test_evaluators_of_any_shards_in_any_order_merge_to_one(truth, seed):
    found, random = noisy(truth, 6), np.random.default_rng(seed)
    whole = evaluator_of(truth, found)
    shards = random.integers(0, 4, len(found))
    parts = []
    for shard in random.permutation(5).tolist():
        own = [image_id for image_id, number in zip(found, shards, strict=True) if number == shard]
        part = evaluator_of(truth, {image_id: found[image_id] for image_id in random.permutation(own).tolist()})
        parts.append(pickle.loads(pickle.dumps(part)))
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].num_detections == whole.num_detections
    assert parts[0].results() == whole.results() and parts[0].compute() == whole.compute()
    for kind in ("box", "mask"):
        assert np.array_equal(parts[0].accumulated(kind).scores, whole.accumulated(kind).scores)
    with pytest.raises(DataError, match=r"Both evaluators hold detections of 1, 2, 3.* and 50 more"):
        parts[0].merge(whole)


def test_nothing_of_a_mask_is_kept(truth, perfect):
    """60 bytes a detection, whatever its mask, and nothing of the ground truth that was scored."""
    evaluator = CocoEvaluator(truth, LABELS, keep_results=False)
    for image_id, detections in perfect.items():
        evaluator.add(image_id, *detections)
    empty = CocoEvaluator(truth, LABELS, keep_results=False)
    for image_id in perfect:
        empty.add(image_id, NO_BOXES, NO_SCORES, NO_LABELS, [])
    added = len(pickle.dumps(evaluator)) - len(pickle.dumps(empty))
    assert 0 < added < 60 * evaluator.num_detections
    masks = sum(len(rle["counts"]) for _, _, _, rles in perfect.values() for rle in rles)
    assert masks > 60 * evaluator.num_detections
    assert evaluator.compute() == evaluator_of(truth, perfect).compute()
    for refused in (evaluator.results, lambda: evaluator.write_results(None)):
        with pytest.raises(ConfigError, match="keep_results=False"):
            refused()


def test_written_results_are_those_listed(truth, perfect, tmp_path):
    evaluator = evaluator_of(truth, perfect)
    evaluator.write_results(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == evaluator.results()


def test_kinds_are_scored_alone_as_together(truth):
    found = noisy(truth, 7)
    together = evaluator_of(truth, found).compute()
    for kind in ("box", "mask"):
        evaluator = CocoEvaluator(truth, LABELS, kinds=[kind])
        for image_id, detections in found.items():
            evaluator.add(image_id, *detections)
        alone = evaluator.compute()
        assert set(alone) == {kind, "per_class"} and alone[kind] == together[kind]
    with pytest.raises(ConfigError, match="box is not scored: the kinds are mask, images came with masks"):
        evaluator.accumulated("box")
    with pytest.raises(ConfigError, match=r"kinds must be some of box, mask, boundary, got \['segm'\]"):
        CocoEvaluator(truth, LABELS, kinds=["segm"])


def test_boundaries_are_stricter_than_masks_and_perfect_ones_score_one(truth, perfect):
    images = truth["images"][:11]
    ids = {image["id"] for image in images}
    few = {**truth, "images": images, "annotations": [each for each in truth["annotations"] if each["image_id"] in ids]}
    scores = []
    for shift in (0, 1):
        evaluator = CocoEvaluator(few, LABELS, kinds=["mask", "boundary"])
        for image_id in ids:
            masks = [encode(np.roll(coco_mask.decode(rle), shift, axis=1)) for rle in perfect[image_id][3]]
            evaluator.add(image_id, *perfect[image_id][:3], masks)
        scores.append(evaluator.compute())
    assert scores[0]["boundary"]["AP"] == pytest.approx(1.0)
    assert 0.1 < scores[1]["boundary"]["AP"] < scores[1]["mask"]["AP"] - 0.1


def test_precision_of_a_curve_is_that_of_its_class(truth):
    evaluator = evaluator_of(truth, noisy(truth, 9))
    precision, per_class = evaluator.accumulated("box").precision, evaluator.compute()["per_class"]
    for label, name in enumerate(SHAPE_NAMES):
        assert precision[0, :, label, 0, -1].mean() == per_class[name]["box_AP50"]
        assert precision[:, :, label, 0, -1].mean() == pytest.approx(per_class[name]["box_AP"])


def test_no_detections_at_all_score_zero(truth):
    evaluator = evaluator_of(truth, {image["id"]: (NO_BOXES, NO_SCORES, NO_LABELS, []) for image in truth["images"]})
    scores = evaluator.compute()
    assert evaluator.num_detections == 0 and evaluator.results() == []
    assert scores["box"]["AP"] == scores["mask"]["AP"] == scores["box"]["AR100"] == 0.0
    assert all(each["box_AP"] == each["mask_AR100"] == 0.0 for each in scores["per_class"].values())


def test_class_without_objects_has_no_score(truth, perfect):
    fewer = copy.deepcopy(truth)
    fewer["annotations"] = [each for each in truth["annotations"] if each["category_id"] != 7]
    scores = evaluator_of(fewer, perfect).compute()
    assert set(scores["per_class"]["triangle"].values()) == {None}
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
    assert scores["per_class"]["star"]["box_AP"] == 1.0
    assert {scores["per_class"]["star"][f"mask_{name}"] for name in ("AP", "AP50", "APs", "AR100")} == {None}
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
