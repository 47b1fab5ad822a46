"""Windows of a feature map: padding, cutting, joining, and what a shift makes of them. Pure functions.

Sizes are integer arithmetic only, so that a size may be symbolic in export and compilation. Symbols: a map is
(B, H, W, C); a window has M x M cells; a map that divides has n = (H / M) (W / M) windows, in row-major order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SizeHW = tuple[int, int]


class ShiftedWindows(NamedTuple):
    """How a map of any size is cut into windows.

    Attributes:
        window_size: M, in cells.
        shift_hw: By how many cells the map is rolled up and left before it is cut, below M; 0 is no shift along that
            side.
        pad_first: Whether the map is padded to multiples of M before it is rolled, or after.
        mask_value: What is added to the attention logits of two cells that only the roll made neighbours.
    """

    window_size: int
    shift_hw: SizeHW
    pad_first: bool
    mask_value: float


def shift_and_pad(x: Tensor, padding: Tensor, windows: ShiftedWindows) -> Tensor:
    """The map that is cut into windows.

    Args:
        x: (B, H, W, C).
        padding: (C,), what padded cells hold.
        windows: How it is cut.

    Returns:
        (B, H', W', C), with H' and W' the next multiples of M.
    """
    back_hw = (-windows.shift_hw[0], -windows.shift_hw[1])
    shifted = windows.shift_hw != (0, 0)
    if shifted and not windows.pad_first:
        x = torch.roll(x, back_hw, dims=(1, 2))
    padded = pad_to_multiple(x, windows.window_size)
    if padded is not x:
        inside = pad_to_multiple(x.new_ones(1, *x.shape[1:3], 1), windows.window_size)
        x = torch.where(inside == 1, padded, padding)
    if shifted and windows.pad_first:
        x = torch.roll(x, back_hw, dims=(1, 2))
    return x


def unshift_and_crop(x: Tensor, size_hw: SizeHW, windows: ShiftedWindows) -> Tensor:
    """The inverse of `shift_and_pad`: (B, H', W', C) to (B, H, W, C), with (H, W) given."""
    height, width = size_hw
    if not windows.pad_first:
        x = x[:, :height, :width]
    if windows.shift_hw != (0, 0):
        x = torch.roll(x, windows.shift_hw, dims=(1, 2))
    return x[:, :height, :width]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map at the bottom and the right until both sides divide.

    Args:
        x: (B, H, W, C).
        multiple: What the sides of the result divide by.
    """
    height, width = x.shape[1:3]
    pad_bottom, pad_right = missing_to_multiple(height, multiple), missing_to_multiple(width, multiple)
    if not torch.compiler.is_compiling() and pad_bottom == pad_right == 0:
        return x  # not for symbolic sizes, which must not decide; padding by nothing would copy the map
    return functional.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))


def missing_to_multiple(size: int, multiple: int) -> int:
    """How much a size lacks to its next multiple: `-size % multiple`, in a form that suits symbolic sizes."""
    return (size + multiple - 1) // multiple * multiple - size


def windows_of_a_map(size_hw: SizeHW, window_size: int) -> int:
    """Into how many windows a map is cut, n, once it is padded."""
    rows, columns = ((size + window_size - 1) // window_size for size in size_hw)
    return rows * columns


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Cut a map whose sides divide by M into windows.

    Args:
        x: (B, H, W, C).
        window_size: M.

    Returns:
        (B, n, M M, C).
    """
    batch, height, width, channels = x.shape
    rows, columns = height // window_size, width // window_size
    x = x.view(batch, rows, window_size, columns, window_size, channels)
    return x.transpose(2, 3).reshape(batch, rows * columns, window_size * window_size, channels)


def window_merge(windows: Tensor, window_size: int, size_hw: SizeHW) -> Tensor:
    """The inverse of `window_partition`.

    Args:
        windows: (B, n, M M, C).
        window_size: M.
        size_hw: (H, W) of the map.

    Returns:
        (B, H, W, C).
    """
    batch, _, _, channels = windows.shape
    rows, columns = size_hw[0] // window_size, size_hw[1] // window_size
    windows = windows.view(batch, rows, columns, window_size, window_size, channels)
    return windows.transpose(2, 3).reshape(batch, size_hw[0], size_hw[1], channels)


def relative_position_index(window_size: int) -> Tensor:
    """For each pair of cells of a window, the row of the bias table that holds their offset.

    Args:
        window_size: M.

    Returns:
        (M M, M M) int64 in [0, (2M - 1)^2): entry (i, j) is (dy + M - 1)(2M - 1) + dx + M - 1 with (dy, dx) the
        position of i minus that of j.
    """
    position = torch.arange(window_size)
    y, x = (axis.flatten() for axis in torch.meshgrid(position, position, indexing="ij"))
    offset_y = y[:, None] - y[None, :] + window_size - 1
    offset_x = x[:, None] - x[None, :] + window_size - 1
    return offset_y * (2 * window_size - 1) + offset_x


def shift_mask(
    size_hw: SizeHW, window_size: int, shift_hw: SizeHW, value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What to add to the attention logits of a cyclically shifted map, so that torn-apart regions do not mix.

    Args:
        size_hw: (H, W) of the padded map; both divide by M.
        window_size: M.
        shift_hw: By how many cells the map was rolled up and left, below M; 0 is no shift along that side.
        value: The logit of a pair of cells from different regions; pairs of one region get 0.
        dtype: Of the result.
        device: Of the result.

    Returns:
        (n, M M, M M). Eager calls share one tensor per arguments: it must not be written to.
    """
    if torch.compiler.is_compiling():  # sizes may be symbolic here, and the compiler fuses the few steps
        return _build_shift_mask(size_hw, window_size, shift_hw, value, dtype, device)
    return _cached_shift_mask(size_hw, window_size, shift_hw, value, dtype, device)


def _build_shift_mask(
    size_hw: SizeHW, window_size: int, shift_hw: SizeHW, value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    rows = _shift_regions(size_hw[0], window_size, shift_hw[0], device)
    columns = _shift_regions(size_hw[1], window_size, shift_hw[1], device)
    regions = rows[:, None] * 3 + columns[None, :]
    regions = window_partition(regions[None, :, :, None], window_size)[0, :, :, 0]
    differs = regions[:, :, None] != regions[:, None, :]
    return differs.to(dtype).masked_fill(differs, value)


@lru_cache(maxsize=16)  # the sizes of all stages of a few image sizes
def _cached_shift_mask(
    size_hw: SizeHW, window_size: int, shift_hw: SizeHW, value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # a mask first made for inference must serve training too
        return _build_shift_mask(size_hw, window_size, shift_hw, value, dtype, device)


def _shift_regions(size: int, window_size: int, shift: int, device: torch.device) -> Tensor:
    """(size,) int64: 0 for cells outside the last window, 1 for its unmoved cells, 2 for those rolled in."""
    position = torch.arange(size, device=device)
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= size - window_size).long() + (position >= size - shift).long()
