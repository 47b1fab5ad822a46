"""Trains through kills: `python survival_helpers.py FOLDER KILLS SEED WORD...`, the words of `swin-dense train`.

FOLDER/whole becomes the uninterrupted run; FOLDER/run_0, run_1, ... are killed at random instants and resumed, each to
its end, until there were so many kills; FOLDER/kills.json says what each of them hit. One process imports everything
and is forked for each attempt: that saves the seconds of a start.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from swin_dense.tools.main import main
from swin_dense.training.checkpoint import LAST, PREVIOUS, read_state
from swin_dense.training.metrics_file import read_metrics

SLOWLY_IMPORTED = (
    "albumentations",
    "matplotlib.pyplot",
    "pycocotools.mask",
    "safetensors.torch",
    "swin_dense.tools.instance_task",
    "swin_dense.tools.semantic_task",
    "swin_dense.tools.training_run",
)
LONGEST_S = 1.8
DISK_S = 0.02
"""A disk that takes its time, so that about every second kill hits it writing."""


def newest_step(folder: Path) -> int:
    """Step of the state that a resumed run would take, 0 without one.

    Raises:
        CheckpointError: It is not whole.
    """
    path = next((folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()), None)
    return 0 if path is None else read_state(path).step


def start(words: list[str], folder: Path) -> int:
    """Begins to train, or goes on, in a process of its own; returns its number."""
    has_begun = folder.exists() and any(entry.suffix != ".tmp" for entry in folder.iterdir())
    resume = ["--resume"] if has_begun else []
    number = os.fork()
    if number == 0:
        code = 1
        try:
            with open(folder.with_suffix(".log"), "a") as log:
                os.dup2(log.fileno(), sys.stderr.fileno())
            os.fsync, os.replace = slow(os.fsync), slow(os.replace)
            code = main(["train", *words, "--out", str(folder), "--device", "cpu", *resume])
        finally:
            os._exit(code)
    return number


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but only after a while."""

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(DISK_S)
        return function(*arguments, **options)

    return late


def wait(number: int) -> int:
    """The exit code of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def train_through_kills(folder: Path, kills: int, seed: int, words: list[str]) -> list[dict[str, Any]]:
    """See above; returns what each kill hit."""
    if code := wait(start(words, folder / "whole")):
        raise SystemExit(f"the uninterrupted run ends with {code}")
    last_step, delays = newest_step(folder / "whole"), random.Random(seed)
    report: list[dict[str, Any]] = []
    runs = 0
    while True:
        run = folder / f"run_{runs}"
        before, began_s = newest_step(run), time.monotonic()
        number = start(words, run)
        # Of the attempts that have nothing but the last evaluation left, every second one may finish.
        if len(report) < kills and (before < last_step or delays.random() < 0.5):
            time.sleep(delays.uniform(0, LONGEST_S))
            os.kill(number, signal.SIGKILL)
        code = wait(number)
        if code == 0:
            runs += 1
            if len(report) == kills:
                return report
            continue
        if code != -signal.SIGKILL:
            raise SystemExit(f"an attempt ends with {code}, see {run.with_suffix('.log')}")
        rows = read_metrics(run / "metrics.csv") if (run / "metrics.csv").exists() else []
        report.append(
            {
                "run": run.name,
                "step_before": before,
                "last_row": max((row["step"] for row in rows), default=0),
                "step_after": newest_step(run),
                "while_writing": [str(path.relative_to(run)) for path in run.rglob("*.tmp")],
                "attempt_s": time.monotonic() - began_s,
            }
        )


if __name__ == "__main__":
    for module in SLOWLY_IMPORTED:
        import_module(module)
    torch.set_num_threads(1)
    target, count, first_seed, *command = sys.argv[1:]
    found = train_through_kills(Path(target), int(count), int(first_seed), command)
    (Path(target) / "kills.json").write_text(json.dumps(found, indent=1))
