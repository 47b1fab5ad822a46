"""Maps resized bilinearly, corners not aligned, without the cost of doing so at full size. Pure functions.

`torch.nn.functional.interpolate` says what every function here computes. Its gradient adds up single values on a GPU,
which took half of a training step of UPerNet; bilinear weights are a matrix for the rows times one for the columns, and
the gradient of a matrix product is a matrix product.

Symbols: a map (B, C, h, w), its new size (H, W). Maps are kept channels-last in memory, as the backbone's are: one that
is not makes `torch.cat`, and every layer after it, leave that format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from swin_dense.watched import operations_are_watched
from swin_dense.windows import SizeHW

CLASSES_AT_ONCE = 16
"""Of `likeliest_classes`; whole vectors of every processor, so that each class is rounded as it is among all others."""


def interpolation_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each cell of a line counts in each cell of the same line at another size.

    Args:
        size_in: Cells of the line.
        size_out: Cells wanted.
        dtype: Of the result. The weights are computed in float32 at least, as `functional.interpolate` does.
        device: Of the result.

    Returns:
        (size_out, size_in), each row sums to 1. Eager calls share one tensor per arguments: it must not be written to.
    """
    if torch.compiler.is_compiling():  # sizes may be symbolic here
        return _build_interpolation_matrix(size_in, size_out, dtype, device)
    return _cached_interpolation_matrix(size_in, size_out, dtype, device)


def _build_interpolation_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    precision = torch.promote_types(dtype, torch.float32)
    position = (torch.arange(size_out, dtype=precision, device=device) + 0.5) * (size_in / size_out) - 0.5
    position = position.clamp(min=0)[:, None]
    before = position.floor()
    after = (before + 1).clamp(max=size_in - 1)
    cells = torch.arange(size_in, device=device)
    return ((cells == before) * (1 - (position - before)) + (cells == after) * (position - before)).to(dtype)


@lru_cache(maxsize=64)  # all lines of a few image sizes
def _cached_interpolation_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a matrix first made for inference must serve training too
        return _build_interpolation_matrix(size_in, size_out, dtype, device)


def resize(x: Tensor, size_hw: SizeHW) -> Tensor:
    """A map at another size, whichever way is faster.

    Args:
        x: (B, C, h, w).
        size_hw: (H, W).

    Returns:
        (B, C, H, W); the map itself where it has that size.
    """
    if tuple(x.shape[2:]) == tuple(size_hw):
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if x.is_cuda and x.requires_grad and torch.is_grad_enabled():
        return resize_by_products(x, size_hw)
    # On a CPU, and where nothing goes back, it is the faster one, as long as maps are channels-last.
    x = functional.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)  # copies what was one cell, which is of any format


def resize_by_products(x: Tensor, size_hw: SizeHW) -> Tensor:
    """As `resize`, always by matrix products."""
    rows = interpolation_matrix(x.shape[2], size_hw[0], x.dtype, x.device)
    columns = interpolation_matrix(x.shape[3], size_hw[1], x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):  # full-precision maps stay so
        return combine_rows(combine_columns(x.permute(0, 2, 3, 1), columns), rows).permute(0, 3, 1, 2)


def combine_rows(x: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows: x (B, h, W, C) with weights (H, h) to (B, H, W, C)."""
    product = torch.bmm(weights.expand(len(x), -1, -1), x.flatten(2))
    return product.view(len(x), len(weights), *x.shape[2:])


def combine_columns(x: Tensor, weights: Tensor) -> Tensor:
    """Sums of columns: x (B, h, w, C) with weights (W, w) to (B, h, W, C)."""
    lines = x.flatten(0, 1)
    return torch.bmm(weights.expand(len(lines), -1, -1), lines).view(*x.shape[:2], len(weights), x.shape[3])


class Span(NamedTuple):
    """A part of a resized line.

    Attributes:
        cells: The part.
        sources: The cells of the line before that it is made of.
    """

    cells: slice
    sources: slice


def spans(size_in: int, size_out: int, length: int) -> Iterator[Span]:
    """Yields a resized line in parts of so many cells; the last one may be shorter."""
    for start in range(0, size_out, length):
        stop = min(start + length, size_out)
        first, last = (((2 * cell + 1) * size_in - size_out) // (2 * size_out) for cell in (start, stop - 1))
        yield Span(slice(start, stop), slice(max(first, 0), min(last + 2, size_in)))


def convolve_resized(maps: Sequence[Tensor], weight: Tensor, size_hw: SizeHW) -> Tensor:
    """The convolution of maps that are resized to one size and concatenated, padded with zeros to keep that size.

    Both steps are linear. Every tap of the kernel is a product over channels, which does not care where it is done:
    at a coarser map's own size it costs a quarter, a sixteenth, ... of what it costs at the new one. What is left to
    do there is the sum of the taps' results, each resized and moved by its offset.

    Args:
        maps: Each (B, C_i, h_i, w_i).
        weight: (channels, sum of C_i, k, k), k odd.
        size_hw: (H, W).

    Returns:
        (B, channels, H, W).
    """
    at_new_size, at_own_size = [], []
    for x, part in zip(maps, weight.split([x.shape[1] for x in maps], dim=1), strict=True):
        if _taps_are_cheaper(x, part, size_hw) and not operations_are_watched():
            at_own_size.append(_convolve_before_resizing(x, part, size_hw))
        else:
            at_new_size.append((resize(x, size_hw), part))
    results = at_own_size
    if at_new_size:
        x, part = (_concatenated(tensors) for tensors in zip(*at_new_size, strict=True))
        results = [functional.conv2d(x, part, padding=part.shape[2] // 2), *at_own_size]
    return reduce(Tensor.add_, results)


def _concatenated(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]  # one alone would be copied


def _taps_are_cheaper(x: Tensor, weight: Tensor, size_hw: SizeHW) -> bool:
    (_, channels, side, _), (height, width) = weight.shape, x.shape[2:]
    # Multiplications per cell and channel of the result: of the taps, then of columns and rows.
    at_new_size = side**2 * channels
    at_own_size = at_new_size * height * width / (size_hw[0] * size_hw[1])
    return at_own_size + side**2 * width * height / size_hw[0] + side * height < at_new_size


def _convolve_before_resizing(x: Tensor, weight: Tensor, size_hw: SizeHW) -> Tensor:
    channels, _, side, _ = weight.shape
    (height, width), batch = x.shape[2:], len(x)
    by_taps = weight.permute(3, 2, 0, 1).flatten(0, 2)  # columns of the kernel, its rows, channels
    x = functional.linear(x.permute(0, 2, 3, 1), by_taps)
    rows = _moved_matrices(interpolation_matrix(height, size_hw[0], x.dtype, x.device), side)
    columns = _moved_matrices(interpolation_matrix(width, size_hw[1], x.dtype, x.device), side)
    x = combine_columns(x.view(batch, height, width * side, side * channels), columns)
    x = x.view(batch, height, size_hw[1], side, channels).transpose(2, 3).flatten(1, 2)
    return combine_rows(x, rows).permute(0, 3, 1, 2)


def _moved_matrices(matrix: Tensor, side: int) -> Tensor:
    """(size_out, size_in) to (size_out, size_in side): beside each weight those of the cells before and after."""
    size_out, reach = len(matrix), side // 2
    padded = functional.pad(matrix, (0, 0, reach, reach))
    return torch.stack([padded[tap : tap + size_out] for tap in range(side)], dim=2).flatten(1)


def likeliest_classes(logits: Tensor, sizes_hw: Sequence[SizeHW]) -> Tensor:
    """The class with the highest logit in each pixel, without all logits of an image at once.

    Classes are resized on their own, some after the others, and only the best so far are kept: the labels are those of
    all logits, bit for bit, and of equal ones the first class.

    Args:
        logits: (B, K, h, w).
        sizes_hw: To be resized to, one after the other; the last one is (H, W).

    Returns:
        (B, H, W) int64 in [0, K).
    """
    best, labels = torch.empty(0), torch.empty(0)
    for start in range(0, logits.shape[1], CLASSES_AT_ONCE):
        part = reduce(resize, sizes_hw, logits[:, start : start + CLASSES_AT_ONCE])
        highest, classes = part.max(dim=1)
        if start == 0:
            best, labels = highest, classes
        else:
            labels = torch.where(highest > best, classes + start, labels)
            best = torch.maximum(best, highest)
    return labels
