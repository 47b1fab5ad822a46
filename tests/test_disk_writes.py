import errno
import json
import os
import signal
from functools import partial

import pytest
import safetensors.torch
import torch

from swin_dense.errors import CheckpointError, DataError
from swin_dense.tools.disk_writes import DiskWrites
from swin_dense.tools.main import main
from swin_dense.tools.training_run import TrainingRun
from swin_dense.training.checkpoint import read_state
from swin_dense.training.metrics_file import MetricsFile, read_metrics

FULL = OSError(28, "No space left on device")


def fail(error):
    raise error


def test_failure_is_told_and_forgotten_when_the_file_is_written():
    told = []
    writes = DiskWrites(told.append)
    assert writes.attempt("a.csv", 1, lambda: None) and writes.complaint() == ""
    assert not writes.attempt("a.csv", 2, lambda: fail(FULL))
    assert not writes.attempt("last.pt", 3, lambda: fail(CheckpointError("last.pt: cannot be written.")))
    assert [(event.step, event.kind, event.text) for event in told] == [
        (2, "not_saved", "step 2: a.csv is not saved, the run goes on: No space left on device"),
        (3, "not_saved", "step 3: last.pt is not saved, the run goes on: last.pt: cannot be written."),
    ]
    assert (
        writes.complaint("last.pt") == "the last version could not be saved of last.pt (last.pt: cannot be written.)."
    )
    assert "a.csv" in writes.complaint() and writes.complaint("b") == ""
    assert writes.attempt("last.pt", 4, lambda: None) and list(writes.failed) == ["a.csv"]


def test_other_errors_pass():
    with pytest.raises(DataError):
        DiskWrites(print).attempt("a", 1, lambda: fail(DataError("changed from outside")))


class FullDisk:
    """Refuses training states and models while it is full; counts what it was asked for."""

    def __init__(self, monkeypatch, full_after, free_after=10**9):
        self.full_after, self.free_after, self.asked = full_after, free_after, 0
        for module in (torch, safetensors.torch):
            monkeypatch.setattr(module, "save", partial(self.write, module.save))

    def write(self, save, *arguments, **settings):
        self.asked += 1
        if self.full_after < self.asked <= self.free_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments, **settings)


@pytest.fixture
def run_words(tiny_words):
    return tiny_words("semantic", "run.pictures=0", "run.checkpoint_every_steps=1", "run.evaluate_every_steps=null")


def test_disk_that_is_full_for_a_while_ends_no_run(run_words, tmp_path, monkeypatch, capsys, one_thread):
    FullDisk(monkeypatch, full_after=1, free_after=3)
    assert main(["train", *run_words, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert read_state(tmp_path / "last.pt").step == 4
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"]) for event in events] == [(2, "not_saved"), (3, "not_saved")]
    shown = capsys.readouterr().err
    assert "step 2: last.pt is not saved, the run goes on: " in shown and "No space left on device" in shown


def test_disk_that_is_full_to_the_end_is_an_error_of_the_whole_run(
    run_words, tmp_path, monkeypatch, capsys, one_thread
):
    FullDisk(monkeypatch, full_after=1)
    assert main(["train", *run_words, "--out", str(tmp_path), "--device", "cpu"]) == CheckpointError.exit_code
    *_, last_line = capsys.readouterr().err.splitlines()
    assert "the run is done, but the last version could not be saved of last.pt (" in last_line
    assert "last.safetensors (No space left on device)" in last_line
    assert read_state(tmp_path / "last.pt").step == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3, 4]


def test_signal_with_a_full_disk_does_not_promise_a_saved_state(run_words, tmp_path, monkeypatch, capsys, one_thread):
    FullDisk(monkeypatch, full_after=0)
    monkeypatch.setattr(TrainingRun, "_log", lambda self, log: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", *run_words, "--out", str(tmp_path), "--device", "cpu"]) == CheckpointError.exit_code
    shown = capsys.readouterr().err
    assert "stopped by a signal, but the last version could not be saved of last.pt" in shown
    assert "with --resume goes on" not in shown


def test_metrics_go_on_after_a_torn_line(run_words, tmp_path, monkeypatch, one_thread):
    append = MetricsFile.append

    def torn(self, step, values):
        if step == 2:
            with open(self._path, "a") as file:
                file.write("2,0.")
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, step, values)

    monkeypatch.setattr(MetricsFile, "append", torn)
    assert main(["train", *run_words, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 3, 4]
