"""Where the rows of heads lie in a map and in its windows, and their way in, for `gathered_window_attention`.

A row is what one head holds of one cell. Symbols as in `windows.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from swin_dense.windows import ShiftedWindows, SizeHW, shift_and_pad, window_partition


class Cells(NamedTuple):
    """Where the rows of heads lie in a map, and where in its windows.

    Attributes:
        to_windows: (P, n, num_heads, M M) rows of a map (H W, P, num_heads); any row for a padded cell.
        to_map: (H W, P, num_heads) rows of the windows (P, n, num_heads, M M).
        padded_windows: (N,) the window of each padded cell, in order.
        padded_positions: (N,) where in its window it lies.
        padded_before: How many padded cells lie before each of the n windows, and N.
    """

    to_windows: Tensor
    to_map: Tensor
    padded_windows: Tensor
    padded_positions: Tensor
    padded_before: list[int]


@lru_cache(maxsize=64)  # both kinds of blocks, inwards and outwards, in all stages of a few image sizes
def cells_of_windows(size_hw: SizeHW, windows: ShiftedWindows, num_parts: int, num_heads: int) -> Cells:
    """The rows of each window's cells.

    Args:
        size_hw: (H, W) of the map.
        windows: How it is cut.
        num_parts: P: 3 for queries, keys and values, 1 for what is attended.
        num_heads: Of each part.
    """
    with torch.inference_mode(False):  # indices first made for inference must serve training too
        num_cells = size_hw[0] * size_hw[1]
        cells = torch.arange(num_cells).view(1, *size_hw, 1)
        cells = window_partition(shift_and_pad(cells, torch.tensor([num_cells]), windows), windows.window_size)
        cells = cells[0, :, :, 0]
        inside = cells < num_cells
        part, head = torch.arange(num_parts)[:, None], torch.arange(num_heads)
        in_map = torch.where(inside, cells, 0)[:, None, :] * num_parts + part[:, None, None]
        to_windows = in_map * num_heads + head[:, None]
        window_of, position_of = torch.empty(2, num_cells, 1, 1, dtype=torch.long)
        window_of[cells[inside]], position_of[cells[inside]] = (
            index[:, None, None] for index in inside.nonzero().unbind(1)
        )
        to_map = ((part * len(cells) + window_of) * num_heads + head) * cells.shape[1] + position_of
        padded_windows, padded_positions = (~inside).nonzero().unbind(1)
        padded_before = torch.cat((torch.zeros(1, dtype=torch.long), (~inside).sum(dim=1).cumsum(0))).tolist()
        return Cells(to_windows, to_map, padded_windows, padded_positions, padded_before)


def gathered(rows: Tensor, padding: Tensor, cells: Cells, some: slice, out: Tensor | None = None) -> Tensor:
    """Rows of a map as the windows `some` see them, (P, windows, num_heads, M M, d)."""
    indices = cells.to_windows[:, some]
    if out is None:
        out = rows.new_empty(*indices.shape, rows.shape[1])
    for part, index in zip(out, indices, strict=True):
        torch.index_select(rows, 0, index.flatten(), out=part.view(-1, rows.shape[1]))
    padded = slice(cells.padded_before[some.start], cells.padded_before[some.stop])
    if padded.start < padded.stop:
        held = padding.view(out.shape[0], out.shape[2], out.shape[4])
        out[:, cells.padded_windows[padded] - some.start, :, cells.padded_positions[padded]] = held
    return out
