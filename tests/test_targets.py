import math

import pytest
import torch

from swin_dense.box_masks import BoxMasks
from swin_dense.errors import DataError
from swin_dense.heads.targets import check_target, training_target


def target_of(size_hw, boxes=((5.0, 4.0, 30.0, 29.0), (11.0, 7.0, 40.0, 23.0))):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "masks": masks}


GOOD = target_of((41, 67))
BOX_MASKS = BoxMasks.from_full(GOOD["masks"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"target 1 has no 'labels'; it holds boxes, masks\."),
        ({"boxes": torch.zeros(2, 5)}, r"target 1: boxes must have shape \(2, 4\), got \(2, 5\)"),
        ({"boxes": torch.zeros(0)}, r"target 1: boxes must have shape \(0, 4\), got \(0,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"target 1: labels must have shape \(2,\), got \(3,\)"),
        ({"masks": torch.zeros(2, 67, 41)}, r"target 1: masks must have shape \(2, 41, 67\), got \(2, 67, 41\)"),
        ({"masks": torch.zeros(2, 41, 67)}, r"target 1: .* masks uint8 or bool, got .*torch.float32"),
        ({"masks": torch.full((2, 41, 67), 255, dtype=torch.uint8)}, r"target 1: masks must be 0 or 1, got 255"),
        ({"labels": torch.zeros(2)}, r"target 1: labels must be int64, boxes float .*, got torch.float32"),
        ({"boxes": GOOD["boxes"].long()}, r"labels must be int64, boxes float .*, got torch.int64, torch.int64"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be 0 to 2 \(0-based, background not counted\), got 0 to 3"),
        ({"labels": torch.tensor([-1, 2])}, r"labels must be 0 to 2 .*, got -1 to 2"),
        (
            {"boxes": torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 9]])},
            r"target 1: box 1 must be finite xyxy with x2 > x1 and y2 > y1, got \[5\.0, 5\.0, 5\.0, 9\.0\]",
        ),
        ({"boxes": torch.tensor([[1.0, 2, math.nan, 4], [5, 5, 7, 9]])}, r"box 0 must be finite xyxy"),
        ({"masks": BOX_MASKS[torch.tensor([1])]}, r"masks must have shape \(2, 41, 67\), got \(1, 41, 67\)"),
        ({"masks": BoxMasks.from_full(torch.ones(2, 67, 41).byte())}, r"masks must have .*, got \(2, 67, 41\)"),
        ({"masks": BOX_MASKS.from_crops([torch.full((2, 2), 255)] * 2, [(0, 0)] * 2, (41, 67))}, "0 or 1, got 255"),
        ({"iscrowd": torch.tensor([True])}, r"target 1: iscrowd must have shape \(2,\), got \(1,\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_name(changes, message):
    target = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        check_target(target, 1, (41, 67), num_classes=3)


def test_good_targets_pass():
    check_target(GOOD, 0, (41, 67), num_classes=3)
    check_target(target_of((41, 67), boxes=()), 0, (41, 67), num_classes=3)
    check_target({**GOOD, "iscrowd": torch.tensor([False, True]), "area": None}, 0, (41, 67), num_classes=3)
    check_target({**GOOD, "masks": BOX_MASKS}, 0, (41, 67), num_classes=3)


def test_both_forms_of_masks_give_the_same_training_target():
    image = torch.zeros(3, 41, 67)
    for crowds in ({}, {"iscrowd": torch.tensor([True, False])}):
        full, packed = (
            training_target({**GOOD, "masks": masks, **crowds}, image, 32) for masks in (GOOD["masks"], BOX_MASKS)
        )
        assert full.keys() == packed.keys()
        assert torch.equal(full["masks"].full(), packed["masks"].full())
        assert all(torch.equal(full[name], packed[name]) for name in ("boxes", "labels", "ignored_boxes"))
    assert all(full[name] == packed[name] for name in ("size_hw", "padded_size_hw"))


def test_regions_to_ignore_are_parted_from_the_objects():
    target = training_target({**GOOD, "iscrowd": torch.tensor([True, False])}, torch.zeros(3, 41, 67), 32)
    assert torch.equal(target["boxes"], GOOD["boxes"][1:]) and torch.equal(target["ignored_boxes"], GOOD["boxes"][:1])
    assert target["labels"].tolist() == [2] and torch.equal(target["masks"].full(), GOOD["masks"][1:])
    assert target["size_hw"] == (41, 67) and target["padded_size_hw"] == (64, 96)
    without = training_target(GOOD, torch.zeros(3, 41, 67), 32)
    assert without["labels"].tolist() == [1, 2] and without["ignored_boxes"].shape == (0, 4)
