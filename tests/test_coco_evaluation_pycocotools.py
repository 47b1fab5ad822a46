"""The evaluator beside pycocotools on random sets, hard on purpose: every array must be equal to the last bit."""

import contextlib
import io
from dataclasses import dataclass

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.coco_accumulation import METRIC_NAMES
from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.labels import LabelMap

SIZES_HW = ((113, 149), (101, 97), (47, 131), (31, 37))
NUM_FAST = 60


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


@dataclass
class RandomSet:
    """Ground truth and detections of a few images.

    Attributes:
        truth: as the evaluator takes it.
        repaired: the same as pycocotools needs it: ids from 1, area and crowd flag there, ignored regions as crowds.
        found: image id -> (boxes_xyxy, scores, labels, masks).
    """

    truth: dict
    repaired: dict
    found: dict
    label_map: LabelMap


class Scenery:
    """Draws objects and detections; scores are of few values, objects often of the sizes where the ranges meet."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def box(self, size_hw):
        height, width = size_hw
        sides = self.random.choice([(32, 32), (96, 96), (9, 13), (31, 33), (0, 0)], p=[0.25, 0.2, 0.2, 0.2, 0.15])
        if not sides[0]:
            sides = self.random.integers(1, (width, height), endpoint=True)
        box_width, box_height = np.minimum(sides, (width, height)).tolist()
        left = int(self.random.integers(0, width - box_width, endpoint=True))
        top = int(self.random.integers(0, height - box_height, endpoint=True))
        return left, top, box_width, box_height

    def mask(self, size_hw, box):
        left, top, width, height = box
        mask = np.zeros(size_hw, np.uint8)
        mask[top : top + height, left : left + width] = 1
        if self.random.random() < 0.5:
            mask[top : top + height, left : left + width] &= self.random.random((height, width)) < 0.9
        return mask

    def shifted(self, box, size_hw):
        left, top, width, height = (np.array(box) + self.random.integers(-3, 4, 4)).tolist()
        left, top = min(max(left, 0), size_hw[1] - 1), min(max(top, 0), size_hw[0] - 1)
        return left, top, min(max(width, 1), size_hw[1] - left), min(max(height, 1), size_hw[0] - top)

    def annotation(self, number, image, category_id):
        size_hw = (image["height"], image["width"])
        left, top, width, height = box = self.box(size_hw)
        mask = encode(self.mask(size_hw, box))
        form = self.random.integers(3)
        if form == 0:
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            segmentation = [[float(corner) for corner in corners]]
            mask = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size_hw))
        elif form == 1:
            segmentation = {"size": list(size_hw), "counts": mask["counts"].decode()}
        else:
            text = coco_mask.decode(mask).ravel(order="F")
            changes = np.flatnonzero(np.diff(text, prepend=0))
            counts = np.diff(changes, prepend=0, append=len(text)).tolist()
            segmentation = {"size": list(size_hw), "counts": counts}
        exact = {
            "id": number,
            "image_id": image["id"],
            "category_id": category_id,
            "bbox": [float(left), float(top), float(width), float(height)],
            "area": float(self.random.choice([width * height, int(coco_mask.area(mask)), 1024, 9216])),
            "iscrowd": int(self.random.random() < 0.15),
            "segmentation": segmentation,
        }
        given = dict(exact)
        if self.random.random() < 0.2:
            del given["area"]
            exact["area"] = float(coco_mask.area(mask))
        if not exact["iscrowd"] and self.random.random() < 0.2:
            del given["iscrowd"]
        if self.random.random() < 0.1:
            given["ignore"] = exact["iscrowd"] = 1
        return given, exact

    def detections(self, image, annotations, label_of):
        size_hw = (image["height"], image["width"])
        kind = self.random.random()
        if kind < 0.2:
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), []
        count = 130 if kind > 0.93 else int(self.random.integers(1, 25))
        boxes, labels, masks = [], [], []
        for _ in range(count):
            if boxes and self.random.random() < 0.1:
                place = int(self.random.integers(len(boxes)))
                box, label, mask = boxes[place], labels[place], masks[place]
            elif annotations and self.random.random() < 0.7:
                annotation = annotations[int(self.random.integers(len(annotations)))]
                box, label = self.shifted([int(x) for x in annotation["bbox"]], size_hw), annotation["category_id"]
                label, mask = label_of[label], encode(self.mask(size_hw, box))
            else:
                box = self.box(size_hw)
                label, mask = int(self.random.integers(len(label_of))), encode(self.mask(size_hw, box))
            boxes.append(box)
            labels.append(0 if count == 130 else label)
            masks.append(mask)
        corners = np.array(boxes, np.float32)
        corners += self.random.choice([0, 0.37], corners.shape).astype(np.float32)
        corners[:, 2:] += corners[:, :2]
        scores = (self.random.integers(0, 9, count) / 8 - 0.25).astype(np.float32)
        return corners, scores, np.array(labels), masks


def random_set(seed):
    scenery = Scenery(seed)
    random = scenery.random
    first = int(random.integers(2))
    raw_ids = random.permutation([first, 7, 3, 90])[: random.integers(1, 5)].tolist()
    label_map = LabelMap(names=tuple(f"class {raw_id}" for raw_id in raw_ids), raw_ids=tuple(raw_ids))
    label_of = {raw_id: index for index, raw_id in enumerate(raw_ids)}
    used = raw_ids[: max(1, len(raw_ids) - int(random.integers(2)))]
    images = [
        {"id": int(image_id), "height": height, "width": width}
        for image_id, (height, width) in zip(random.permutation(5)[: random.integers(1, 5)], SIZES_HW, strict=False)
    ]
    pairs, found = [], {}
    for image in images:
        for _ in range(random.choice([0, 1, 3, 9])):
            pairs.append(scenery.annotation(len(pairs) + first, image, int(random.choice(used))))
        own = [exact for _, exact in pairs if exact["image_id"] == image["id"]]
        found[image["id"]] = scenery.detections(image, own, label_of)
    categories = [{"id": raw_id, "name": f"class {raw_id}"} for raw_id in raw_ids]
    truth = {"images": images, "categories": categories, "annotations": [given for given, _ in pairs]}
    exact = [{**exact, "id": number} for number, (_, exact) in enumerate(pairs, start=1)]
    return RandomSet(truth, {**truth, "annotations": exact}, found, label_map)


def indexed(content):
    coco = COCO()
    coco.dataset = {**content, "annotations": [dict(each) for each in content["annotations"]]}
    coco.createIndex()
    return coco


def pycocotools_of(case, kind):
    field = {"box": "bbox", "mask": "segmentation"}[kind]
    results = []
    for image_id in sorted(case.found):
        for box, score, label, mask in zip(*case.found[image_id], strict=True):
            left, top, right, bottom = (float(side) for side in box)
            shape = {"bbox": [left, top, right - left, bottom - top], "segmentation": mask}[field]
            category_id = case.label_map.raw_ids[label]
            results.append({"image_id": image_id, "category_id": category_id, "score": float(score), field: shape})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = indexed(case.repaired)
        found = truth.loadRes(results) if results else indexed({**case.repaired, "annotations": []})
        evaluation = COCOeval(truth, found, {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def require_equal(seed):
    case = random_set(seed)
    evaluator = CocoEvaluator(case.truth, case.label_map)
    for image_id in np.random.default_rng(seed).permutation(list(case.found)).tolist():
        evaluator.add(image_id, *case.found[image_id])
    scores = evaluator.compute()
    order = np.argsort(case.label_map.raw_ids)
    for kind in ("box", "mask"):
        expected, accumulated = pycocotools_of(case, kind), evaluator.accumulated(kind)
        assert [-1.0 if value is None else value for value in scores[kind].values()] == list(expected.stats), seed
        assert np.array_equal(accumulated.precision[:, :, order], expected.eval["precision"]), seed
        assert np.array_equal(accumulated.recall[:, order], expected.eval["recall"]), seed
        assert np.array_equal(accumulated.scores[:, :, order], expected.eval["scores"]), seed


@pytest.mark.parametrize("seed", range(NUM_FAST))
def test_random_sets_score_as_in_pycocotools_to_the_last_bit(seed):
    require_equal(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_2000_random_sets_score_as_in_pycocotools_to_the_last_bit(block):
    for seed in range(NUM_FAST + 100 * block, NUM_FAST + 100 * (block + 1)):
        require_equal(seed)


def test_random_sets_hold_every_hard_case():
    cases = [random_set(seed) for seed in range(NUM_FAST)]
    annotations = [each for case in cases for each in case.truth["annotations"]]
    found = [detections for case in cases for detections in case.found.values()]
    assert {each["id"] for each in annotations} >= {0, 1}
    assert any("area" not in each for each in annotations) and any("iscrowd" not in each for each in annotations)
    assert any(each.get("iscrowd") for each in annotations) and any(each.get("ignore") for each in annotations)
    assert {1024.0, 9216.0} <= {each.get("area") for each in annotations}
    assert any(image["id"] == 0 for case in cases for image in case.truth["images"])
    assert any(raw_id == 0 for case in cases for raw_id in case.label_map.raw_ids)
    assert any(
        len(set(case.label_map.raw_ids) - {a["category_id"] for a in case.truth["annotations"]}) for case in cases
    )
    assert any(not case.truth["annotations"] for case in cases)
    assert any(all(not len(detections[1]) for detections in case.found.values()) for case in cases)
    assert any(len(scores) > 100 for _, scores, _, _ in found) and any(not len(scores) for _, scores, _, _ in found)
    assert any(len(np.unique(scores)) < len(scores) for _, scores, _, _ in found)
    assert len(METRIC_NAMES) == 12
