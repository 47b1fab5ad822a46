"""What the Triton kernels of window attention share: tiles of windows, loaded, compared and stored.

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
def rounded(tile, dtype: tl.constexpr):
    """A float32 tile in another dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        tile = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def product(left, right):
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
def cells_of(window, cell, geometry, qkv, WINDOW: tl.constexpr, PAD_FIRST: tl.constexpr, ALIGNMENT: tl.constexpr):
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
def separate(logits, window, query, key, geometry, mask_value, WINDOW: tl.constexpr):
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
def may_hold_padding(window, height, width, WINDOW: tl.constexpr):
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
def load_tile(rows, present, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr):
    """(BLOCK, HEAD_TILE); zeros where a cell or a channel does not exist."""
    pointers = rows[:, None] + tl.arange(0, HEAD_TILE)[None, :]
    return tl.load(pointers, mask=_tile_mask(present, HEAD_DIM, HEAD_TILE), other=0.0)


@triton.jit
def store_tile(rows, tile, present, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr):
    """Write a (BLOCK, HEAD_TILE) tile where cells and channels exist, in the dtype that is there."""
    pointers = rows[:, None] + tl.arange(0, HEAD_TILE)[None, :]
    tl.store(pointers, rounded(tile, rows.dtype.element_ty), mask=_tile_mask(present, HEAD_DIM, HEAD_TILE))


@triton.jit
def bias_tile(bias, head, query, key, AREA: tl.constexpr):
    """The position bias of queries and keys; -inf for keys beyond the window, 0 for queries beyond it."""
    pointers = bias + (head * AREA + query[:, None]).to(tl.int64) * AREA + key[None, :]
    values = tl.load(pointers, mask=(query < AREA)[:, None] & (key < AREA)[None, :], other=0.0)
    return tl.where((key < AREA)[None, :], values.to(tl.float32) * LOG2_E, float("-inf"))


@triton.jit
def load_scale(logit_scale, head, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr):
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
def unit_rows(tile, COSINE: tl.constexpr):
    """The rows as they are compared: with Swin V2 of unit length."""
    if COSINE:
        return rounded(tile.to(tl.float32) * (1.0 / _lengths(tile))[:, None], tile.dtype)
    return tile


@triton.jit
def logits_of(query, key, scale, bias, COSINE: tl.constexpr):
    """Of a tile of queries and a tile of keys, in units of log 2."""
    logits = product(query, tl.trans(key))
    if COSINE:
        logits = logits * (scale * LOG2_E / _lengths(query))[:, None] * (1.0 / _lengths(key))[None, :] + bias
    else:
        logits = logits * (scale * LOG2_E) + bias
    return logits


@triton.jit
def before_unit(gradient, tile, scale):
    """The gradient of rows from that of their unit rows over `scale`; and how much of the latter lies along them."""
    length = _lengths(tile)
    unit = tile.to(tl.float32) * (1.0 / length)[:, None]
    along = tl.sum(gradient * unit, axis=1)
    # The length of shorter rows counts as a constant, as in `torch.nn.functional.normalize`.
    radial = tl.where(length > SMALLEST_LENGTH, along, 0.0)
    return (gradient - unit * radial[:, None]) * (scale / length)[:, None], along


@triton.jit
def weights_of(logits, log_sums, query, AREA: tl.constexpr):
    """The attention weights again; 0 for queries beyond the window."""
    return tl.exp2(logits - tl.load(log_sums + query, mask=query < AREA, other=float("inf"))[:, None])


@triton.jit
def store_bias_sum(bias_parts, bias_sum, run, head, query, key, AREA: tl.constexpr):
    """Write what a run of windows adds to the bias's gradient, into (runs, heads, AREA, AREA)."""
    matrix = (run * tl.num_programs(0) + head).to(tl.int64)
    pointers = bias_parts + (matrix * AREA + query[:, None]) * AREA + key[None, :]
    tl.store(pointers, bias_sum, mask=(query < AREA)[:, None] & (key < AREA)[None, :])


@triton.jit
def store_padding_sums(
    padding_parts, key_sum, value_sum, part, head, channels, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr
):
    """Write what a program adds to the gradients of padded keys and of padded values, into (parts, 2 C)."""
    channel = tl.arange(0, HEAD_TILE)
    pointers = padding_parts + part * (2 * channels) + head * HEAD_DIM + channel
    tl.store(pointers, key_sum, mask=channel < HEAD_DIM)
    tl.store(pointers + channels, value_sum, mask=channel < HEAD_DIM)
