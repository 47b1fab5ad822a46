import io
import re

import pytest
import torch

from swin_dense.training.progress import Progress, duration, fit, peak_memory_bytes

LOSSES = {"classification": 0.5, "box": 0.25, "mask": 1.0, "objectness": 0.125, "rpn_box": 0.125}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def run(stream, steps, seconds_per_step=1.0, **settings):
    clock = Clock()
    device = torch.device("cpu")
    with Progress(
        100, images_per_step=16, device=device, stream=stream, plain_every_s=10.0, clock=clock, **settings
    ) as progress:
        for step in steps:
            clock.now_s += seconds_per_step
            progress.update(step, LOSSES, 1e-4)
    return stream.getvalue()


def test_progress_without_terminal_prints_plain_lines_now_and_then():
    lines = run(io.StringIO(), range(1, 101)).splitlines()
    assert [line.split("/")[0] for line in lines] == ["1", *(str(step) for step in range(11, 100, 10)), "100"]
    assert all(line.isprintable() for line in lines)
    for text in ("11/100", "loss 2", "16.0 img/s", "1:29 left", "lr 1.0e-04", " GB", "mask 1", "rpn_box 0.125"):
        assert text in lines[1]


def test_progress_of_a_resumed_run_counts_its_own_steps():
    line = run(io.StringIO(), [60], seconds_per_step=20.0, start_step=50).strip()
    assert "60/100" in line and "8.0 img/s" in line and "1:20 left" in line


def test_progress_on_a_terminal_is_one_line_of_80_columns(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    text = run(Terminal(), range(1, 4))
    assert text.count("\n") <= 1
    shown = [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", text) if line]
    assert any("3/100" in line for line in shown)
    assert all(len(line) <= 80 for line in shown)


def test_progress_notes_other_work_now_and_then_and_leaves_its_time_out_of_the_speed():
    clock, stream = Clock(), io.StringIO()
    with Progress(9, images_per_step=4, device=torch.device("cpu"), stream=stream, clock=clock) as progress:
        clock.now_s += 2
        progress.update(1, LOSSES, 1e-4)
        for done in range(1, 31):
            clock.now_s += 1
            progress.note("evaluating", done, 30)
        clock.now_s += 2
        progress.update(9, LOSSES, 1e-4)
    first, *notes, last = stream.getvalue().splitlines()
    assert notes == ["evaluating 11/30  0:19 left", "evaluating 21/30  0:09 left"]
    assert "2.0 img/s" in first and "16.0 img/s" in last


def test_fit_drops_parts_from_the_end():
    assert fit(["12/99", "loss 1", "8 img/s"], 13) == "12/99  loss 1"
    assert fit(["123456"], 4) == "1234"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (42, "0:42"), (725, "12:05"), (11220, "3:07:00"), (187200, "2 d 4:00:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_peak_memory_of_the_process_covers_what_it_holds():
    held = torch.ones(30_000_000)
    assert peak_memory_bytes(torch.device("cpu")) > held.numel() * 4
