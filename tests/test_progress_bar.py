import io

import pytest
from rich.console import Console
from rich.progress import Progress

from swin_dense.tools.progress_bar import RateColumn, progress_bar, tracked


def test_tracked_gives_the_items_in_order(capsys):
    assert list(tracked([3, 1, 2], "counting")) == [3, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == "" and "counting" in captured.err and "3/3" in captured.err


def test_progress_bar_can_be_hidden(capsys):
    with progress_bar("counting", shown=False) as show:
        show(5, 5)
    assert capsys.readouterr().err == ""


def test_error_before_anything_is_done_leaves_no_bar(capsys):
    for total, shown in ((None, ""), (3, "1/3")):
        with pytest.raises(ValueError, match="broken"), progress_bar("counting") as show:
            if total is not None:
                show(1, total)
            raise ValueError("broken")
        written = capsys.readouterr().err
        assert shown in written and bool(written) == bool(shown)


def test_rate_column_is_empty_until_there_is_a_rate():
    now_s = [0.0]
    progress = Progress(console=Console(file=io.StringIO()), get_time=lambda: now_s[0])
    progress.add_task("counting", total=10)
    assert RateColumn().render(progress.tasks[0]).plain == ""
    for second in (1.0, 2.0, 3.0):
        now_s[0] = second
        progress.update(progress.task_ids[0], advance=2)
    assert RateColumn().render(progress.tasks[0]).plain == "2.0/s"
