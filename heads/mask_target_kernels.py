"""The Triton kernel of `fused_mask_targets`; importing this file imports Triton.

RoIAlign (He et al., 2017, https://arxiv.org/abs/1703.06870) of masks of which only windows are kept. Each step is
rounded, and steps and sums have the order of `torchvision.ops.roi_align` on a CPU: averages that are one half there, as
those of boxes along outlines often are, fall on the same side here. So a program adds up the samples of its bins one
after the other.
"""

# Parameters are tiles, pointers and numbers of the compiled language, which the hints of Python cannot tell.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bins(first, last, SIZE: tl.constexpr):
    """A side of a box cut into bins: its start where 0 is the centre of a pixel, a bin's length, samples in a bin."""
    start = first - 0.5
    length = tl.div_rn(last - 0.5 - start, SIZE * 1.0)
    return start, length, tl.where(length > 0, tl.ceil(length), 0.0).to(tl.int32)


@triton.jit
def _positions(start, length, bins, sample, num_samples):
    """Where along a side one sample of each of some bins lies."""
    return start + bins * length + tl.div_rn((sample + 0.5) * length, num_samples.to(tl.float32))


@triton.jit
def _neighbours(position, image_side, window_start, window_side):
    """The pixels before and after each position: their places in the mask's window, whether they are in it, weights."""
    is_near = (position >= -1.0) & (position <= image_side)  # the image's edge continues for one pixel
    position = tl.minimum(tl.maximum(position, 0.0), image_side - 1.0)
    before = position.to(tl.int32)
    after_weight = position - before
    before_weight = tl.where(is_near, 1.0 - after_weight, 0.0)
    after_weight = tl.where(is_near, after_weight, 0.0)  # 0 where the image ends after `before`
    before -= window_start
    after = before + 1
    is_before, is_after = (before >= 0) & (before < window_side), (after >= 0) & (after < window_side)
    return (before, is_before, before_weight), (after, is_after, after_weight)


@triton.jit
def _part(window, width, row, column):
    """What one of its four pixels adds to each sample."""
    y, is_y, weight_y = row
    x, is_x, weight_x = column
    pixels = tl.load(window + y * width + x, mask=is_y & is_x, other=0)
    return weight_y * weight_x * pixels.to(tl.float32)


@triton.jit
def mask_target_kernel(
    pixels, table, boxes, matched, first_rows, targets, COLUMNS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (boxes, blocks of bins): targets (boxes, SIZE, SIZE) float32, 0 or 1.

    `pixels` are those of all images, `table` (rows, COLUMNS) says of each mask where it begins in them, height, width,
    left, top, height and width of its image. A box (left, top, right, bottom) has that of row `first_rows` + `matched`.
    """
    number = tl.program_id(0)
    entry = table + (tl.load(first_rows + number) + tl.load(matched + number)) * COLUMNS
    window = pixels + tl.load(entry)
    height, width = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    left, top = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32)
    image_height, image_width = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    box = boxes + number * 4
    start_x, length_x, samples_x = _bins(tl.load(box), tl.load(box + 2), SIZE)
    start_y, length_y, samples_y = _bins(tl.load(box + 1), tl.load(box + 3), SIZE)

    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // SIZE, place % SIZE
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for sample_y in range(samples_y):
        y = _positions(start_y, length_y, row, sample_y, samples_y)
        above, below = _neighbours(y, image_height, top, height)
        for sample_x in range(samples_x):
            x = _positions(start_x, length_x, column, sample_x, samples_x)
            before, after = _neighbours(x, image_width, left, width)
            sample = _part(window, width, above, before) + _part(window, width, above, after)
            total += sample + _part(window, width, below, before) + _part(window, width, below, after)
    average = tl.div_rn(total, tl.maximum(samples_y * samples_x, 1).to(tl.float32))
    is_object = (average >= 0.5).to(tl.float32)
    tl.store(targets + number * (SIZE * SIZE) + place, is_object, mask=place < SIZE * SIZE)
