"""The things that can be trained, each with its data, model, batches, losses, scores and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

import numpy as np
import torch
from torch import nn

from swin_dense.config import SwinConfig, variant_config
from swin_dense.datasets.classification_dataset import ImageSource
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError
from swin_dense.tools.predictors import Predictor
from swin_dense.tools.recipe import Recipe
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import Batch as TrainingBatch
from swin_dense.typed_values import convert, did_you_mean

Sample = TypeVar("Sample")
Sample_co = TypeVar("Sample_co", covariant=True)
Batch = TypeVar("Batch", bound=TrainingBatch)
Prediction = TypeVar("Prediction")
Scores = dict[str, Any]

NUM_WORST = 8
"""Images that an evaluation names as the worst."""


class Task(ABC, Generic[Sample, Batch, Prediction]):
    """What `train` and `evaluate` need to know of a task.

    Args:
        recipe: The run's recipe.
    """

    main_score: str
    """The name, in `table`, of the score that decides which model is best."""

    class_columns: tuple[str, ...] = ()
    """The scores of a class that the terminal shows; all where empty."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def training_data(self) -> LabelledImages[Sample]:
        """The augmented training set."""

    @abstractmethod
    def validation_data(self, label_map: LabelMap) -> ValidationData[Prediction]:
        """The validation set, whose classes must be these."""

    @abstractmethod
    def batch_groups(self, dataset: Any) -> np.ndarray | None:  # noqa: ANN401 - the task's own
        """(N,) integers: a batch holds images of one group only; None makes no difference."""

    @abstractmethod
    def build_model(self, num_classes: int) -> nn.Module:
        """The model of the recipe, with random weights."""

    @staticmethod
    @abstractmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        """Samples to a batch."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, device: torch.device) -> Mapping[str, LossTerm]:
        """The named losses of a batch, to be summed."""

    @abstractmethod
    def sample_picture(self, sample: Sample, label_map: LabelMap) -> np.ndarray:
        """A training sample with its annotations drawn in, (h, w, 3) uint8."""

    @abstractmethod
    def predictor(self, model: nn.Module, label_map: LabelMap, device: torch.device) -> Predictor[Prediction]:
        """The trained model on original images."""

    @abstractmethod
    def table(self, scores: Scores) -> dict[str, float | None]:
        """The scores to show and to log, by name, as fractions of 1."""

    def backbone_config(self) -> SwinConfig:
        """The backbone of the recipe."""
        return variant_config(self.recipe.model.variant, **self.recipe.model.backbone)

    def head_settings(self, builder: Callable[..., nn.Module]) -> dict[str, Any]:
        """The head's arguments from the recipe.

        Raises:
            ConfigError: The builder has no such argument for a recipe to set, or the value is of another type.
        """
        hints = get_type_hints(builder)
        for name in ("backbone", "num_classes", "weights", "return"):
            hints.pop(name)
        for name in self.recipe.model.head:
            if name not in hints:
                raise ConfigError(f"unknown key 'model.head.{name}'{did_you_mean(name, list(hints))}")
        return {
            name: convert(hints[name], value, "recipe", f"model.head.{name}")
            for name, value in self.recipe.model.head.items()
        }

    def data_path(self, path: str | None) -> Path | None:
        """A path of the recipe; relative ones start from the data folder."""
        if path is None:
            return None
        return Path(self.recipe.data or "") / path

    def data_root(self) -> Path:
        """The data folder.

        Raises:
            ConfigError: The recipe names none.
        """
        if self.recipe.data is None:
            raise ConfigError("no data folder: add data=/path/to/the/data/set to the command line.")
        return Path(self.recipe.data)


class LabelledImages(Protocol[Sample_co]):
    """A training set and its classes."""

    label_map: LabelMap

    def __len__(self) -> int:
        """How many images."""

    def __getitem__(self, key: Any, /) -> Sample_co:  # noqa: ANN401
        """The augmented image of key (epoch, index)."""


class ValidationData(ABC, Generic[Prediction]):
    """Annotated images to score predictions with, and to draw."""

    paths: Sequence[ImageSource]
    sizes_hw: Sequence[tuple[int, int] | None]

    def prove(self) -> list[str]:
        """Feed ground truth as predictions, which must score 1.

        Returns:
            Sentences on what costs every model score; mostly none.

        Raises:
            DataError: The data set cannot be scored.
        """
        return []

    @abstractmethod
    def evaluator(self, predictions: Path | None = None) -> Evaluator[Prediction]:
        """A new, empty collector; `predictions` is where to save what it collects, in the data set's own ids."""

    @abstractmethod
    def target(self, index: int, size_hw: tuple[int, int]) -> Any:  # noqa: ANN401 - the task's own
        """What the losses of one image compare with, resized as the image is: to (h, w)."""

    @abstractmethod
    def picture(self, index: int, predictor: Predictor[Prediction], prediction: Prediction) -> np.ndarray:
        """Ground truth beside prediction, (h, w, 3) uint8."""


class Evaluator(ABC, Generic[Prediction]):
    """Collects predictions and scores them; processes collect apart and merge."""

    @abstractmethod
    def add(self, index: int, prediction: Prediction) -> None:
        """Take the prediction of one image."""

    @abstractmethod
    def merge(self, other: Any) -> None:  # noqa: ANN401 - another of the same kind
        """Take what another process has collected."""

    @abstractmethod
    def finish(self) -> Scores:
        """All scores, as fractions of 1; call it once, after the last prediction.

        Beside the scores of the task: "per_class", by name; "explanations", sentences on scores that are 0 or missing;
        "worst_images", the first of them the worst: {"index", "name" and what is wrong} of each.
        """


def task_of(recipe: Recipe) -> Task[Any, Any, Any]:
    """The task that a recipe names."""
    if recipe.task == "instance":
        from swin_dense.tools.instance_task import InstanceTask

        return InstanceTask(recipe)
    if recipe.task == "classification":
        from swin_dense.tools.classification_task import ClassificationTask

        return ClassificationTask(recipe)
    from swin_dense.tools.semantic_task import SemanticTask

    return SemanticTask(recipe)
