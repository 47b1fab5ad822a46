"""Semantic segmentation: images with label pictures, UPerNet, mean IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from swin_dense.datasets.ade20k import ade20k_labels
from swin_dense.datasets.class_names import numbered_names, read_class_names
from swin_dense.datasets.drawing import draw_semantic, side_by_side
from swin_dense.datasets.folders import find_semantic_split
from swin_dense.datasets.geometry import Resize
from swin_dense.datasets.images import image_size_hw
from swin_dense.datasets.labels import LabelMap, require_same_labels
from swin_dense.datasets.semantic import SemanticDataset, SemanticSample
from swin_dense.datasets.semantic_scores import SemanticScores
from swin_dense.datasets.semantic_transforms import semantic_training
from swin_dense.errors import ConfigError
from swin_dense.heads.upernet import UPerNet, upernet
from swin_dense.tools.predictors import Predictor, SemanticPredictor
from swin_dense.tools.tasks import NUM_WORST, Evaluator, Scores, Task, ValidationData
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import even_slices


@dataclass(frozen=True)
class SemanticBatch:
    """Images of one size with their label maps, as `UPerNet.forward` takes them, but 8-bit."""

    images: Tensor
    labels: Tensor
    names: list[str]

    @property
    def ids(self) -> list[str]:
        """The files' names."""
        return self.names

    def describe(self) -> str:
        """The files' names and their size, for messages."""
        height, width = self.images.shape[2:]
        return f"images {', '.join(self.names)} ({height} x {width})"

    def split(self, parts: int) -> list[SemanticBatch]:
        """Batches of fewer images."""
        return [
            SemanticBatch(self.images[part], self.labels[part], self.names[part])
            for part in even_slices(len(self.names), parts)
        ]

    def plain(self) -> dict[str, Any]:
        """All of it, to be saved."""
        return dict(vars(self))

    def pin_memory(self) -> SemanticBatch:
        """In memory that a GPU copies from without waiting."""
        return SemanticBatch(self.images.pin_memory(), self.labels.pin_memory(), self.names)


class SemanticTask(Task[SemanticSample, SemanticBatch, np.ndarray]):
    """See `Task`."""

    main_score = "mIoU"
    class_columns = ("IoU", "accuracy", "precision", "boundary_IoU")

    def training_data(self) -> SemanticDataset:
        """Augmented crops of one size."""
        augmentation = self.recipe.augmentation
        transform = semantic_training(
            augmentation.scale,
            augmentation.ratio_range,
            crop_size_hw=augmentation.crop_size_hw,
            max_category_ratio=augmentation.max_category_ratio,
            flip_probability=augmentation.flip_probability,
            photometric=augmentation.photometric,
            tile_size=augmentation.tile_size,
        )
        images, labels = self._folders("train")
        return SemanticDataset(images, labels, self.label_map(), transform, seed=self.recipe.run.seed)

    def validation_data(self, label_map: LabelMap) -> SemanticValidation:
        """All images, as they are."""
        own = self.label_map()  # which values to ignore is the data set's matter, not the model's
        require_same_labels(label_map, own, "the recipe's dataset.classes")
        images, labels = self._folders("val")
        return SemanticValidation(SemanticDataset(images, labels, own))

    def label_map(self) -> LabelMap:
        """The classes that the recipe names, and what each value of a label picture means.

        Raises:
            ConfigError: The recipe names no classes, or names them twice, or gives values that its classes do not have.
        """
        settings = self.recipe.dataset
        if settings.classes is None:
            raise ConfigError(
                "the label pictures do not say what their values mean: set dataset.classes to ade20k, "
                "to a text file with one class name per line, to a list of names, or to how many there are."
            )
        if settings.classes == "ade20k":
            return ade20k_labels(settings.first_value, settings.ignored_values)
        names = settings.classes
        if isinstance(names, int):
            names = numbered_names(names)
        elif isinstance(names, str):
            path = self.data_path(names)
            assert path is not None
            names = read_class_names(path)
        values = tuple(range(settings.first_value, settings.first_value + len(names)))
        return LabelMap(names, values, settings.ignored_values)

    def _folders(self, split: str) -> tuple[Path, Path]:
        settings = self.recipe.dataset
        images = self.data_path(getattr(settings, f"{split}_images"))
        labels = self.data_path(getattr(settings, f"{split}_annotations"))
        if images is None or labels is None:
            found_images, found_labels = find_semantic_split(self.data_root(), split)
            images, labels = images or found_images, labels or found_labels
        return images, labels

    def batch_groups(self, dataset: Any) -> None:  # noqa: ANN401
        """Crops are all alike."""
        return None

    def build_model(self, num_classes: int) -> UPerNet:
        """UPerNet with the recipe's settings and random weights."""
        return upernet(self.backbone_config(), num_classes, **self.head_settings(upernet))

    @staticmethod
    def collate(samples: Sequence[SemanticSample]) -> SemanticBatch:
        """Crops are stacked."""
        return SemanticBatch(
            torch.stack([sample.image for sample in samples]),
            torch.stack([sample.label for sample in samples]),
            [sample.name for sample in samples],
        )

    @staticmethod
    def losses(model: nn.Module, batch: SemanticBatch, device: torch.device) -> Mapping[str, LossTerm]:
        """The losses of the decoder and of the auxiliary head."""
        images = batch.images.to(device, non_blocking=True).float() / 255
        assert isinstance(model, UPerNet)
        return model.loss_terms(images, batch.labels.to(device, non_blocking=True))

    def sample_picture(self, sample: SemanticSample, label_map: LabelMap) -> np.ndarray:
        """The labels, laid over the image."""
        return draw_semantic(sample.image.permute(1, 2, 0).numpy(), sample.label.numpy(), label_map)

    def predictor(self, model: nn.Module, label_map: LabelMap, device: torch.device) -> SemanticPredictor:
        """Class indices at the original size."""
        assert isinstance(model, UPerNet)
        return SemanticPredictor(model, label_map, self.recipe.inference, device)

    def table(self, scores: Scores) -> dict[str, float | None]:
        """The three numbers usually reported, and those of single images and of outlines."""
        return {name: scores[name] for name in ("mIoU", "mAcc", "aAcc", "image_mIoU", "boundary_mIoU")}


class SemanticValidation(ValidationData[np.ndarray]):
    """Labelled images to score and to draw.

    Args:
        dataset: Without transform.
    """

    def __init__(self, dataset: SemanticDataset) -> None:
        self.dataset = dataset
        self.paths = [dataset.paths(index)[0] for index in range(len(dataset))]
        self.sizes_hw = [image_size_hw(dataset.paths(index)[1]) for index in range(len(dataset))]

    def evaluator(self, predictions: Path | None = None) -> SemanticEvaluator:
        """Mean IoU over the whole set; predictions go into a folder of label pictures."""
        return SemanticEvaluator(self.dataset, predictions)

    def target(self, index: int, size_hw: tuple[int, int]) -> Tensor:
        """The label map, (h, w) uint8."""
        return torch.from_numpy(np.ascontiguousarray(Resize(size_hw).label(self.dataset.label(index))))

    def picture(self, index: int, predictor: Predictor[np.ndarray], prediction: np.ndarray) -> np.ndarray:
        """Given labels beside predicted ones."""
        image, label = self.dataset.raw(index)
        truth = draw_semantic(image, label, self.dataset.label_map)
        return side_by_side([truth, predictor.picture(image, prediction)], ["ground truth", "prediction"])


class SemanticEvaluator(Evaluator[np.ndarray]):
    """Mean IoU of collected label maps, and what is wrong with them.

    Args:
        dataset: The labelled images.
        predictions: The folder to write label pictures to, or None.
    """

    def __init__(self, dataset: SemanticDataset, predictions: Path | None) -> None:
        self._dataset = dataset
        self._scores = SemanticScores(dataset.label_map)
        self._predictions = predictions
        if predictions is not None:
            predictions.mkdir(parents=True, exist_ok=True)

    def add(self, index: int, prediction: np.ndarray) -> None:
        """Take the prediction of one image."""
        self._scores.add(index, prediction, self._dataset.label(index))
        if self._predictions is not None:
            path = self._predictions / f"{self._dataset.names[index]}.png"
            write_label(path, prediction, self._dataset.label_map)

    def merge(self, other: Any) -> None:  # noqa: ANN401
        """Take what another process has collected."""
        self._scores.merge(other._scores)

    def finish(self) -> Scores:
        """As `SemanticScores.compute`, with the worst images."""
        worst = [
            {"index": index, "name": self._dataset.names[index], "mIoU": iou}
            for index, iou in self._scores.worst_images(NUM_WORST)
        ]
        return {**self._scores.compute(), "worst_images": worst}


def write_label(path: Path, prediction: np.ndarray, label_map: LabelMap) -> None:
    """Save class indices as a label picture with the data set's own values, 16-bit where 8 do not suffice."""
    dtype = np.uint8 if max(label_map.raw_ids) <= 255 else np.uint16
    Image.fromarray(np.array(label_map.raw_ids, dtype)[prediction]).save(path)
