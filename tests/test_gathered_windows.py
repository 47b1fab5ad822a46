import pytest
import torch

from swin_dense.gathered_windows import cells_of_windows, gathered
from swin_dense.windows import ShiftedWindows, shift_and_pad, window_partition


@pytest.mark.parametrize("pad_first", [True, False])
def test_rows_return_to_where_they_came_from(pad_first):
    windows = ShiftedWindows(3, (1, 2), pad_first, -100.0)
    cells = cells_of_windows((4, 7), windows, 3, 2)
    rows = torch.arange(4 * 7 * 3 * 2)
    assert torch.equal(rows[cells.to_windows.flatten()][cells.to_map.flatten()], rows)
    assert cells.padded_before[-1] == len(cells.padded_windows) == 6 * 9 - 4 * 7


@pytest.mark.parametrize("pad_first", [True, False])
def test_windows_hold_what_the_shifted_and_padded_map_does(pad_first):
    windows = ShiftedWindows(3, (1, 2), pad_first, -100.0)
    x, padding = torch.randn(1, 4, 7, 3 * 2 * 5), torch.randn(3 * 2 * 5)
    cells = cells_of_windows((4, 7), windows, 3, 2)
    wanted = window_partition(shift_and_pad(x, padding, windows), 3)[0].view(-1, 9, 3, 2, 5).permute(2, 0, 3, 1, 4)
    for some in (slice(0, len(wanted[0])), slice(1, 4), slice(2, 3)):
        assert torch.equal(gathered(x[0].reshape(-1, 5), padding, cells, some), wanted[:, some])
