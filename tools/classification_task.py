"""Image classification: class folders or CIFAR-10, a Swin classifier, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from swin_dense.classification import Classifier, classifier
from swin_dense.datasets.cifar10 import read_cifar10
from swin_dense.datasets.classification_dataset import (
    ClassificationDataset,
    ClassificationSample,
    ClassifiedImages,
    find_class_folders,
    read_class_folders,
)
from swin_dense.datasets.classification_evaluation import ClassificationAccuracy
from swin_dense.datasets.classification_transforms import classification_training
from swin_dense.datasets.drawing import draw_classification
from swin_dense.datasets.labels import LabelMap, require_same_labels
from swin_dense.datasets.mixing import draw_mix
from swin_dense.errors import ConfigError
from swin_dense.heads.backbones import Normalize
from swin_dense.heads.losses import image_loss
from swin_dense.heads.precision import at_least_float32
from swin_dense.tools.predictors import ClassificationPredictor, Predictor
from swin_dense.tools.tables import write_json
from swin_dense.tools.tasks import Evaluator, Scores, Task, ValidationData
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import even_slices

_WRITTEN_SCORES = 10  # all of a thousand classes would make gigabytes of ImageNet's validation set


@dataclass(frozen=True)
class ClassificationBatch:
    """8-bit images of one size, (B, 3, H, W), with their classes, (B,)."""

    images: Tensor
    labels: Tensor
    names: list[str]

    @property
    def ids(self) -> list[str]:
        """The pictures' names."""
        return self.names

    def describe(self) -> str:
        """The pictures' names and their size, for messages."""
        height, width = self.images.shape[2:]
        return f"images {', '.join(self.names)} ({height} x {width})"

    def split(self, parts: int) -> list[ClassificationBatch]:
        """Batches of fewer images."""
        return [
            ClassificationBatch(self.images[part], self.labels[part], self.names[part])
            for part in even_slices(len(self.names), parts)
        ]

    def plain(self) -> dict[str, Any]:
        """All of it, to be saved."""
        return dict(vars(self))

    def pin_memory(self) -> ClassificationBatch:
        """In memory that a GPU copies from without waiting."""
        return ClassificationBatch(self.images.pin_memory(), self.labels.pin_memory(), self.names)


class ClassificationTask(Task[ClassificationSample, ClassificationBatch, np.ndarray]):
    """See `Task`."""

    main_score = "top-1"

    def training_data(self) -> ClassificationDataset:
        """Augmented crops of one size."""
        augmentation = self.recipe.augmentation
        transform = classification_training(
            augmentation.crop_size_hw,
            area_range=augmentation.area_range,
            aspect_range=augmentation.aspect_range,
            padding=augmentation.padding,
            flip_probability=augmentation.flip_probability,
            photometric=augmentation.photometric,
        )
        return ClassificationDataset(self._images("train"), transform, seed=self.recipe.run.seed)

    def validation_data(self, label_map: LabelMap) -> ClassificationValidation:
        """All images, as they are."""
        images = self._images("val")
        require_same_labels(label_map, images.label_map, "the validation data")
        return ClassificationValidation(ClassificationDataset(images))

    def _images(self, split: str) -> ClassifiedImages:
        if self.recipe.dataset.format == "cifar10":
            return read_cifar10(self.data_root(), split)
        folder = self.data_path(getattr(self.recipe.dataset, f"{split}_images"))
        return read_class_folders(find_class_folders(self.data_root(), split) if folder is None else folder)

    def batch_groups(self, dataset: Any) -> None:  # noqa: ANN401
        """Crops are all alike."""
        return None

    def build_model(self, num_classes: int) -> Classifier:
        """A classifier with the recipe's backbone and random weights.

        Raises:
            ConfigError: The recipe sets something in `model.head`.
        """
        model = self.recipe.model
        if model.head:
            raise ConfigError(f"model.head: a classifier has no settings there, got {', '.join(model.head)}.")
        return classifier(model.variant, num_classes, **model.backbone)

    @staticmethod
    def collate(samples: Sequence[ClassificationSample]) -> ClassificationBatch:
        """Crops are stacked."""
        return ClassificationBatch(
            torch.stack([sample.image for sample in samples]),
            torch.tensor([sample.label for sample in samples]),
            [sample.name for sample in samples],
        )

    def losses(self, model: nn.Module, batch: ClassificationBatch, device: torch.device) -> Mapping[str, LossTerm]:
        """Cross-entropy with smoothed labels, of mixed images where the recipe mixes."""
        images = _normalize(device)(batch.images.to(device, non_blocking=True).float() / 255)
        augmentation = self.recipe.augmentation
        size_hw = (images.shape[2], images.shape[3])
        mix = draw_mix(size_hw, augmentation.mixup_alpha, augmentation.cutmix_alpha)
        logits = at_least_float32(model(mix.images(images)))
        labels = batch.labels.to(device, non_blocking=True)
        targets = mix.targets(functional.one_hot(labels, logits.shape[1]).to(logits.dtype))
        return {"loss_classification": LossTerm(image_loss(logits, targets), len(labels))}

    def sample_picture(self, sample: ClassificationSample, label_map: LabelMap) -> np.ndarray:
        """The class below the image; before images are blended, which is done on whole batches."""
        scores = np.eye(len(label_map))[sample.label]
        return draw_classification(sample.image.permute(1, 2, 0).numpy(), scores, label_map, sample.label)

    def predictor(self, model: nn.Module, label_map: LabelMap, device: torch.device) -> ClassificationPredictor:
        """Class probabilities."""
        assert isinstance(model, Classifier)
        return ClassificationPredictor(model, label_map, self.recipe.inference, device)

    def table(self, scores: Scores) -> dict[str, float | None]:
        """Top-1, and top-5 where there are more than five classes."""
        return {name: scores[name] for name in ("top-1", "top-5") if name in scores}


class ClassificationValidation(ValidationData[np.ndarray]):
    """Pictures to score and to draw.

    Args:
        dataset: Without transform.
    """

    def __init__(self, dataset: ClassificationDataset) -> None:
        self.dataset = dataset
        self.paths = dataset.sources
        self.sizes_hw = [None] * len(dataset)

    def evaluator(self, predictions: Path | None = None) -> ClassificationEvaluator:
        """Accuracy over the whole set; predictions go into a JSON file."""
        return ClassificationEvaluator(self.dataset, predictions)

    def target(self, index: int, size_hw: tuple[int, int]) -> int:
        """The class."""
        return int(self.dataset.labels[index])

    def picture(self, index: int, predictor: Predictor[np.ndarray], prediction: np.ndarray) -> np.ndarray:
        """The most probable classes below the image, the true one marked."""
        truth = int(self.dataset.labels[index])
        return draw_classification(self.dataset.raw(index), prediction, self.dataset.label_map, truth)


class ClassificationEvaluator(Evaluator[np.ndarray]):
    """Counts right answers.

    Args:
        dataset: The labelled images.
        predictions: The JSON file to write, or None.
    """

    def __init__(self, dataset: ClassificationDataset, predictions: Path | None) -> None:
        # Not the data set itself, which may hold all pictures: processes send each other this.
        self._labels = dataset.labels
        self._label_map = dataset.label_map
        self._names = [] if predictions is None else [dataset.name(index) for index in range(len(dataset))]
        self._accuracy = ClassificationAccuracy(dataset.label_map)
        self._predictions = predictions
        self._results: dict[int, dict[str, Any]] = {}

    def add(self, index: int, prediction: np.ndarray) -> None:
        """Take the prediction of one image."""
        self._accuracy.add(prediction, int(self._labels[index]))
        if self._predictions is not None:
            self._results[index] = as_result(self._names[index], prediction, self._label_map)

    def merge(self, other: Any) -> None:  # noqa: ANN401
        """Take what another process has collected."""
        self._accuracy.merge(other._accuracy)
        self._results |= other._results

    def finish(self) -> Scores:
        """{"top-1", "top-5" for more than five classes, "per_class": {…}, "absent": […]}; writes the predictions."""
        results = [self._results[index] for index in sorted(self._results)]
        write_json(self._predictions, {"classifications": results})
        return self._accuracy.compute()


def as_result(file_name: str, probabilities: np.ndarray, label_map: LabelMap) -> dict[str, Any]:
    """The ten highest scores of one picture with the classes by name, the highest first."""
    order = np.argsort(-probabilities, kind="stable")[:_WRITTEN_SCORES]
    scores = {label_map.names[index]: float(probabilities[index]) for index in order}
    category = next(iter(scores))
    return {"file_name": file_name, "category": category, "score": scores[category], "scores": scores}


@cache
def _normalize(device: torch.device) -> Normalize:
    return Normalize(3).to(device)
