"""The Triton kernels of `fused_window_attention`; importing this file imports Triton.

A window is a number, row-major within an image, image after image. Its cells are numbered row-major too; as queries
and as keys they are cut into tiles of BLOCK cells, one tile where the window is small. A program handles one head, one
tile (or pair of tiles) and a run of windows, so that what depends on the tile alone, the position bias and the sums of
gradients over windows, stays in registers. Programs share no output: nothing is atomic, all results repeat bit for bit.

Upper-case parameters are fixed when a kernel is compiled: WINDOW is M, AREA is M M, HEAD_DIM the channels of a head and
HEAD_TILE the power of two that holds them, ALIGNMENT the bytes that the addresses of cells divide by, SHIFTED whether
the map is shifted, COSINE whether logits are those of Swin V2. Logits are in units of log 2: hardware computes exp2.
"""

# Parameters are tiles, pointers and numbers of the compiled language, which the hints of Python cannot tell.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_LENGTH = tl.constexpr(1e-12)  # of `torch.nn.functional.normalize`
LOWEST = tl.constexpr(-1e30)  # below every logit, yet finite: a whole tile may be masked with -inf
# Triton's interpreter differs from devices in two ways: it rounds to bfloat16 towards zero, and multiplies its bits.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Sizes that vary from image to image and from stage to stage: none of them is worth a compilation of its own.
SIZES = ["height", "width", "shift_y", "shift_x", "num_windows", "windows_per_program"]


@triton.jit
def _rounded(tile, dtype: tl.constexpr):
    """A float32 tile in another dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        tile = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def _product(left, right):
    """A matrix product of two tiles, summed in float32; float32 itself without TF32's rounding."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _source(position, size, shift, WINDOW: tl.constexpr, PAD_FIRST: tl.constexpr):
    """Where positions along one side of the padded, shifted map come from, and whether that is in the map."""
    wrap = (size + WINDOW - 1) // WINDOW * WINDOW if PAD_FIRST else size
    source = position + shift % wrap
    source = tl.where(source >= wrap, source - wrap, source)
    return source, (position < wrap) & (source < size)


@triton.jit
def _position(window, height, width, WINDOW: tl.constexpr):
    """The image of a window, and its row and column from the front and from the back."""
    rows = (height + WINDOW - 1) // WINDOW
    columns = (width + WINDOW - 1) // WINDOW
    line = window // columns
    row, column = line % rows, window % columns
    return line // rows, row, column, rows - 1 - row, columns - 1 - column


@triton.jit
def _cells(window, cell, geometry, qkv, WINDOW: tl.constexpr, PAD_FIRST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where cells of a window are read (padded ones in one place), their places in a map, and whether these exist."""
    height, width, shift_y, shift_x = geometry
    start, padding, stride_image, stride_row, stride_cell = qkv
    image, row, column, _, _ = _position(window, height, width, WINDOW)
    y, real_y = _source(row * WINDOW + cell // WINDOW, height, shift_y, WINDOW, PAD_FIRST)
    x, real_x = _source(column * WINDOW + cell % WINDOW, width, shift_x, WINDOW, PAD_FIRST)
    real = real_y & real_x & (cell < WINDOW * WINDOW)
    image, y, x = image.to(tl.int64), y.to(tl.int64), x.to(tl.int64)  # maps may have more than 2^31 numbers
    rows = tl.where(real, start + image * stride_image + y * stride_row + x * stride_cell, padding)
    return tl.multiple_of(rows, ALIGNMENT), (image * height + y) * width + x, real


@triton.jit
def _separate(logits, window, query, key, geometry, mask_value, WINDOW: tl.constexpr):
    """Add `mask_value` where query and key are of different regions of the shifted map."""
    height, width, shift_y, shift_x = geometry
    _, _, _, rows_after, columns_after = _position(window, height, width, WINDOW)
    # Only the last windows along a side hold two regions: unmoved cells, and those that the shift rolled in.
    if (rows_after == 0) | (columns_after == 0):
        start_y, start_x = WINDOW - shift_y, WINDOW - shift_x
        differ_y = (query // WINDOW >= start_y)[:, None] != (key // WINDOW >= start_y)[None, :]
        differ_x = (query % WINDOW >= start_x)[:, None] != (key % WINDOW >= start_x)[None, :]
        differ = ((rows_after == 0) & differ_y) | ((columns_after == 0) & differ_x)
        logits += tl.where(differ, mask_value * LOG2_E, 0.0)
    return logits


@triton.jit
def _may_hold_padding(window, height, width, WINDOW: tl.constexpr):
    """Whether padded cells can lie in a window: a shift brings them at most into the last but one."""
    _, _, _, rows_after, columns_after = _position(window, height, width, WINDOW)
    return ((height % WINDOW != 0) & (rows_after < 2)) | ((width % WINDOW != 0) & (columns_after < 2))


@triton.jit
def _tile_mask(present, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr):
    mask = present[:, None]
    if HEAD_DIM < HEAD_TILE:
        mask = mask & (tl.arange(0, HEAD_TILE) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _load_tile(rows, present, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr):
    """(BLOCK, HEAD_TILE); zeros where a cell or a channel does not exist."""
    pointers = rows[:, None] + tl.arange(0, HEAD_TILE)[None, :]
    return tl.load(pointers, mask=_tile_mask(present, HEAD_DIM, HEAD_TILE), other=0.0)


@triton.jit
def _store_tile(rows, tile, present, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr):
    pointers = rows[:, None] + tl.arange(0, HEAD_TILE)[None, :]
    tl.store(pointers, _rounded(tile, rows.dtype.element_ty), mask=_tile_mask(present, HEAD_DIM, HEAD_TILE))


@triton.jit
def _bias_tile(bias, head, query, key, AREA: tl.constexpr):
    """The position bias of queries and keys; -inf for keys beyond the window, 0 for queries beyond it."""
    pointers = bias + (head * AREA + query[:, None]).to(tl.int64) * AREA + key[None, :]
    values = tl.load(pointers, mask=(query < AREA)[:, None] & (key < AREA)[None, :], other=0.0)
    return tl.where((key < AREA)[None, :], values.to(tl.float32) * LOG2_E, float("-inf"))


@triton.jit
def _scale(logit_scale, head, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr):
    """What products of queries and keys are multiplied by."""
    if COSINE:
        return tl.load(logit_scale + head).to(tl.float32)
    return HEAD_DIM**-0.5


@triton.jit
def _lengths(tile):
    """The length of each row, never 0."""
    tile = tile.to(tl.float32)
    return tl.maximum(tl.sqrt(tl.sum(tile * tile, axis=1)), SMALLEST_LENGTH)


@triton.jit
def _unit(tile, COSINE: tl.constexpr):
    """The rows as they are compared: with Swin V2 of unit length."""
    if COSINE:
        return _rounded(tile.to(tl.float32) * (1.0 / _lengths(tile))[:, None], tile.dtype)
    return tile


@triton.jit
def _logits(query, key, scale, bias, COSINE: tl.constexpr):
    """Of a tile of queries and a tile of keys, in units of log 2."""
    logits = _product(query, tl.trans(key))
    if COSINE:
        logits = logits * (scale * LOG2_E / _lengths(query))[:, None] * (1.0 / _lengths(key))[None, :] + bias
    else:
        logits = logits * (scale * LOG2_E) + bias
    return logits


@triton.jit
def _before_unit(gradient, tile, scale):
    """The gradient of rows from that of their unit rows over `scale`; and how much of the latter lies along them."""
    length = _lengths(tile)
    unit = tile.to(tl.float32) * (1.0 / length)[:, None]
    along = tl.sum(gradient * unit, axis=1)
    # The length of shorter rows counts as a constant, as in `torch.nn.functional.normalize`.
    radial = tl.where(length > SMALLEST_LENGTH, along, 0.0)
    return (gradient - unit * radial[:, None]) * (scale / length)[:, None], along


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
    scale = _scale(logit_scale, head, HEAD_DIM, COSINE)
    query = (0 if ONE_TILE else tl.program_id(1) * BLOCK) + tl.arange(0, BLOCK)
    first = tl.program_id(2) * windows_per_program
    if ONE_TILE:
        tile_bias = _bias_tile(bias, head, query, query, AREA)
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, real = _cells(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = _load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.full((BLOCK,), 0.0, tl.float32)
        attended = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        for start in range(0, AREA, BLOCK):
            key = start + tl.arange(0, BLOCK)
            rows, _, _ = _cells(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
            keys = _load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
            values = _load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
            if not ONE_TILE:
                tile_bias = _bias_tile(bias, head, query, key, AREA)
            logits = _logits(queries, keys, scale, tile_bias, COSINE)
            if SHIFTED:
                logits = _separate(logits, window, query, key, geometry, mask_value, WINDOW)
            larger = tl.maximum(largest, tl.max(logits, axis=1))
            weights = tl.exp2(logits - larger[:, None])
            if not ONE_TILE:
                shrunk = tl.exp2(largest - larger)
                total *= shrunk
                attended *= shrunk[:, None]
            total += tl.sum(weights, axis=1)
            attended += _product(_rounded(weights, values.dtype), values)
            largest = larger
        attended *= (1.0 / total)[:, None]
        _store_tile(out + number * channels + channel, attended, real, HEAD_DIM, HEAD_TILE)
        log_sum_rows = log_sums + (head.to(tl.int64) * num_windows + window) * AREA
        tl.store(log_sum_rows + query, largest + tl.log2(total), mask=query < AREA)


@triton.jit
def _weights(logits, log_sums, query, AREA: tl.constexpr):
    """The attention weights again; 0 for queries beyond the window."""
    return tl.exp2(logits - tl.load(log_sums + query, mask=query < AREA, other=float("inf"))[:, None])


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
    scale = _scale(logit_scale, head, HEAD_DIM, COSINE)
    cell = tl.arange(0, BLOCK)
    present = cell < AREA
    tile_bias = _bias_tile(bias, head, cell, cell, AREA)
    bias_sum = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    key_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    value_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    scale_sum = tl.full((BLOCK,), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, real = _cells(window, cell, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = _load_tile(rows, present, HEAD_DIM, HEAD_TILE)
        keys = _load_tile(rows + channels, present, HEAD_DIM, HEAD_TILE)
        values = _load_tile(rows + 2 * channels, present, HEAD_DIM, HEAD_TILE)
        upstream = _load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)

        logits = _logits(queries, keys, scale, tile_bias, COSINE)
        if SHIFTED:
            logits = _separate(logits, window, cell, cell, geometry, mask_value, WINDOW)
        window_log_sums = log_sums + (head.to(tl.int64) * num_windows + window) * AREA
        weights = _weights(logits, window_log_sums, cell, AREA)
        weight_gradient = _product(upstream, tl.trans(values))
        mean = tl.sum(weights * weight_gradient, axis=1)
        logit_gradient = weights * (weight_gradient - mean[:, None])
        bias_sum += logit_gradient

        logit_gradient = _rounded(logit_gradient, queries.dtype)
        value_gradient = _product(tl.trans(_rounded(weights, upstream.dtype)), upstream)
        query_gradient = _product(logit_gradient, _unit(keys, COSINE))
        key_gradient = _product(tl.trans(logit_gradient), _unit(queries, COSINE))
        if COSINE:
            query_gradient, along = _before_unit(query_gradient, queries, scale)
            key_gradient, _ = _before_unit(key_gradient, keys, scale)
            scale_sum += along
        else:
            query_gradient *= scale
            key_gradient *= scale

        rows = qkv_gradient + number * (3 * channels) + channel
        _store_tile(rows, query_gradient, real, HEAD_DIM, HEAD_TILE)
        _store_tile(rows + channels, key_gradient, real, HEAD_DIM, HEAD_TILE)
        _store_tile(rows + 2 * channels, value_gradient, real, HEAD_DIM, HEAD_TILE)
        if _may_hold_padding(window, height, width, WINDOW):
            padded = (present & ~real)[:, None]
            key_sum += tl.sum(tl.where(padded, key_gradient, 0.0), axis=0)
            value_sum += tl.sum(tl.where(padded, value_gradient, 0.0), axis=0)

    _store_bias_sum(bias_parts, bias_sum, run, head, cell, cell, AREA)
    _store_padding_sums(padding_parts, key_sum, value_sum, run, head, channels, HEAD_DIM, HEAD_TILE)
    if COSINE:
        tl.store(scale_parts + run * tl.num_programs(0) + head, tl.sum(scale_sum, axis=0))


@triton.jit
def _store_bias_sum(bias_parts, bias_sum, run, head, query, key, AREA: tl.constexpr):
    matrix = (run * tl.num_programs(0) + head).to(tl.int64)
    pointers = bias_parts + (matrix * AREA + query[:, None]) * AREA + key[None, :]
    tl.store(pointers, bias_sum, mask=(query < AREA)[:, None] & (key < AREA)[None, :])


@triton.jit
def _store_padding_sums(
    padding_parts, key_sum, value_sum, part, head, channels, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr
):
    channel = tl.arange(0, HEAD_TILE)
    pointers = padding_parts + part * (2 * channels) + head * HEAD_DIM + channel
    tl.store(pointers, key_sum, mask=channel < HEAD_DIM)
    tl.store(pointers + channels, value_sum, mask=channel < HEAD_DIM)


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
    scale = _scale(logit_scale, head, HEAD_DIM, COSINE)
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale_sum = tl.full((BLOCK,), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, real = _cells(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = _load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
        upstream = _load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
        attended = _load_tile(out + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
        mean = tl.sum(upstream.to(tl.float32) * attended.to(tl.float32), axis=1)
        window_rows = (head.to(tl.int64) * num_windows + window) * AREA
        tl.store(means + window_rows + query, mean, mask=query < AREA)
        gradient = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        for start in range(0, AREA, BLOCK):
            key = start + tl.arange(0, BLOCK)
            rows, _, _ = _cells(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
            keys = _load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
            values = _load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
            tile_bias = _bias_tile(bias, head, query, key, AREA)
            logits = _logits(queries, keys, scale, tile_bias, COSINE)
            if SHIFTED:
                logits = _separate(logits, window, query, key, geometry, mask_value, WINDOW)
            weights = _weights(logits, log_sums + window_rows, query, AREA)
            logit_gradient = weights * (_product(upstream, tl.trans(values)) - mean[:, None])
            gradient += _product(_rounded(logit_gradient, keys.dtype), _unit(keys, COSINE))
        if COSINE:
            gradient, along = _before_unit(gradient, queries, scale)
            scale_sum += along
        else:
            gradient *= scale
        _store_tile(qkv_gradient + number * (3 * channels) + channel, gradient, real, HEAD_DIM, HEAD_TILE)
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
    scale = _scale(logit_scale, head, HEAD_DIM, COSINE)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    value_sum = tl.full((HEAD_TILE,), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, number, key_real = _cells(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        gradient_rows = qkv_gradient + number * (3 * channels) + channels + channel
        keys = _load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
        values = _load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
        window_rows = (head.to(tl.int64) * num_windows + window) * AREA
        key_gradient = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        value_gradient = tl.full((BLOCK, HEAD_TILE), 0.0, tl.float32)
        for start in range(0, AREA, BLOCK):
            query = start + tl.arange(0, BLOCK)
            rows, number, real = _cells(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
            queries = _load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
            upstream = _load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
            mean = tl.load(means + window_rows + query, mask=query < AREA, other=0.0)
            tile_bias = _bias_tile(bias, head, query, key, AREA)
            logits = _logits(queries, keys, scale, tile_bias, COSINE)
            if SHIFTED:
                logits = _separate(logits, window, query, key, geometry, mask_value, WINDOW)
            weights = _weights(logits, log_sums + window_rows, query, AREA)
            logit_gradient = weights * (_product(upstream, tl.trans(values)) - mean[:, None])
            value_gradient += _product(tl.trans(_rounded(weights, upstream.dtype)), upstream)
            key_gradient += _product(tl.trans(_rounded(logit_gradient, queries.dtype)), _unit(queries, COSINE))
        if COSINE:
            key_gradient, _ = _before_unit(key_gradient, keys, scale)
        else:
            key_gradient *= scale
        _store_tile(gradient_rows, key_gradient, key_real, HEAD_DIM, HEAD_TILE)
        _store_tile(gradient_rows + channels, value_gradient, key_real, HEAD_DIM, HEAD_TILE)
        if _may_hold_padding(window, height, width, WINDOW):
            padded = ((key < AREA) & ~key_real)[:, None]
            key_sum += tl.sum(tl.where(padded, key_gradient, 0.0), axis=0)
            value_sum += tl.sum(tl.where(padded, value_gradient, 0.0), axis=0)
    part = run * tl.num_programs(1) + tl.program_id(1)
    _store_padding_sums(padding_parts, key_sum, value_sum, part, head, channels, HEAD_DIM, HEAD_TILE)


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
    scale = _scale(logit_scale, head, HEAD_DIM, COSINE)
    query = tl.program_id(1) // NUM_TILES * BLOCK + tl.arange(0, BLOCK)
    key = tl.program_id(1) % NUM_TILES * BLOCK + tl.arange(0, BLOCK)
    tile_bias = _bias_tile(bias, head, query, key, AREA)
    bias_sum = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    first = run * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, num_windows)):
        rows, _, _ = _cells(window, key, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        keys = _load_tile(rows + channels, key < AREA, HEAD_DIM, HEAD_TILE)
        values = _load_tile(rows + 2 * channels, key < AREA, HEAD_DIM, HEAD_TILE)
        rows, number, real = _cells(window, query, geometry, source, WINDOW, PAD_FIRST, ALIGNMENT)
        queries = _load_tile(rows, query < AREA, HEAD_DIM, HEAD_TILE)
        upstream = _load_tile(out_gradient + number * channels + channel, real, HEAD_DIM, HEAD_TILE)
        window_rows = (head.to(tl.int64) * num_windows + window) * AREA
        mean = tl.load(means + window_rows + query, mask=query < AREA, other=0.0)
        logits = _logits(queries, keys, scale, tile_bias, COSINE)
        if SHIFTED:
            logits = _separate(logits, window, query, key, geometry, mask_value, WINDOW)
        weights = _weights(logits, log_sums + window_rows, query, AREA)
        bias_sum += weights * (_product(upstream, tl.trans(values)) - mean[:, None])
    _store_bias_sum(bias_parts, bias_sum, run, head, query, key, AREA)
