"""The Triton kernels of `fused_roi_align`; importing this file imports Triton.

A bin is the mean of bilinear samples on a grid, hence a weighted sum of cells, and each weight is a product of one
along y and one along x: bin (p, q) is the sum over y and x of weight_y[p, y] weight_x[q, x] level[y, x]. So a program,
which takes a box, one of its rows of bins and a block of channels, first sums rows of cells, then multiplies by the
matrix weight_x; it reads each cell once, beside its neighbours. The gradient is the same product, transposed.

Upper-case parameters are fixed when a kernel is compiled: SIDE is the bins along a side and BINS the power of two that
holds them, CELLS how many cells of a row and BLOCK how many of the CHANNELS are handled at once. Boxes have the dtype
that is computed in. Sizes and strides of levels are floats: for integers in a tuple Triton would compile a kernel for
each pattern of those that divide by 16.
"""

# Parameters are tiles, pointers and numbers of the compiled language, which the hints of Python cannot tell.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _quotient(dividend, divisor):
    """Rounded to nearest, as float32's plain division is not: the number of samples must not hang on that."""
    if dividend.dtype == tl.float32:
        quotient = tl.div_rn(dividend, divisor)
    else:
        quotient = dividend / divisor
    return quotient


@triton.jit
def _of_level(values, level):
    """The entry of a tuple that belongs to a level."""
    chosen = values[0]
    for index in tl.static_range(1, len(values)):
        chosen = tl.where(level == index, values[index], chosen)
    return chosen


@triton.jit
def _grid(low, high, stride, SIDE: tl.constexpr):
    """Along one side of a box, in cells: its start, the length of a bin, the step between samples; samples of a bin."""
    scale = _quotient(tl.full((), 1.0, low.dtype), stride)
    start = low * scale - 0.5
    length = _quotient(high * scale - 0.5 - start, tl.full((), SIDE, low.dtype))
    samples = tl.ceil(length)
    return start, length, _quotient(length, tl.maximum(samples, 1.0)), samples


@triton.jit
def _touched_cells(start, length, step, size):
    """The first and the last cell that samples within a length can touch."""
    first = tl.minimum(tl.maximum(tl.floor(start + 0.5 * step), 0.0), size - 1.0)
    last = tl.minimum(tl.maximum(tl.floor(start + length - 0.5 * step) + 1.0, 0.0), size - 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _weights(cell, start, step, samples, size):
    """The share of cells in the means of bins' samples; arguments broadcast.

    `start` is where a bin starts, `step` from one sample to the next, all in cells.
    """
    # Bins have one sample or two, or samples at least 2/3 of a cell apart, of which at most three are near a cell.
    first = tl.maximum(tl.floor((cell - 1.0 - start) / step - 0.5), 0.0)
    total = tl.zeros_like(first)
    for candidate in tl.static_range(4):  # rounding may put one before those three
        sample = first + candidate
        position = start + (sample + 0.5) * step
        counts = (sample < samples) & (position >= -1.0) & (position <= size)
        distance = tl.abs(tl.minimum(tl.maximum(position, 0.0), size - 1.0) - cell)
        total += tl.where(counts, tl.maximum(1.0 - distance, 0.0), 0.0)
    return total / samples


@triton.jit
def _place(levels, heights, widths, strides, boxes, image_of_box, level_of_box, box, CHANNELS: tl.constexpr):
    """The map of a box's image and level, its sizes and stride, and where the box is kept; floats of its dtype."""
    dtype = boxes.dtype.element_ty
    level = tl.load(level_of_box + box)
    height, width = _of_level(heights, level).to(dtype), _of_level(widths, level).to(dtype)
    image_size = height.to(tl.int64) * width.to(tl.int64) * CHANNELS  # maps may have more than 2^31 numbers
    image_map = _of_level(levels, level) + tl.load(image_of_box + box) * image_size
    return image_map, height, width, _of_level(strides, level).to(dtype), boxes + 4 * box


@triton.jit
def _cell_pointers(image_map, y, x, width, channel, CHANNELS: tl.constexpr):
    rows = image_map + (y * width.to(tl.int32) + x).to(tl.int64) * CHANNELS
    return rows[:, None] + channel[None, :]


@triton.jit
def _bin_pointers(bins, box, row, channel, SIDE: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a row of bins of (N, SIDE, SIDE, CHANNELS), and which of them exist."""
    column = tl.arange(0, BINS)
    numbers = (box * SIDE + row) * SIDE + column
    mask = (column < SIDE)[:, None] & (channel < CHANNELS)[None, :]
    return bins + numbers[:, None] * CHANNELS + channel[None, :], mask


@triton.jit
def forward_kernel(
    levels,
    heights,
    widths,
    strides,
    boxes,
    image_of_box,
    level_of_box,
    out,
    SIDE: tl.constexpr,
    BINS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (boxes x rows of bins, blocks of channels): out (N, SIDE, SIDE, CHANNELS)."""
    box, row = (tl.program_id(0) // SIDE).to(tl.int64), tl.program_id(0) % SIDE
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image_map, height, width, stride, corners = _place(
        levels, heights, widths, strides, boxes, image_of_box, level_of_box, box, CHANNELS
    )
    start_x, length_x, step_x, samples_x = _grid(tl.load(corners), tl.load(corners + 2), stride, SIDE)
    start_y, length_y, step_y, samples_y = _grid(tl.load(corners + 1), tl.load(corners + 3), stride, SIDE)
    pooled = tl.full((BINS, BLOCK), 0.0, start_x.dtype)
    if (samples_x > 0.0) & (samples_y > 0.0):  # otherwise a bin has no samples
        bin_x, bin_y = start_x + tl.arange(0, BINS) * length_x, start_y + row * length_y
        first_x, last_x = _touched_cells(start_x, SIDE * length_x, step_x, width)
        first_y, last_y = _touched_cells(bin_y, length_y, step_y, height)
        for begin in range(first_x, last_x + 1, CELLS):
            x = begin + tl.arange(0, CELLS)
            mask = (x <= last_x)[:, None] & (channel < CHANNELS)[None, :]
            summed = tl.full((CELLS, BLOCK), 0.0, start_x.dtype)
            for y in range(first_y, last_y + 1):
                cells = tl.load(_cell_pointers(image_map, y, x, width, channel, CHANNELS), mask=mask, other=0.0)
                summed += _weights(y, bin_y, step_y, samples_y, height) * cells.to(start_x.dtype)
            weights = _weights(x[None, :], bin_x[:, None], step_x, samples_x, width)
            pooled += tl.dot(weights, summed, input_precision="ieee")  # ieee: float32 itself, without TF32's rounding
    bins, present = _bin_pointers(out, box, row, channel, SIDE, BINS, CHANNELS)
    tl.store(bins, pooled, mask=present)


@triton.jit
def backward_kernel(
    level_gradients,
    heights,
    widths,
    strides,
    boxes,
    image_of_box,
    level_of_box,
    out_gradient,
    SIDE: tl.constexpr,
    BINS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid as above: adds to `level_gradients`, of the boxes' dtype, what out_gradient (N, SIDE, SIDE, CHANNELS) is."""
    box, row = (tl.program_id(0) // SIDE).to(tl.int64), tl.program_id(0) % SIDE
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image_map, height, width, stride, corners = _place(
        level_gradients, heights, widths, strides, boxes, image_of_box, level_of_box, box, CHANNELS
    )
    start_x, length_x, step_x, samples_x = _grid(tl.load(corners), tl.load(corners + 2), stride, SIDE)
    start_y, length_y, step_y, samples_y = _grid(tl.load(corners + 1), tl.load(corners + 3), stride, SIDE)
    if (samples_x > 0.0) & (samples_y > 0.0):
        bins, present = _bin_pointers(out_gradient, box, row, channel, SIDE, BINS, CHANNELS)
        upstream = tl.load(bins, mask=present, other=0.0)
        bin_x, bin_y = start_x + tl.arange(0, BINS) * length_x, start_y + row * length_y
        first_x, last_x = _touched_cells(start_x, SIDE * length_x, step_x, width)
        first_y, last_y = _touched_cells(bin_y, length_y, step_y, height)
        for begin in range(first_x, last_x + 1, CELLS):
            x = begin + tl.arange(0, CELLS)
            mask = (x <= last_x)[:, None] & (channel < CHANNELS)[None, :]
            weights = _weights(x[:, None], bin_x[None, :], step_x, samples_x, width)
            summed = tl.dot(weights, upstream, input_precision="ieee")
            for y in range(first_y, last_y + 1):
                cells = _cell_pointers(image_map, y, x, width, channel, CHANNELS)
                weight = _weights(y, bin_y, step_y, samples_y, height)
                tl.atomic_add(cells, weight * summed, mask=mask, sem="relaxed")
