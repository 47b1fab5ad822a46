import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from swin_dense.datasets.outlines import Frame, Outline

# Raised inside pycocotools' own decode.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE_HW = (31, 37)  # odd: no centre of a resized pixel lies on the edge between two

points = st.tuples(st.floats(-30, 70), st.floats(-30, 60))
grid_points = st.tuples(st.integers(-2, 40), st.integers(-2, 34))
polygons = st.lists(st.one_of(points, grid_points), min_size=3, max_size=9).map(lambda p: np.array(p, float).ravel())
steps = st.lists(
    st.one_of(
        st.just("flip"),
        st.tuples(st.integers(3, 90), st.integers(3, 90)),
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.2, 1), st.floats(0.2, 1)),
    ),
    max_size=4,
)


def change(frame, step):
    if step == "flip":
        return frame.flipped()
    if len(step) == 2:
        return frame.resized(step)
    height, width = (max(1, int(side * share)) for side, share in zip(frame.size_hw, step[2:], strict=True))
    top, left = int((frame.size_hw[0] - height) * step[0]), int((frame.size_hw[1] - width) * step[1])
    return frame.cropped(top, left, (height, width))


def frame_after(changes):
    frame = Frame.of_file(SIZE_HW)
    for step in changes:
        frame = change(frame, step)
    return frame


def full(drawn, size_hw):
    mask, (left, top) = drawn
    picture = np.zeros(size_hw, np.uint8)
    picture[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return picture


def is_tight(mask):
    return mask.shape == (0, 0) or all(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def runs_of(mask):
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F")])))
    return np.diff(np.concatenate([[0], changes, [mask.size]])).astype(np.uint32)


@given(st.lists(polygons, min_size=1, max_size=3), steps)
def test_polygons_have_pycocotools_raster_of_the_whole_frame(parts, changes):
    frame = frame_after(changes)
    mask, corner_xy = Outline(tuple(parts)).draw(frame)
    moved = [frame.of_polygon(part).tolist() for part in parts]
    wanted = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, *frame.size_hw)))
    assert np.array_equal(full((mask, corner_xy), frame.size_hw), wanted)
    assert is_tight(mask) and mask.dtype == np.uint8


@given(polygons, steps)
def test_a_polygon_goes_where_each_change_takes_it(polygon, changes):
    frame, x, y = Frame.of_file(SIZE_HW), polygon[0::2], polygon[1::2]
    for step in changes:
        before, frame = frame, change(frame, step)
        if step == "flip":
            x = before.size_hw[1] - x
        elif len(step) == 2:
            x, y = x * step[1] / before.size_hw[1], y * step[0] / before.size_hw[0]
        else:
            top = int((before.size_hw[0] - frame.size_hw[0]) * step[0])
            left = int((before.size_hw[1] - frame.size_hw[1]) * step[1])
            x, y = x - left, y - top
    assert np.allclose(frame.of_polygon(polygon), np.stack([x, y], axis=1).ravel(), atol=1e-7)


@given(st.integers(0, 2**32), st.tuples(st.integers(3, 90), st.integers(3, 90)), st.booleans(), st.booleans())
def test_run_lengths_are_resized_as_the_whole_picture_would_be(seed, size_hw, flip_before, flip_after):
    generator = np.random.default_rng(seed)
    mask = np.zeros(SIZE_HW, np.uint8)
    top, left = generator.integers(29), generator.integers(35)
    patch = mask[top : top + generator.integers(2, 20), left : left + generator.integers(2, 20)]
    patch[...] = generator.random(patch.shape) < 0.6
    frame, wanted = Frame.of_file(SIZE_HW), mask
    if flip_before:
        frame, wanted = frame.flipped(), wanted[:, ::-1]
    frame, wanted = (
        frame.resized(size_hw),
        np.array(Image.fromarray(wanted).resize(size_hw[::-1], Image.Resampling.NEAREST)),
    )
    if flip_after:
        frame, wanted = frame.flipped(), wanted[:, ::-1]
    crop_hw = (int(generator.integers(1, size_hw[0] + 1)), int(generator.integers(1, size_hw[1] + 1)))
    top, left = (int(generator.integers(side - cut + 1)) for side, cut in zip(size_hw, crop_hw, strict=True))
    frame, wanted = frame.cropped(top, left, crop_hw), wanted[top : top + crop_hw[0], left : left + crop_hw[1]]
    drawn = Outline(runs=runs_of(mask)).draw(frame)
    assert np.array_equal(full(drawn, crop_hw), wanted) and is_tight(drawn[0])


@given(st.integers(0, 2**32))
def test_run_lengths_as_they_are_equal_pycocotools_decode(seed):
    generator = np.random.default_rng(seed)
    mask = (generator.random(SIZE_HW) < generator.choice([0.002, 0.1, 0.9])).astype(np.uint8)
    drawn = Outline(runs=runs_of(mask)).draw(Frame.of_file(SIZE_HW))
    wanted = coco_mask.decode(coco_mask.encode(np.asfortranarray(mask)))
    assert np.array_equal(full(drawn, SIZE_HW), wanted) and is_tight(drawn[0])


@given(polygons, steps, st.booleans())
def test_a_drawn_mask_moves_as_the_run_lengths_of_the_same_picture(polygon, changes, as_runs):
    drawn = Outline((polygon,)).draw(Frame.of_file(SIZE_HW))
    frame = frame_after(changes)
    if as_runs and drawn[0].size:
        wanted = Outline(runs=runs_of(full(drawn, SIZE_HW))).draw(frame)
    else:
        frame, wanted = Frame.of_file(SIZE_HW), drawn
    mask, corner_xy = Outline(drawn=drawn).draw(frame)
    assert np.array_equal(mask, wanted[0]) and corner_xy == wanted[1] and is_tight(mask)


@given(polygons, steps)
def test_flip_twice_is_the_identity_bit_for_bit(polygon, changes):
    frame = frame_after(changes)
    again = frame.flipped().flipped()
    assert np.allclose(again.shift_xy, frame.shift_xy, rtol=0, atol=1e-12) and again.scale_xy == frame.scale_xy
    if not changes:
        assert again == frame


def test_drawing_takes_memory_for_the_object_not_for_the_frame():
    def peak(side):
        outlines = [
            Outline((np.array([1.0, 1, 81, 5, 71, 91, 3, 60]) + side / 2,)),
            Outline(drawn=(np.ones((80, 90), np.uint8), (side // 2, side // 2))),
            Outline(runs=np.array([side * (side // 2), 60, side - 60, 60, side * (side - side // 2 - 1) - 60])),
        ]
        frame = Frame.of_file((side, side))
        for outline in outlines:
            outline.draw(frame)
        tracemalloc.start()
        for outline in outlines:
            outline.draw(frame)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # Nine times the frame's pixels: a row or column of it may count, never the frame.
    assert peak(6000) < peak(2000) + 10 * 4000 * 8 < 6000**2 / 10
