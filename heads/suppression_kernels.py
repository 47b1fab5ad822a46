"""The Triton kernel of `grouped_nms`; importing this file imports Triton.

A program takes one group, block after block in the order of scores: a block is compared with all boxes kept before it,
then with itself, and what stays is appended to the kept ones. Programs share no output, so results repeat.
"""

# Parameters are tiles, pointers and numbers of the compiled language, which the hints of Python cannot tell.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_boxes(start, step, present):
    """Left, top, right and bottom, `step` numbers apart; a point, which overlaps nothing, where there is no box."""
    left = tl.load(start, mask=present, other=0.0)
    top = tl.load(start + step, mask=present, other=0.0)
    right = tl.load(start + 2 * step, mask=present, other=0.0)
    bottom = tl.load(start + 3 * step, mask=present, other=0.0)
    return left, top, right, bottom


@triton.jit
def _store_boxes(start, step, boxes, present):
    left, top, right, bottom = boxes
    tl.store(start, left, mask=present)
    tl.store(start + step, top, mask=present)
    tl.store(start + 2 * step, right, mask=present)
    tl.store(start + 3 * step, bottom, mask=present)


@triton.jit
def _overlap(boxes, others, threshold):
    """(BLOCK, BLOCK): whether the IoU of boxes, down, and others, across, is above the threshold."""
    left, top, right, bottom = boxes
    other_left, other_top, other_right, other_bottom = others
    width = tl.minimum(right[:, None], other_right[None, :]) - tl.maximum(left[:, None], other_left[None, :])
    height = tl.minimum(bottom[:, None], other_bottom[None, :]) - tl.maximum(top[:, None], other_top[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area, other_area = (right - left) * (bottom - top), (other_right - other_left) * (other_bottom - other_top)
    union = area[:, None] + other_area[None, :] - shared
    # Most pairs share nothing. Their IoU counts as -1, since devices divide zeros more slowly than other numbers.
    shared = tl.where(shared > 0.0, shared, -union)
    if union.dtype == tl.float32:
        iou = tl.div_rn(shared, union)  # where "/" would not round to nearest
    else:
        iou = shared / union
    return iou > threshold


@triton.jit
def _any(table):
    """Whether a truth value of each row is true."""
    return tl.max(table.to(tl.int32), axis=1) > 0


@triton.jit
def _settled(candidates, overlap):
    """Which candidates stay, given which earlier ones each overlaps: what stays depends on what stays before it."""
    stays = candidates
    unsettled = True
    while unsettled:  # each round settles at least one box more, usually many
        still = candidates & ~_any(overlap & stays[None, :])
        unsettled = tl.max((still != stays).to(tl.int32), axis=0) > 0
        stays = still
    return stays


@triton.jit(do_not_specialize=["num_rows"])
def suppression_kernel(boxes, order, starts, threshold, kept_boxes, keep, num_rows, BLOCK: tl.constexpr):
    """Grid (groups,). Sets `keep` (N,) where a box stays and leaves it elsewhere; `kept_boxes` (4, N) is room to work.

    `order` (N,) are rows of `boxes` (N, 4) by group and falling score, `starts` (groups + 1,) where groups begin in it,
    `threshold` (1,) is of the dtype of the boxes.
    """
    start = tl.load(starts + tl.program_id(0)).to(tl.int32)
    size = tl.load(starts + tl.program_id(0) + 1).to(tl.int32) - start
    limit = tl.load(threshold)
    order += start
    kept_boxes += start
    lane = tl.arange(0, BLOCK)
    num_kept = 0
    for first in range(0, size, BLOCK):
        present = first + lane < size
        rows = tl.load(order + first + lane, mask=present, other=0)
        block = _load_boxes(boxes + 4 * rows, 1, present)

        suppressed = tl.full((BLOCK, BLOCK), False, tl.int1)
        for first_kept in range(0, num_kept, BLOCK):
            place = first_kept + lane
            better = _load_boxes(kept_boxes + place, num_rows, place < num_kept)
            suppressed |= _overlap(block, better, limit)
        overlap = _overlap(block, block, limit) & (lane[:, None] > lane[None, :])
        stays = _settled(present & ~_any(suppressed), overlap)

        tl.store(keep + rows, stays, mask=stays)
        place = num_kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        _store_boxes(kept_boxes + place, num_rows, block, stays)
        num_kept += tl.sum(stays.to(tl.int32), axis=0)
        tl.debug_barrier()  # the next block reads what any thread wrote
