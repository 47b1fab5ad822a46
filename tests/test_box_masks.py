import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swin_dense.box_masks import BoxMasks

shapes = st.tuples(st.integers(0, 4), st.integers(1, 13), st.integers(1, 17))
full_masks = hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 0, 0, 0, 1]))


def three():
    masks = torch.zeros(3, 11, 17, dtype=torch.uint8)
    masks[0, 2:5, 3:9] = 1
    masks[0, 3, 4] = 0
    masks[2, 0, 16] = 1
    return masks


@given(full_masks)
def test_full_masks_come_back(masks):
    masks = torch.from_numpy(masks)
    packed = BoxMasks.from_full(masks)
    assert torch.equal(packed.full(), masks) and len(packed) == len(masks)
    assert torch.equal(BoxMasks.from_full(masks.bool()).full(), masks)


@given(full_masks)
def test_each_mask_is_cut_to_its_bounding_box(masks):
    packed = BoxMasks.from_full(torch.from_numpy(masks))
    for row, mask in enumerate(masks):
        crop = packed.crop(row).numpy()
        rows, columns = np.nonzero(mask)
        extent = (np.ptp(rows) + 1, np.ptp(columns) + 1) if len(rows) else (0, 0)
        assert crop.shape == extent and crop.sum() == mask.sum()
        if len(rows):
            assert packed.corners_xy[row].tolist() == [columns.min(), rows.min()]


def test_memory_is_the_area_of_the_boxes_whatever_the_size_of_the_image():
    for scale in (1, 50):
        masks = torch.zeros(3, 11 * scale, 17 * scale, dtype=torch.uint8)
        masks[:, :11, :17] = three()
        packed = BoxMasks.from_full(masks)
        assert packed.nbytes == 3 * 6 + 1 + 1
        # What travels to other processes too, but for two digits of the image's size.
        assert abs(len(pickle.dumps(packed)) - len(pickle.dumps(BoxMasks.from_full(three())))) < 8


def test_crops_and_full_masks_give_the_same_record():
    crops = [three()[0, 2:5, 3:9], torch.zeros(0, 0, dtype=torch.uint8), three()[2, :1, 16:]]
    packed, wanted = BoxMasks.from_crops(crops, [(3, 2), (0, 0), (16, 0)], (11, 17)), BoxMasks.from_full(three())
    for name, value in vars(wanted).items():
        same = (
            torch.equal(vars(packed)[name], value) if isinstance(value, torch.Tensor) else vars(packed)[name] == value
        )
        assert same, name


@pytest.mark.parametrize("rows", [[2, 0], [], [1, 1], [False, True, True]])
def test_rows_are_those_of_the_full_masks_and_share_their_pixels(rows):
    packed, index = BoxMasks.from_full(three()), torch.tensor(rows, dtype=None if rows else torch.int64)
    chosen = packed[index]
    assert torch.equal(chosen.full(), three()[index]) and chosen.pixels is packed.pixels


@given(full_masks, st.data())
def test_windows_are_cut_from_the_frame_with_zeros_around_it(masks, data):
    count, height, width = masks.shape
    corner = st.tuples(st.integers(-3, width + 3), st.integers(-3, height + 3))
    corners = data.draw(st.lists(corner, min_size=1, max_size=4)) if count else []
    rows = [data.draw(st.integers(0, count - 1)) for _ in corners]
    size_hw = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    packed = BoxMasks.from_full(torch.from_numpy(masks))
    windows = packed.windows(
        torch.tensor(rows, dtype=torch.int64), torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), size_hw
    )
    frame = np.pad(masks, ((0, 0), (20, 20), (20, 20)))
    for window, row, (x, y) in zip(windows, rows, corners, strict=True):
        wanted = frame[row, 20 + y : 20 + y + size_hw[0], 20 + x : 20 + x + size_hw[1]]
        assert np.array_equal(window.numpy(), wanted)


def test_only_pixels_move_to_a_device():
    packed = BoxMasks.from_full(three())
    moved = packed.to("meta")
    assert moved.pixels.device.type == "meta" and moved.starts.device.type == "cpu"
    assert moved.image_size_hw == packed.image_size_hw and torch.equal(moved.sizes_hw, packed.sizes_hw)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_on_a_gpu_equal_those_on_the_cpu():
    packed = BoxMasks.from_full(three().cuda())
    assert packed.pixels.is_cuda and torch.equal(packed.full().cpu(), three())
    assert torch.equal(BoxMasks.from_full(three()).pin_memory().to("cuda").full().cpu(), three())
