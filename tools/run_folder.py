"""What a training run leaves behind, and where.

recipe.yaml          every number of the run, as resolved
metrics.csv          losses and scores by step
curves.png           the same as a picture
best.safetensors     the best model so far, with class names and recipe inside
last.safetensors     the newest model, likewise
scores.json          the last evaluation in full
pictures/            validation images, ground truth beside prediction
last.pt, previous.pt training states, for --resume
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_dense.errors import ConfigError
from swin_dense.tools.curves import draw_curves
from swin_dense.tools.recipe import Recipe
from swin_dense.training.checkpoint import has_state
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
        self.scores = self.path / "scores.json"
        self.curves = self.path / "curves.png"
        self.pictures = self.path / "pictures"

    def require_startable(self, resume: bool) -> None:
        """Refuse to overwrite a run, or to resume one that is not there.

        Raises:
            ConfigError: The folder is taken, or holds no training state to resume.
        """
        if resume and not has_state(self.path):
            raise ConfigError(f"{self.path}: no training state to resume; start without --resume.")
        if not resume and self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty: continue that run with --resume, or choose another --out.")

    def write_recipe(self, recipe: Recipe) -> None:
        """Create the folder, with the resolved recipe in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.yaml").write_text(recipe.to_yaml())

    def write_scores(self, scores: dict[str, Any], step: int) -> None:
        """Save all scores of an evaluation."""
        self.scores.write_text(json.dumps({"step": step, **scores}, indent=1))

    def write_picture(self, name: str, picture: np.ndarray) -> None:
        """Save a validation picture, (h, w, 3) uint8."""
        self.pictures.mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.pictures / f"{name}.png")

    def draw_curves(self) -> None:
        """Draw the metrics so far."""
        draw_curves(read_metrics(self.metrics), self.curves)
