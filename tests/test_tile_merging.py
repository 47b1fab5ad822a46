import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from swin_dense.datasets.geometry import Crop
from swin_dense.datasets.tiles import tile_grid
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.tile_merging import merge_predictions, move_mask

SIZE_HW = (61, 97)
LEFT, RIGHT = Crop(0, 0, (61, 57)), Crop(0, 40, (61, 57))  # they share the columns 40 to 56


def encode(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def rectangle(x1, y1, x2, y2, size_hw=SIZE_HW):
    mask = np.zeros(size_hw, np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def prediction(masks, scores=None, labels=None):
    """Objects of whole masks, with the boxes of these, by falling score."""
    scores = np.linspace(0.9, 0.5, len(masks)) if scores is None else np.array(scores)
    labels = np.zeros(len(masks)) if labels is None else np.array(labels)
    order = np.argsort(-scores, kind="stable")
    boxes = np.array([box_of(mask) for mask in masks], np.float32).reshape(-1, 4)
    codes = [encode(masks[row]) for row in order]
    return InstancePrediction(boxes[order], labels[order].astype(np.int64), scores[order].astype(np.float32), codes)


def seen(tile, masks, scores, labels=None):
    """What a perfect detector finds in a tile of an image with these objects."""
    parts = [tile.label(mask) for mask in masks]
    rows = [row for row, part in enumerate(parts) if part.any()]
    labels = [0] * len(masks) if labels is None else labels
    return prediction([parts[row] for row in rows], [scores[row] for row in rows], [labels[row] for row in rows])


def blobs(seed, count, size_hw):
    """Ellipses that do not overlap each other, of very different sizes."""
    generator = np.random.default_rng(seed)
    taken, masks = np.zeros(size_hw, bool), []
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    while len(masks) < count:
        centre, radii = generator.uniform(0, size_hw), generator.uniform(3, 30, 2)
        mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        if mask.any() and not (mask & taken).any():
            taken |= np.pad(mask, 1)[1:-1, 1:-1]
            masks.append(mask.astype(np.uint8))
    return masks


def masks_of(merged):
    return [coco_mask.decode(code) for code in merged.masks_rle]


@given(st.integers(0, 10_000))
def test_moved_mask_equals_encoding_the_moved_pixels(seed):
    generator = np.random.default_rng(seed)
    old_hw, new_hw = generator.integers(1, 12, 2), generator.integers(1, 16, 2)
    top, left = generator.integers(-13, 17, 2).tolist()
    mask = generator.random(old_hw) < generator.choice([0, 0.2, 0.8, 1])
    canvas = np.zeros(np.array([60, 60]), np.uint8)
    canvas[20 + top : 20 + top + old_hw[0], 20 + left : 20 + left + old_hw[1]] = mask
    wanted = encode(canvas[20 : 20 + new_hw[0], 20 : 20 + new_hw[1]])
    assert move_mask(encode(mask), top, left, tuple(new_hw.tolist())) == wanted


def test_one_tile_comes_back_as_it_is():
    generator = np.random.default_rng(0)
    masks = [generator.random(SIZE_HW) < 0.5 for _ in range(7)]
    scores = [0.9, 0.8, 0.8, 0.8, 0.3, 0.2, 0.0]
    whole = prediction(masks, scores, [0, 1, 0, 0, 2, 0, 0])
    whole.boxes_xyxy[:] += generator.random((7, 4), np.float32)
    merged = merge_predictions([whole], [Crop(0, 0, SIZE_HW)], SIZE_HW)
    for name in ("boxes_xyxy", "labels", "scores"):
        first, second = getattr(merged, name), getattr(whole, name)
        assert np.array_equal(first, second) and first.dtype == second.dtype
    assert merged.masks_rle == whole.masks_rle


def test_nothing_found_is_nothing():
    merged = merge_predictions([prediction([])] * 2, [LEFT, RIGHT], SIZE_HW)
    assert merged.boxes_xyxy.shape == (0, 4) and merged.labels.shape == merged.scores.shape == (0,)
    assert merged.masks_rle == [] and merged.boxes_xyxy.dtype == merged.scores.dtype == np.float32


@pytest.mark.parametrize("seed", range(4))
def test_perfect_tiles_merge_to_the_whole(seed):
    size_hw = (151, 211)
    masks = blobs(seed, 14, size_hw)
    scores, labels = np.linspace(0.95, 0.3, 14), (np.arange(14) % 3).tolist()
    tiles = tile_grid(size_hw, (67, 71), 29).tiles()
    merged = merge_predictions([seen(tile, masks, scores, labels) for tile in tiles], tiles, size_hw)
    whole = prediction(masks, scores, labels)
    assert merged.masks_rle == whole.masks_rle
    assert np.array_equal(merged.boxes_xyxy, whole.boxes_xyxy) and np.array_equal(merged.labels, whole.labels)
    assert np.array_equal(merged.scores, whole.scores)


def test_cut_object_takes_the_higher_score_and_both_parts():
    mask = rectangle(10, 20, 90, 30)
    parts = [seen(LEFT, [mask], [0.6]), seen(RIGHT, [mask], [0.8])]
    merged = merge_predictions(parts, [LEFT, RIGHT], SIZE_HW)
    assert merged.scores.tolist() == [np.float32(0.8)]
    assert np.array_equal(masks_of(merged)[0], mask) and merged.boxes_xyxy.tolist() == [[10, 20, 90, 30]]


def test_object_that_one_tile_saw_whole_is_taken_from_there():
    mask = rectangle(30, 20, 50, 30)  # whole in the left tile, cut in the right one
    sloppy = rectangle(40, 19, 50, 32)
    parts = [seen(LEFT, [mask], [0.5]), seen(RIGHT, [sloppy], [0.9])]
    merged = merge_predictions(parts, [LEFT, RIGHT], SIZE_HW)
    assert merged.scores.tolist() == [np.float32(0.9)] and np.array_equal(masks_of(merged)[0], mask)


def test_other_classes_stay_apart():
    mask = rectangle(10, 20, 90, 30)
    parts = [seen(LEFT, [mask], [0.6], [1]), seen(RIGHT, [mask], [0.8], [2])]
    assert merge_predictions(parts, [LEFT, RIGHT], SIZE_HW).labels.tolist() == [2, 1]


def test_neighbours_in_the_shared_zone_stay_apart():
    masks = [rectangle(30, 10, 70, 20), rectangle(30, 21, 70, 31), rectangle(42, 35, 48, 40), rectangle(49, 35, 55, 40)]
    scores = [0.9, 0.8, 0.7, 0.6]
    parts = [seen(tile, masks, scores) for tile in (LEFT, RIGHT)]
    merged = merge_predictions(parts, [LEFT, RIGHT], SIZE_HW)
    assert all(np.array_equal(found, mask) for found, mask in zip(masks_of(merged), masks, strict=True))


def test_what_a_tile_tells_apart_stays_apart():
    masks = [rectangle(10, 10, 57, 30), rectangle(10, 11, 57, 31)]  # nearly the same, cut, in one tile
    merged = merge_predictions([seen(LEFT, masks, [0.9, 0.8]), prediction([])], [LEFT, RIGHT], SIZE_HW)
    assert len(merged.scores) == 2
    both = merge_predictions([seen(tile, masks, [0.9, 0.8]) for tile in (LEFT, RIGHT)], [LEFT, RIGHT], SIZE_HW)
    assert [np.array_equal(*pair) for pair in zip(masks_of(both), masks, strict=True)] == [True, True]


def test_sure_object_does_not_grow_by_an_unsure_region():
    good, vague = rectangle(20, 20, 57, 24), rectangle(40, 5, 90, 55)
    parts = [seen(LEFT, [good], [0.95]), seen(RIGHT, [vague], [0.06])]
    merged = merge_predictions(parts, [LEFT, RIGHT], SIZE_HW)
    assert len(merged.scores) == 2 and np.array_equal(masks_of(merged)[0], good)


@pytest.mark.parametrize(("score", "kept"), [(0.4, 1), (0.95, 2)])
def test_fragment_is_dropped_under_a_better_object(score, kept):
    whole, fragment = rectangle(15, 10, 55, 50), rectangle(40, 12, 47, 20)
    parts = [seen(LEFT, [whole], [0.8]), seen(RIGHT, [fragment], [score])]
    assert len(merge_predictions(parts, [LEFT, RIGHT], SIZE_HW).scores) == kept


def test_most_detections_are_the_best():
    masks = [rectangle(x, 5, x + 6, 15) for x in (2, 20, 60, 80)]
    parts = [seen(tile, masks, [0.2, 0.9, 0.7, 0.4]) for tile in (LEFT, RIGHT)]
    merged = merge_predictions(parts, [LEFT, RIGHT], SIZE_HW, max_detections=2)
    assert merged.scores.tolist() == [np.float32(0.9), np.float32(0.7)]


def test_tiles_stay_as_they_are():
    mask = rectangle(10, 20, 90, 30)
    parts = [seen(tile, [mask], [0.5]) for tile in (LEFT, RIGHT)]
    before = [(part.boxes_xyxy.copy(), list(part.masks_rle)) for part in parts]
    merge_predictions(parts, [LEFT, RIGHT], SIZE_HW)
    for part, (boxes, codes) in zip(parts, before, strict=True):
        assert np.array_equal(part.boxes_xyxy, boxes) and part.masks_rle == codes
