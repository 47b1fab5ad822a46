from itertools import pairwise

import pytest
import torch
from torch import nn

from swin_dense.errors import ConfigError
from swin_dense.heads.sliding_window import SlidingWindow, sliding_window, window_starts


def images_of(size_hw, count=2):
    return torch.rand(count, 3, *size_hw, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def model():
    """Logits that depend on the neighbours, so that a window sees less at its border, and on the whole window."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 5, padding=2).double().requires_grad_(False)
    return lambda images: conv(images) + images.mean(dim=(2, 3)).sum(dim=1)[:, None, None, None]


def in_plain_python(images, model, crop_hw, stride_hw):
    """The windows of mmsegmentation's `slide_inference`, counted out; sums and counts pixel by pixel."""
    height, width = images.shape[2:]
    total, count = torch.zeros(len(images), 5, height, width).double(), torch.zeros(height, width)
    rows = max(height - crop_hw[0] + stride_hw[0] - 1, 0) // stride_hw[0] + 1
    columns = max(width - crop_hw[1] + stride_hw[1] - 1, 0) // stride_hw[1] + 1
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride_hw[0] + crop_hw[0], height)
            right = min(column * stride_hw[1] + crop_hw[1], width)
            top, left = max(bottom - crop_hw[0], 0), max(right - crop_hw[1], 0)
            total[:, :, top:bottom, left:right] += model(images[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize(
    ("size_hw", "crop_hw", "stride_hw"),
    [
        ((53, 97), (31, 31), (20, 20)),
        ((97, 31), (31, 29), (31, 7)),
        ((31, 62), (31, 31), (11, 31)),
        ((17, 67), (31, 23), (20, 15)),
        ((13, 19), (31, 31), (20, 20)),
    ],
)
def test_windows_are_mmsegmentations(size_hw, crop_hw, stride_hw, model):
    images = images_of(size_hw)
    got = SlidingWindow(crop_hw, stride_hw)(images, model)
    wanted = in_plain_python(images, model, crop_hw, stride_hw)
    assert got.shape == (2, 5, *size_hw) and (got - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("size_hw", [(31, 37), (29, 31), (1, 1)])
def test_a_window_that_holds_the_image_gives_the_whole_bit_for_bit(size_hw, model):
    images = images_of(size_hw)
    assert torch.equal(SlidingWindow((31, 37), (20, 20))(images, model), model(images))


def test_windows_change_nothing_where_a_pixel_depends_on_itself_alone():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 1).double().requires_grad_(False)
    images = images_of((41, 67))
    assert torch.allclose(SlidingWindow((17, 23), (7, 11))(images, model), model(images), atol=1e-12)


def test_windows_lie_in_the_image_and_leave_no_gap():
    for side in range(7, 40):
        for stride in range(1, 8):
            starts = window_starts(side, 7, stride)
            assert starts[0] == 0 and starts[-1] == side - 7
            assert all(0 < after - before <= stride for before, after in pairwise(starts))


@pytest.mark.parametrize(("crop", "stride"), [(512, 341), (640, 426)])
def test_stride_is_two_thirds_of_the_window_unless_given(crop, stride):
    assert sliding_window((crop, crop)) == SlidingWindow((crop, crop), (stride, stride))
    assert sliding_window((crop, crop), (3, 5)).stride_hw == (3, 5) and sliding_window(None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (((31, 31), (32, 31)), "no longer than slide_crop_hw, got [32, 31] for [31, 31]"),
        (((31, 31), (0, 31)), "slide_stride_hw must be 1 or more"),
        (((0, 31), None), "got [0, 20] for [0, 31]"),
        ((None, (3, 3)), "slide_stride_hw=[3, 3] needs slide_crop_hw"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        sliding_window(*settings)
    assert message in str(caught.value)
