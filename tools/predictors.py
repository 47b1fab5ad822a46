"""From a trained model to predictions in the frame of the original image; `evaluate` and `predict` share this path.

    image (H, W, 3) uint8 -> resize -> model -> boxes, masks or labels at (H, W), or the probability of each class
                          -> tiles  -> model -> the same, merged

Images go through one at a time, so that a prediction never depends on its neighbours in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from swin_dense.classification import Classifier
from swin_dense.datasets.classification_dataset import ImageSource, read_source
from swin_dense.datasets.drawing import draw_classification, draw_instances, draw_semantic
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.transforms import (
    ClassificationTransform,
    InstanceTransform,
    SemanticTransform,
    classification_inference,
    instance_inference,
    semantic_inference,
)
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.heads.backbones import Normalize
from swin_dense.heads.mask_pasting import masks_to_rle
from swin_dense.heads.mask_rcnn import MaskRCNN
from swin_dense.heads.model_file import load_model
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.upernet import UPerNet
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.large_pictures import draw_large_instances, draw_large_semantic
from swin_dense.tools.recipe import InferenceSettings, Recipe, recipe_from
from swin_dense.tools.tiled_prediction import detect_tiles, label_tiles, tiling_of

SizeHW = tuple[int, int]
Resizing = InstanceTransform | SemanticTransform | ClassificationTransform
Prediction = TypeVar("Prediction")


class Predictor(ABC, Generic[Prediction]):
    """A model that predicts original images.

    Args:
        label_map: The model's classes.
        resize: Resizes images for the model; None where it sees tiles of them.
        device: Where the model is.
    """

    def __init__(self, label_map: LabelMap, resize: Resizing | None, device: torch.device) -> None:
        self.label_map = label_map
        self.resize = resize
        self.device = device

    def __call__(self, image: np.ndarray) -> Prediction:
        """Predict one image, (H, W, 3) uint8 RGB."""
        return self.predict(resized(image, self.resize), (image.shape[0], image.shape[1]))

    @abstractmethod
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> Prediction:
        """Predict one resized image, (3, h, w) uint8, in the frame of the original."""

    @abstractmethod
    def picture(self, image: np.ndarray, prediction: Prediction) -> np.ndarray:
        """The prediction drawn over its image, (h, w, 3) uint8."""

    def images(self, paths: Sequence[ImageSource], sizes_hw: Sequence[SizeHW | None], workers: int) -> DataLoader[Any]:
        """Reads and resizes pictures in worker processes: (index, resized image, original size) one by one.

        Images that stay as large as they are, for tiles, are read here, so that memory holds one at a time.
        """
        workers = 0 if self.resize is None else workers
        return DataLoader(_ResizedImages(paths, sizes_hw, self.resize), batch_size=None, num_workers=workers)

    def predict_files(
        self, paths: Sequence[ImageSource], sizes_hw: Sequence[SizeHW | None], workers: int = 0
    ) -> Iterator[tuple[int, Prediction]]:
        """Predict pictures by path, in order.

        Args:
            paths: The pictures.
            sizes_hw: The size that annotations state for each, or None; see `read_image`.
            workers: Processes that read and resize.

        Yields:
            (index, prediction).
        """
        for index, image, original_size_hw in self.images(paths, sizes_hw, workers):
            prediction = self.predict(image, original_size_hw)
            del image  # it may be large, and the next one is read before this name changes
            yield index, prediction

    def _to_device(self, image: Tensor) -> Tensor:
        return image.to(self.device).float() / 255


class InstancePredictor(Predictor[InstancePrediction]):
    """Mask R-CNN on original images.

    Args:
        model: In evaluation mode, on `device`.
        label_map: Its classes.
        settings: How images are resized or cut, and from which score on objects are drawn.
        device: Where the model is.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, model: MaskRCNN, label_map: LabelMap, settings: InferenceSettings, device: torch.device) -> None:
        self.tiling = tiling_of(settings)
        resize = instance_inference(settings.short_edge, settings.max_long_edge) if self.tiling is None else None
        super().__init__(label_map, resize, device)
        self.model = model
        self.max_detections = settings.max_detections
        self.drawn_score = settings.drawn_score

    def predict(self, image: Tensor, original_size_hw: SizeHW) -> InstancePrediction:
        """As in `Predictor`."""
        if self.tiling is None:
            return self._detect(image, original_size_hw)
        return detect_tiles(_channels_last(image), self.tiling, self._detect, self.max_detections)

    @torch.inference_mode()
    def _detect(self, image: Tensor, original_size_hw: SizeHW) -> InstancePrediction:
        found = self.model.detect([self._to_device(image)])[0]
        (height, width), (original_height, original_width) = image.shape[1:], original_size_hw
        scale_xy = found["boxes"].new_tensor([original_width / width, original_height / height])
        boxes = found["boxes"] * scale_xy.repeat(2)
        return InstancePrediction(
            boxes.cpu().numpy(),
            found["labels"].cpu().numpy(),
            found["scores"].cpu().numpy(),
            masks_to_rle(found["masks"], boxes, original_size_hw),
        )

    def picture(self, image: np.ndarray, prediction: InstancePrediction) -> np.ndarray:
        """The objects from `drawn_score` on, drawn over their image."""
        shown = prediction.above(self.drawn_score)
        if self.tiling is not None:
            return draw_large_instances(image, shown, self.label_map)
        names = [self.label_map.names[label] for label in shown.labels]
        masks = shown.masks() if names else None
        return draw_instances(image, shown.boxes_xyxy, names, masks, shown.scores, label_map=self.label_map)


class SemanticPredictor(Predictor[np.ndarray]):
    """UPerNet on original images; a prediction is (H, W) uint8 class indices.

    Args:
        model: In evaluation mode, on `device`.
        label_map: Its classes.
        settings: How images are resized or cut.
        device: Where the model is.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, model: UPerNet, label_map: LabelMap, settings: InferenceSettings, device: torch.device) -> None:
        self.tiling = tiling_of(settings)
        super().__init__(label_map, semantic_inference(settings.scale) if self.tiling is None else None, device)
        self.model = model

    @torch.inference_mode()
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> np.ndarray:
        """As in `Predictor`."""
        if self.tiling is None:
            return self._logits(image, original_size_hw).argmax(dim=0).to(torch.uint8).cpu().numpy()
        return label_tiles(_channels_last(image), self.tiling, self._logits)

    def _logits(self, image: Tensor, original_size_hw: SizeHW) -> Tensor:
        """(3, h, w) to (K, H, W) of the original."""
        logits = self.model(self._to_device(image)[None])
        return functional.interpolate(logits, size=original_size_hw, mode="bilinear", align_corners=False)[0]

    def picture(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The classes laid over their image, with a legend."""
        if self.tiling is not None:
            return draw_large_semantic(image, prediction, self.label_map)
        return draw_semantic(image, prediction, self.label_map)


class ClassificationPredictor(Predictor[np.ndarray]):
    """A classifier on original images; a prediction is (K,) float32 probabilities.

    Args:
        model: In evaluation mode, on `device`.
        label_map: Its classes.
        settings: How images are cropped.
        device: Where the model is.

    Raises:
        ConfigError: The model does not read RGB, or the settings ask for tiles.
    """

    def __init__(
        self, model: Classifier, label_map: LabelMap, settings: InferenceSettings, device: torch.device
    ) -> None:
        if settings.tile_size is not None:
            raise ConfigError("inference.tile_size: a classifier sees an image as a whole; set it to null.")
        super().__init__(label_map, classification_inference(settings.crop_size_hw), device)
        self.model = model
        self.normalize = Normalize(model.backbone.config.in_channels).to(device)

    @torch.inference_mode()
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> np.ndarray:
        """As in `Predictor`."""
        logits = self.model(self.normalize(self._to_device(image)[None]))
        return at_least_float32(logits)[0].softmax(dim=0).cpu().numpy()

    def picture(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The image with the most probable classes."""
        return draw_classification(image, prediction, self.label_map)


def resized(image: np.ndarray, resize: Resizing | None) -> Tensor:
    """(H, W, 3) uint8 to (3, h, w) uint8 at the model's size; None gives the same pixels, without a copy."""
    if resize is None:
        return torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)
    size_hw = (image.shape[0], image.shape[1])
    if isinstance(resize, ClassificationTransform):
        image = resize(image, seed=0)
    elif isinstance(resize, InstanceTransform):
        image, _ = resize(image, Instances.empty(size_hw), seed=0)
    else:
        image, _ = resize(image, np.zeros(size_hw, np.uint8), seed=0)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def load_predictor(
    path: str | Path, device: torch.device | str = "cpu", overrides: Sequence[str] = ()
) -> InstancePredictor | SemanticPredictor | ClassificationPredictor:
    """A predictor from a trained model's file; the path is all it needs.

    Args:
        path: A file that `train` wrote.
        device: Where to predict.
        overrides: Changes to the recipe inside, such as "inference.short_edge=640".

    Raises:
        CheckpointError: The file is missing, damaged or foreign.
        ConfigError: An override is wrong.
    """
    model, about = load_model(path)
    recipe, label_map = recipe_and_labels(path, about, overrides)
    device = torch.device(device)
    model = model.to(device)
    if isinstance(model, Classifier):
        return ClassificationPredictor(model, label_map, recipe.inference, device)
    if isinstance(model, UPerNet):
        return SemanticPredictor(model, label_map, recipe.inference, device)
    return InstancePredictor(model, label_map, recipe.inference, device)


def recipe_and_labels(
    path: str | Path, about: Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[Recipe, LabelMap]:
    """What `train` wrote beside the weights.

    Args:
        path: The model's file, for messages.
        about: Its text.
        overrides: Changes to the recipe.

    Raises:
        CheckpointError: It was not `train` that wrote the file.
        ConfigError: An override is wrong.
    """
    for key in ("recipe", "labels"):
        if key not in about:
            raise CheckpointError(f"{path}: a model without {key}; use a file that swin-dense train wrote.")
    return recipe_from(about["recipe"], overrides, str(path)), LabelMap.from_dict(about["labels"])


def _channels_last(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


class _ResizedImages(Dataset[tuple[int, Tensor, SizeHW]]):
    def __init__(
        self,
        paths: Sequence[ImageSource],
        sizes_hw: Sequence[SizeHW | None],
        resize: Resizing | None,
    ) -> None:
        self._paths = paths
        self._sizes_hw = sizes_hw
        self._resize = resize

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor, SizeHW]:
        image = read_source(self._paths[index], self._sizes_hw[index])
        return index, resized(image, self._resize), (image.shape[0], image.shape[1])
