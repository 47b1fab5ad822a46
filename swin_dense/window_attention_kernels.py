"""The Triton kernels of `fused_window_attention`: forward, and backward for windows of one tile.

Importing this file imports Triton. `window_attention_tiles` explains tiles, programs and parameters.
"""

# Parameters are tiles, pointers and numbers of the compiled language, which the hints of Python cannot tell.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from swin_dense.window_attention_tiles import (
    LOWEST,
    SIZES,
    before_unit,
    bias_tile,
    cells_of,
    load_scale,
    load_tile,
    logits_of,
    may_hold_padding,
    product,
    rounded,
    separate,
    store_bias_sum,
    store_padding_sums,
    store_tile,
    unit_rows,
    weights_of,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv,
    padding,
    bias,
    logit_scale,
    out,
    log_sums,
    stride_image,
    stride_row,
    stride_cell,
    height,
    width,
    shift_y,
    shift_x,
    mask_value,
    num_windows,
    windows_per_program,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Grid (heads, tiles of queries, runs of windows): out (B, H, W, C), log_sums (heads, windows, AREA)."""
    AREA: tl.constexpr = WINDOW * WINDOW
    ONE_TILE: tl.constexpr = AREA <= BLOCK
    head = tl.program_id(0)
    channels, channel = tl.num_programs(0) * HEAD_DIM, head * HEAD_DIM
    geometry = (height, width, shift_y, shift_x)
    source = (qkv + channel, padding + channel, stride_image, stride_row, stride_cell)
    scale = load_scale(logit_scale, head, HEAD_DIM, COSINE)
    query = (0 if ONE_TILE else tl.program_id(1) * BLOCK) + tl.arange(0, BLOCK)
    first = tl.program_id(2) * windows_per_program
    if ONE_TILE:
        tile_bias = bias_tile(bias, head, query, query, AREA)
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, real = cells_of(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.full((BLOCK,), 0.0, tl.float32)
        attended = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        for start in range(0, AREA, BLOCK):
            key = start + tl.arange(0, BLOCK)
            rows, _, _ = cells_of(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
            keys = load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
            values = load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
            if not ONE_TILE:
                tile_bias = bias_tile(bias, head, query, key, AREA)
            logits = logits_of(queries, keys, scale, tile_bias, COSINE)
            if SHIFTED:
                logits = separate(logits, window, query, key, geometry, mask_value, WINDOW)
            larger = tl.maximum(largest, tl.max(logits, axis=1))
            weights = tl.exp2(logits - larger[:, None])
            if not ONE_TILE:
                shrunk = tl.exp2(largest - larger)
                total *= shrunk
                attended *= shrunk[:, None]
            total += tl.sum(weights, axis=1)
            attended += product(rounded(weights, values.dtype), values)
            largest = larger
        attended *= (1.0 / total)[:, None]
        store_tile(out + number * channels + channel, attended, real, HEAD_DIM, HEAD_TILE)
        log_sum_rows = log_sums + (head.to(tl.int64) * num_windows + window) * AREA
        tl.store(log_sum_rows + query, largest + tl.log2(total), mask=query < AREA)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    qkv,
    padding,
    bias,
    logit_scale,
    out_gradient,
    log_sums,
    qkv_gradient,
    padding_parts,
    bias_parts,
    scale_parts,
    stride_image,
    stride_row,
    stride_cell,
    height,
    width,
    shift_y,
    shift_x,
    mask_value,
    num_windows,
    windows_per_program,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr,
    COSINE: tl.constexpr,
):
    """All gradients of windows of one tile. Grid (heads, 1, runs of windows); partial sums are over runs."""
    AREA: tl.constexpr = WINDOW * WINDOW
    head = tl.program_id(0)
    channels, channel = tl.num_programs(0) * HEAD_DIM, head * HEAD_DIM
    geometry = (height, width, shift_y, shift_x)
    source = (qkv + channel, padding + channel, stride_image, stride_row, stride_cell)
    run = tl.program_id(2)
    scale = load_scale(logit_scale, head, HEAD_DIM, COSINE)
    cell = tl.arange(0, BLOCK)
    present = cell < AREA
    tile_bias = bias_tile(bias, head, cell, cell, AREA)
    bias_sum = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    key_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    value_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    scale_sum = tl.full((BLOCK,), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, real = cells_of(window, cell, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = load_tile(rows, present, HEAD_DIM, HEAD_TILE)
        keys = load_tile(rows + channels, present, HEAD_DIM, HEAD_TILE)
        values = load_tile(rows + 2 * channels, present, HEAD_DIM, HEAD_TILE)
        upstream = load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)

        logits = logits_of(queries, keys, scale, tile_bias, COSINE)
        if SHIFTED:
            logits = separate(logits, window, cell, cell, geometry, mask_value, WINDOW)
        window_log_sums = log_sums + (head.to(tl.int64) * num_windows + window) * AREA
        weights = weights_of(logits, window_log_sums, cell, AREA)
        weight_gradient = product(upstream, tl.trans(values))
        mean = tl.sum(weights * weight_gradient, axis=1)
        logit_gradient = weights * (weight_gradient - mean[:, None])
        bias_sum += logit_gradient

        logit_gradient = rounded(logit_gradient, queries.dtype)
        value_gradient = product(tl.trans(rounded(weights, upstream.dtype)), upstream)
        query_gradient = product(logit_gradient, unit_rows(keys, COSINE))
        key_gradient = product(tl.trans(logit_gradient), unit_rows(queries, COSINE))
        if COSINE:
            query_gradient, along = before_unit(query_gradient, queries, scale)
            key_gradient, _ = before_unit(key_gradient, keys, scale)
            scale_sum += along
        else:
            query_gradient *= scale
            key_gradient *= scale

        rows = qkv_gradient + number * (3 * channels) + channel
        store_tile(rows, query_gradient, real, HEAD_DIM, HEAD_TILE)
        store_tile(rows + channels, key_gradient, real, HEAD_DIM, HEAD_TILE)
        store_tile(rows + 2 * channels, value_gradient, real, HEAD_DIM, HEAD_TILE)
        if may_hold_padding(window, height, width, WINDOW):
            padded = (present & ~real)[:, None]
            key_sum += tl.sum(tl.where(padded, key_gradient, 0.0), axis=0)
            value_sum += tl.sum(tl.where(padded, value_gradient, 0.0), axis=0)

    store_bias_sum(bias_parts, bias_sum, run, head, cell, cell, AREA)
    store_padding_sums(padding_parts, key_sum, value_sum, run, head, channels, HEAD_DIM, HEAD_TILE)
    if COSINE:
        tl.store(scale_parts + run * tl.num_programs(0) + head, tl.sum(scale_sum, axis=0))
