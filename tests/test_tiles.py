import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.datasets.geometry import Crop
from swin_dense.datasets.tiles import TrainingTile, blending_weights, cut_by_inner_border, mostly_cut_off, tile_grid
from swin_dense.errors import ConfigError

SIDES = st.integers(1, 300)


@st.composite
def grids(draw):
    tile_hw = draw(SIDES), draw(SIDES)
    return (draw(SIDES), draw(SIDES)), tile_hw, draw(st.integers(0, min(tile_hw) - 1))


@given(grids())
def test_tiles_cover_the_image_at_one_size(numbers):
    size_hw, tile_hw, overlap = numbers
    grid = tile_grid(size_hw, tile_hw, overlap)
    for starts, side, tile_side, wanted in zip(
        (grid.tops, grid.lefts), size_hw, grid.tile_size_hw, tile_hw, strict=True
    ):
        assert tile_side == min(side, wanted)
        assert starts[0] == 0 and starts[-1] + tile_side == side
        steps = np.diff(starts)
        assert (steps > 0).all() and (steps <= tile_side - min(overlap, tile_side - 1)).all()
        # Spread evenly, and no fewer tiles would do.
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
        assert len(steps) == 0 or (len(steps) - 1) * (wanted - overlap) < side - tile_side


@pytest.mark.parametrize("size_hw", [(64, 64), (1, 64), (63, 5)])
def test_image_that_fits_is_one_tile(size_hw):
    assert tile_grid(size_hw, (64, 64), 16).tiles() == [Crop(0, 0, size_hw)]


def test_tiles_go_row_by_row():
    tiles = tile_grid((10, 7), (6, 5), 2).tiles()
    assert [(tile.top, tile.left) for tile in tiles] == [(0, 0), (0, 2), (4, 0), (4, 2)]


@pytest.mark.parametrize(("tile_hw", "overlap"), [((8, 8), 8), ((8, 8), -1), ((0, 8), 0), ((9, 5), 5)])
def test_overlap_must_be_less_than_the_tile(tile_hw, overlap):
    with pytest.raises(ConfigError, match=f"less than the side of a tile, got {overlap} for tiles of {tile_hw[0]} x "):
        tile_grid((100, 100), tile_hw, overlap)


@given(SIDES, SIDES, st.data())
def test_weights_are_positive_and_at_most_one(side, tile_side, data):
    overlap = data.draw(st.integers(0, tile_side - 1))
    grid = tile_grid((side, 1), (tile_side, tile_side), overlap)
    weights = blending_weights(grid.tops, grid.tile_size_hw[0])
    assert len(weights) == len(grid.tops)
    assert all(weight.dtype == np.float32 and 0 < weight.min() and weight.max() <= 1 for weight in weights)


@pytest.mark.parametrize(("side", "tile_side", "overlap"), [(101, 31, 0), (101, 31, 7), (101, 40, 13), (31, 31, 5)])
def test_weights_sum_to_one_and_change_slowly(side, tile_side, overlap):
    starts = tile_grid((side, 1), (tile_side, tile_side), overlap).tops
    total, times_seen = np.zeros(side), np.zeros(side)
    for start, weight in zip(starts, blending_weights(starts, tile_side), strict=True):
        total[start : start + tile_side] += weight
        times_seen[start : start + tile_side] += 1
        assert overlap == 0 or np.abs(np.diff(weight)).max() <= 1 / overlap + 1e-6
    assert np.allclose(total, 1, atol=1e-6)
    for start, weight in zip(starts, blending_weights(starts, tile_side), strict=True):
        assert (weight[times_seen[start : start + tile_side] == 1] == 1).all()


def test_only_inner_borders_cut():
    boxes = np.array([[0, 20, 10, 40], [30, 0, 40, 10], [70, 20, 80, 40], [30, 50, 40, 60], [3, 3, 77, 57]], float)
    inner = (boxes, Crop(5, 7, (60, 80)), (100, 200), 2)
    assert cut_by_inner_border(*inner).tolist() == [True, True, True, True, False]
    alone = (boxes, Crop(0, 0, (60, 80)), (60, 80), 2)
    assert not cut_by_inner_border(*alone).any()
    first = (boxes, Crop(0, 0, (60, 80)), (100, 200), 2)
    assert cut_by_inner_border(*first).tolist() == [False, False, True, True, False]
    last = (boxes, Crop(40, 120, (60, 80)), (100, 200), 2)
    assert cut_by_inner_border(*last).tolist() == [True, True, False, False, False]


def test_margin_decides_what_ends_at_a_border():
    boxes = np.array([[3, 20, 10, 40]], float)
    tile, size_hw = Crop(5, 7, (60, 80)), (100, 200)
    assert [bool(cut_by_inner_border(boxes, tile, size_hw, margin)[0]) for margin in (2, 3, 3.5)] == [
        False,
        False,
        True,
    ]


def test_shares_decide_what_is_cut_off():
    whole, remaining = np.array([100, 100, 100, 7, 3.1]), np.array([100, 50, 49, 0, 3.1 - 1e-5])
    assert mostly_cut_off(whole, remaining, 0.5).tolist() == [False, False, True, True, False]
    assert mostly_cut_off(whole, remaining, 1.0).tolist() == [False, True, True, True, False]
    assert not mostly_cut_off(whole, remaining, 0.0).any()


@pytest.mark.parametrize("least_share", [0.0, 0.4, 1.0])
def test_training_tile_is_a_crop_that_ignores_what_it_cuts_too_far(make_instances, least_share):
    objects = make_instances((61, 97), seed=3, count=40)
    before = objects.is_crowd.copy()
    place = (13, 20, (31, 47))
    cropped = Crop(*place).instances(objects)
    tile = TrainingTile(*place, least_share).instances(objects)
    assert np.array_equal(objects.is_crowd, before)
    assert np.array_equal(tile.boxes_xyxy, cropped.boxes_xyxy) and np.array_equal(tile.labels, cropped.labels)
    assert np.array_equal(tile.annotation_ids, cropped.annotation_ids)
    areas, remaining = (np.prod(x.boxes_xyxy[:, 2:] - x.boxes_xyxy[:, :2], axis=1) for x in (objects, tile))
    rows = [objects.annotation_ids.tolist().index(number) for number in tile.annotation_ids]
    shares = remaining / areas[rows]
    assert np.array_equal(tile.is_crowd, cropped.is_crowd | (shares < least_share))
    newly = int((tile.is_crowd & ~cropped.is_crowd).sum())
    assert newly > 3 if least_share == 1 else newly > 0 if least_share else newly == 0


def test_training_tile_cuts_images_and_labels_like_a_crop():
    image = np.arange(61 * 97).reshape(61, 97)
    assert np.array_equal(TrainingTile(13, 20, (31, 47)).label(image), image[13:44, 20:67])
