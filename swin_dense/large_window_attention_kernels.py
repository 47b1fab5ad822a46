"""The Triton kernels of `fused_window_attention` for gradients of windows of several tiles.

A pair of tiles is computed three times: for the queries, for keys with values, and for the position bias; each sums
over another side. Importing this file imports Triton. `window_attention_tiles` explains tiles, programs and parameters.
"""

# Parameters are tiles, pointers and numbers of the compiled language, which the hints of Python cannot tell.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from swin_dense.window_attention_tiles import (
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
def query_gradient_kernel(
    qkv,
    padding,
    bias,
    logit_scale,
    out,
    out_gradient,
    log_sums,
    means,
    qkv_gradient,
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
    """The queries' gradient in large windows. Grid (heads, tiles of queries, runs of windows).

    Also writes `means` (heads, windows, AREA): the mean, under the attention weights, of the weights' gradients.
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    head = tl.program_id(0)
    channels, channel = tl.num_programs(0) * HEAD_DIM, head * HEAD_DIM
    geometry = (height, width, shift_y, shift_x)
    source = (qkv + channel, padding + channel, stride_image, stride_row, stride_cell)
    run = tl.program_id(2)
    scale = load_scale(logit_scale, head, HEAD_DIM, COSINE)
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale_sum = tl.full((BLOCK,), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, real = cells_of(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
        upstream = load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
        attended = load_tile(out + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
        mean = tl.sum(upstream.to(tl.float32) * attended.to(tl.float32), axis=1)
        window_rows = (head.to(tl.int64) * num_windows + window) * AREA
        tl.store(means + window_rows + query, mean, mask=query < AREA)
        gradient = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        for start in range(0, AREA, BLOCK):
            key = start + tl.arange(0, BLOCK)
            rows, _, _ = cells_of(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
            keys = load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
            values = load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
            tile_bias = bias_tile(bias, head, query, key, AREA)
            logits = logits_of(queries, keys, scale, tile_bias, COSINE)
            if SHIFTED:
                logits = separate(logits, window, query, key, geometry, mask_value, WINDOW)
            weights = weights_of(logits, log_sums + window_rows, query, AREA)
            logit_gradient = weights * (product(upstream, tl.trans(values)) - mean[:, None])
            gradient += product(rounded(logit_gradient, keys.dtype), unit_rows(keys, COSINE))
        if COSINE:
            gradient, along = before_unit(gradient, queries, scale)
            scale_sum += along
        else:
            gradient *= scale
        store_tile(qkv_gradient + number * (3 * channels) + channel, gradient, real, HEAD_DIM, HEAD_TILE)
    if COSINE:
        part = run * tl.num_programs(1) + tl.program_id(1)
        tl.store(scale_parts + part * tl.num_programs(0) + head, tl.sum(scale_sum, axis=0))


@triton.jit(do_not_specialize=SIZES)
def key_value_gradient_kernel(
    qkv,
    padding,
    bias,
    logit_scale,
    out_gradient,
    log_sums,
    means,
    qkv_gradient,
    padding_parts,
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
    """The keys' and values' gradients in large windows. Grid (heads, tiles of keys, runs of windows)."""
    AREA: tl.constexpr = WINDOW * WINDOW
    head = tl.program_id(0)
    channels, channel = tl.num_programs(0) * HEAD_DIM, head * HEAD_DIM
    geometry = (height, width, shift_y, shift_x)
    source = (qkv + channel, padding + channel, stride_image, stride_row, stride_cell)
    run = tl.program_id(2)
    scale = load_scale(logit_scale, head, HEAD_DIM, COSINE)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    value_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, key_real = cells_of(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        gradient_rows = qkv_gradient + number * (3 * channels) + channels + channel
        keys = load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
        values = load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
        window_rows = (head.to(tl.int64) * num_windows + window) * AREA
        key_gradient = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        value_gradient = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        for start in range(0, AREA, BLOCK):
            query = start + tl.arange(0, BLOCK)
            rows, number, real = cells_of(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
            queries = load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
            upstream = load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
            mean = tl.load(means + window_rows + query, mask=query < AREA, other=0.0)
            tile_bias = bias_tile(bias, head, query, key, AREA)
            logits = logits_of(queries, keys, scale, tile_bias, COSINE)
            if SHIFTED:
                logits = separate(logits, window, query, key, geometry, mask_value, WINDOW)
            weights = weights_of(logits, log_sums + window_rows, query, AREA)
            logit_gradient = weights * (product(upstream, tl.trans(values)) - mean[:, None])
            value_gradient += product(tl.trans(rounded(weights, upstream.dtype)), upstream)
            key_gradient += product(tl.trans(rounded(logit_gradient, queries.dtype)), unit_rows(queries, COSINE))
        if COSINE:
            key_gradient, _ = before_unit(key_gradient, keys, scale)
        else:
            key_gradient *= scale
        store_tile(gradient_rows, key_gradient, key_real, HEAD_DIM, HEAD_TILE)
        store_tile(gradient_rows + channels, value_gradient, key_real, HEAD_DIM, HEAD_TILE)
        if may_hold_padding(window, height, width, WINDOW):
            padded = ((key < AREA) & ~key_real)[:, None]
            key_sum += tl.sum(tl.where(padded, key_gradient, 0.0), axis=0)
            value_sum += tl.sum(tl.where(padded, value_gradient, 0.0), axis=0)
    part = run * tl.num_programs(1) + tl.program_id(1)
    store_padding_sums(padding_parts, key_sum, value_sum, part, head, channels, HEAD_DIM, HEAD_TILE)


@triton.jit(do_not_specialize=SIZES)
def bias_gradient_kernel(
    qkv,
    padding,
    bias,
    logit_scale,
    out_gradient,
    log_sums,
    means,
    bias_parts,
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
    """The position bias's gradient in large windows. Grid (heads, pairs of tiles, runs of windows)."""
    AREA: tl.constexpr = WINDOW * WINDOW
    NUM_TILES: tl.constexpr = (AREA + BLOCK - 1) // BLOCK
    head = tl.program_id(0)
    channels, channel = tl.num_programs(0) * HEAD_DIM, head * HEAD_DIM
    geometry = (height, width, shift_y, shift_x)
    source = (qkv + channel, padding + channel, stride_image, stride_row, stride_cell)
    run = tl.program_id(2)
    scale = load_scale(logit_scale, head, HEAD_DIM, COSINE)
    query = tl.program_id(1) // NUM_TILES * BLOCK + tl.arange(0, BLOCK)
    key = tl.program_id(1) % NUM_TILES * BLOCK + tl.arange(0, BLOCK)
    tile_bias = bias_tile(bias, head, query, key, AREA)
    bias_sum = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, _, _ = cells_of(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        keys = load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
        values = load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
        rows, number, real = cells_of(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
        upstream = load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
        window_rows = (head.to(tl.int64) * num_windows + window) * AREA
        mean = tl.load(means + window_rows + query, mask=query < AREA, other=0.0)
        logits = logits_of(queries, keys, scale, tile_bias, COSINE)
        if SHIFTED:
            logits = separate(logits, window, query, key, geometry, mask_value, WINDOW)
        weights = weights_of(logits, log_sums + window_rows, query, AREA)
        bias_sum += weights * (product(upstream, tl.trans(values)) - mean[:, None])
    store_bias_sum(bias_parts, bias_sum, run, head, query, key, AREA)
