"""What a training run leaves behind, and where.

recipe.yaml          every number of the run, as resolved
metrics.csv          losses and scores by step
curves.png           the same as a picture
best.safetensors     the best model so far, with class names and recipe inside
last.safetensors     the newest model, likewise
scores.json          the last evaluation in full
report.html          all of it as one page
pictures/            validation images, ground truth beside prediction; in it
  worst/             those with the most mistakes, of the last evaluation
  training/          images that training begins with, as augmentation leaves them
environment.json     command, machine and versions
plan.json            what `swin-dense plan --json` foresaw, if it was written here
last.pt, previous.pt training states, for --resume
events.jsonl         steps that were skipped or made in parts, files that could not be written
bad_batches/         what the skipped steps were to train on
torchrun.txt         which call of torchrun trains here: its restarts continue the run
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swin_dense.errors import ConfigError
from swin_dense.tools.curves import draw_curves
from swin_dense.tools.recipe import Recipe
from swin_dense.tools.run_lock import LOCK_NAME
from swin_dense.training.atomic_file import atomic_write
from swin_dense.training.checkpoint import has_state
from swin_dense.training.distributed import torchrun_call
from swin_dense.training.metrics_file import read_metrics


class RunFolder:
    """The folder of one run.

    Args:
        path: Where it is or will be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.csv"
        self.best_model = self.path / "best.safetensors"
        self.last_model = self.path / "last.safetensors"
        self.report = self.path / "report.html"
        self.environment = self.path / "environment.json"
        self.plan = self.path / "plan.json"
        self.scores = self.path / "scores.json"
        self.curves = self.path / "curves.png"
        self.pictures = self.path / "pictures"
        self.worst_pictures = self.pictures / "worst"
        self.training_pictures = self.pictures / "training"
        self.events = self.path / "events.jsonl"
        self.bad_batches = self.path / "bad_batches"
        self.recipe = self.path / "recipe.yaml"
        self.torchrun_call = self.path / "torchrun.txt"

    def require_startable(self, resume: bool) -> None:
        """Refuse to overwrite a run, or to resume one that is not there.

        A run that was killed before its first training state may be resumed: it begins anew. What a kill left of a file
        that was never finished, `*.tmp`, does not count.

        Raises:
            ConfigError: The folder is taken, or holds no run to resume.
        """
        has_begun = self.has_state() or self.recipe.exists() or self.torchrun_call.exists()
        if resume and not has_begun:
            raise ConfigError(f"{self.path}: no training state to resume; start without --resume.")
        if not resume and self.path.exists() and any(map(self._is_of_a_run, self.path.iterdir())):
            raise ConfigError(f"{self.path} is not empty: continue that run with --resume, or choose another --out.")

    def _is_of_a_run(self, path: Path) -> bool:
        return path.suffix != ".tmp" and path not in (self.plan, self.path / LOCK_NAME)

    def has_state(self) -> bool:
        """Whether there is a training state to go on from."""
        return has_state(self.path)

    def belongs_to(self, torchrun_call: str | None) -> bool:
        """Whether this call of torchrun trained here last; never where torchrun has no part in it."""
        try:
            return torchrun_call is not None and self.torchrun_call.read_text() == torchrun_call
        except OSError:
            return False

    def write_recipe(self, recipe: Recipe) -> None:
        """Create the folder, with the resolved recipe in it, and the call of torchrun where there is one."""
        self.path.mkdir(parents=True, exist_ok=True)
        call = torchrun_call()
        if call is None:
            self.torchrun_call.unlink(missing_ok=True)
        else:
            with atomic_write(self.torchrun_call) as file:
                file.write(call.encode())
        with atomic_write(self.recipe) as file:
            file.write(recipe.to_yaml().encode())

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Save where and how the run is made."""
        with atomic_write(self.environment) as file:
            file.write(json.dumps(environment, indent=1).encode())

    def write_scores(self, scores: Mapping[str, Any], table: Mapping[str, float | None], step: int) -> None:
        """Save all scores of an evaluation, beside those that are usually reported."""
        with atomic_write(self.scores) as file:
            file.write(json.dumps({"step": step, "table": table, **scores}, indent=1).encode())

    def draw_curves(self) -> None:
        """Draw the metrics so far."""
        draw_curves(read_metrics(self.metrics), self.curves)
