import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_dense.windows import (
    pad_to_multiple,
    relative_position_index,
    shift_mask,
    window_merge,
    window_partition,
    windows_of_a_map,
)

CPU = torch.device("cpu")


def mask_of(size_hw, window_size, shift_hw, value=-100.0, dtype=torch.float64, device=CPU):
    return shift_mask(size_hw, window_size, shift_hw, value, dtype, device)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_partition_then_merge_is_identity(rows, columns, window, channels):
    x = torch.rand(2, rows * window, columns * window, channels)
    windows = window_partition(x, window)
    assert windows.shape == (2, rows * columns, window * window, channels)
    assert torch.equal(window_merge(windows, window, (rows * window, columns * window)), x)


def test_partition_is_row_major_outside_and_inside_windows():
    height, width, window = 6, 9, 3
    x = torch.arange(height * width).view(1, height, width, 1)
    windows = window_partition(x, window)[0, :, :, 0]
    for row in range(height):
        for column in range(width):
            index = (row // window) * (width // window) + column // window
            assert windows[index, (row % window) * window + column % window] == row * width + column


def test_partition_takes_any_memory_layout():
    x = torch.rand(2, 5, 6, 4).permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    assert torch.equal(window_merge(window_partition(x, 2), 2, (6, 4)), x)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 7))
def test_pad_adds_the_fewest_zeros_at_bottom_and_right(height, width, multiple):
    x = torch.rand(2, height, width, 3) + 1
    padded = pad_to_multiple(x, multiple)
    rows, columns = padded.shape[1:3]
    assert rows % multiple == 0 and columns % multiple == 0
    assert 0 <= rows - height < multiple and 0 <= columns - width < multiple
    assert torch.equal(padded[:, :height, :width], x)
    assert padded.sum() == pytest.approx(float(x.sum()), rel=1e-5)
    assert windows_of_a_map((height, width), multiple) == window_partition(padded, multiple).shape[1]


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_relative_position_index_is_the_offset_of_each_pair(window):
    index = relative_position_index(window)
    assert index.shape == (window**2, window**2) and index.dtype == torch.int64
    for i in range(window**2):
        for j in range(window**2):
            offset_y, offset_x = i // window - j // window, i % window - j % window
            assert index[i, j] == (offset_y + window - 1) * (2 * window - 1) + offset_x + window - 1
    assert index.unique().tolist() == list(range((2 * window - 1) ** 2))


@pytest.mark.parametrize(
    ("size_hw", "window", "shift_hw"),
    [((6, 9), 3, (1, 1)), ((4, 4), 4, (2, 2)), ((4, 8), 4, (0, 2)), ((8, 4), 4, (2, 0)), ((5, 15), 5, (2, 2))],
)
def test_shift_mask_separates_cells_that_only_the_roll_made_neighbours(size_hw, window, shift_hw):
    height, width = size_hw
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    rolled = torch.roll(grid, (-shift_hw[0], -shift_hw[1]), dims=(0, 1))  # where each cell was before
    cells = window_partition(rolled[None], window)[0]
    mask = mask_of(size_hw, window, shift_hw)
    assert mask.shape == (height * width // window**2, window**2, window**2)
    # Two cells of a window belong together exactly if the roll left their offset as it was.
    now = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), dim=-1).flatten(0, 1)
    same = ((cells[:, :, None] - cells[:, None, :]) == (now[:, None] - now[None, :])).all(dim=-1)
    assert torch.equal(mask, torch.where(same, 0.0, -100.0).double())


def test_shift_mask_of_no_shift_is_zero():
    assert not mask_of((6, 9), 3, (0, 0)).any()


def test_shift_mask_takes_any_value():
    assert mask_of((4, 4), 4, (2, 2), value=-5.5).unique().tolist() == [-5.5, 0.0]
    closed = mask_of((4, 4), 4, (2, 2), value=float("-inf"))
    assert closed.unique().tolist() == [float("-inf"), 0.0]


def test_shift_mask_is_one_tensor_per_arguments():
    first = mask_of((6, 9), 3, (1, 1))
    others = [mask_of((9, 6), 3, (1, 1)), mask_of((6, 9), 3, (1, 1), dtype=torch.float32), mask_of((6, 9), 3, (0, 1))]
    assert mask_of((6, 9), 3, (1, 1)) is first
    assert all(other is not first for other in others)
    assert others[0].shape == first.shape and not torch.equal(others[0], first)
    assert others[1].dtype == torch.float32


def test_shift_mask_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        mask = mask_of((8, 12), 4, (2, 2), value=-7.0)
    assert not mask.is_inference()
    weight = torch.ones(1, requires_grad=True, dtype=torch.float64)
    (weight * mask).sum().backward()
    assert weight.grad is not None


def test_shift_mask_of_the_meta_device_has_the_same_shape():
    mask = mask_of((6, 9), 3, (1, 1), device=torch.device("meta"))
    assert mask.shape == mask_of((6, 9), 3, (1, 1)).shape and mask.is_meta
