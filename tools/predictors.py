"""From a trained model to predictions in the frame of the original image; `evaluate` and `predict` share this path.

    image (H, W, 3) uint8 -> resize -> model -> boxes, masks or labels at (H, W), or the probability of each class
                          -> tiles  -> model -> the same, merged
                          -> views  -> model -> the same, merged: the image in several sizes, and flipped

Images go through one at a time, so that a prediction never depends on its neighbours in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from swin_dense.box_masks import BoxMasks
from swin_dense.classification import Classifier
from swin_dense.datasets.classification_dataset import ImageSource, read_source
from swin_dense.datasets.classification_transforms import classification_inference
from swin_dense.datasets.drawing import draw_classification, draw_instances, draw_semantic
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.heads.backbones import Normalize
from swin_dense.heads.losses import image_loss
from swin_dense.heads.mask_pasting import masks_to_rle
from swin_dense.heads.mask_rcnn import MaskRCNN
from swin_dense.heads.model_file import load_model
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.sliding_window import sliding_window
from swin_dense.heads.upernet import UPerNet
from swin_dense.heads.upsampling import likeliest_classes
from swin_dense.heads.view_detection import view_detector
from swin_dense.heads.views import View, logits_in_original, mean_probabilities
from swin_dense.tools.image_views import Resizing, Views, instance_views, resized, semantic_views
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.large_pictures import draw_large_instances, draw_large_semantic
from swin_dense.tools.recipe import InferenceSettings, Recipe, recipe_from
from swin_dense.tools.tiled_prediction import detect_tiles, label_tiles, tiling_of
from swin_dense.training.loss_terms import LossTerm
from swin_dense.windows import SizeHW

TargetOf = Callable[[int, SizeHW], Any]
Prediction = TypeVar("Prediction")


class Predictor(ABC, Generic[Prediction]):
    """A model that predicts original images.

    Args:
        label_map: The model's classes.
        views: How the model sees images; None where it sees tiles of them.
        device: Where the model is.
    """

    def __init__(self, label_map: LabelMap, views: Views | None, device: torch.device) -> None:
        self.label_map = label_map
        self.views = views
        self.resize = None if views is None else views.only_resizing()
        self.device = device

    @property
    def has_several_views(self) -> bool:
        """The model sees each image more than once."""
        return self.views is not None and self.resize is None

    def __call__(self, image: np.ndarray) -> Prediction:
        """Predict one image, (H, W, 3) uint8 RGB."""
        return self.predict(resized(image, self.resize), (image.shape[0], image.shape[1]))

    @abstractmethod
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> Prediction:
        """Predict one image, (3, h, w) uint8, resized if there is one size only, in the frame of the original."""

    @property
    def gives_losses(self) -> bool:
        """Whether there is `predict_with_losses`: where the model sees an image as in training, once and whole."""
        return False

    def predict_with_losses(
        self,
        image: Tensor,
        original_size_hw: SizeHW,
        target: Any,  # noqa: ANN401 - the task's own
    ) -> tuple[Prediction, Mapping[str, LossTerm]]:
        """As `predict`, bit for bit, and from the same pass the losses of the image; only where it `gives_losses`.

        Args:
            image: (3, h, w) uint8, resized.
            original_size_hw: (H, W) of the original.
            target: What the losses compare with, in the frame of the resized image; see `ValidationData.target`.
        """
        raise NotImplementedError

    @abstractmethod
    def picture(self, image: np.ndarray, prediction: Prediction) -> np.ndarray:
        """The prediction drawn over its image, (h, w, 3) uint8."""

    def images(
        self,
        paths: Sequence[ImageSource],
        sizes_hw: Sequence[SizeHW | None],
        workers: int,
        target_of: TargetOf | None = None,
    ) -> DataLoader[Any]:
        """Reads and resizes pictures in worker processes: (index, resized image, original size, target) one by one.

        Images that are tiled or resized later are read here, so that memory holds one at a time.
        """
        workers = 0 if self.resize is None else workers
        images = _ResizedImages(paths, sizes_hw, self.resize, target_of)
        return DataLoader(images, batch_size=None, num_workers=workers)

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
        for index, image, original_size_hw, _ in self.images(paths, sizes_hw, workers):
            prediction = self.predict(image, original_size_hw)
            del image  # it may be large, and the next one is read before this name changes
            yield index, prediction

    def predict_annotated(
        self,
        paths: Sequence[ImageSource],
        sizes_hw: Sequence[SizeHW | None],
        target_of: TargetOf,
        workers: int = 0,
    ) -> Iterator[tuple[int, Prediction, Mapping[str, LossTerm]]]:
        """As `predict_files`, with the losses of each image; only where it `gives_losses`.

        Args:
            paths: The pictures.
            sizes_hw: The size that annotations state for each, or None.
            target_of: From an index and the size of the resized image to what its losses compare with.
            workers: Processes that read and resize.

        Yields:
            (index, prediction, losses).
        """
        for index, image, original_size_hw, target in self.images(paths, sizes_hw, workers, target_of):
            yield index, *self.predict_with_losses(image, original_size_hw, target)

    def _view(self, image: Tensor) -> View:
        return View(image.to(self.device).float() / 255)

    def _views(self, image: Tensor) -> Iterator[View]:
        if self.views is None or self.resize is not None:
            yield self._view(image)
            return
        for resize in self.views.resizings:
            view = self._view(resized(_channels_last(image), resize))
            yield view
            if self.views.with_flipped:
                yield view.flipped()


class InstancePredictor(Predictor[InstancePrediction]):
    """Mask R-CNN on original images.

    Args:
        model: In evaluation mode, on `device`.
        label_map: Its classes.
        settings: How images are resized or cut, which boxes suppress others, and from which score on objects are drawn.
        device: Where the model is.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, model: MaskRCNN, label_map: LabelMap, settings: InferenceSettings, device: torch.device) -> None:
        self.tiling = tiling_of(settings)
        views = instance_views(settings)
        super().__init__(label_map, views if self.tiling is None else None, device)
        self.model = model
        is_plain = not self.has_several_views and settings.soft_nms is None
        self.detect_views = None if is_plain else view_detector(model, settings.soft_nms)
        self.max_detections = settings.max_detections
        self.drawn_score = settings.drawn_score

    def predict(self, image: Tensor, original_size_hw: SizeHW) -> InstancePrediction:
        """As in `Predictor`."""
        if self.tiling is None:
            return self._detect(image, original_size_hw)
        return detect_tiles(_channels_last(image), self.tiling, self._detect, self.max_detections)

    @property
    def gives_losses(self) -> bool:
        """As in `Predictor`, with the model's own suppression."""
        return self.resize is not None and self.detect_views is None

    @torch.inference_mode()
    def predict_with_losses(
        self, image: Tensor, original_size_hw: SizeHW, target: Mapping[str, Tensor | BoxMasks]
    ) -> tuple[InstancePrediction, Mapping[str, LossTerm]]:
        """As in `Predictor`."""
        view = self._view(image)
        own: Any = {name: value.to(self.device) for name, value in target.items()}
        (found,), losses = self.model.detect_with_losses([view.image], [own])
        return _in_original(view, found, original_size_hw), losses

    @torch.inference_mode()
    def _detect(self, image: Tensor, original_size_hw: SizeHW) -> InstancePrediction:
        if self.detect_views is not None:
            return _as_prediction(self.detect_views(self._views(image), original_size_hw), original_size_hw)
        view = self._view(image)
        return _in_original(view, self.model.detect([view.image])[0], original_size_hw)

    def picture(self, image: np.ndarray, prediction: InstancePrediction) -> np.ndarray:
        """The objects from `drawn_score` on, drawn over their image."""
        shown = prediction.above(self.drawn_score)
        if self.tiling is not None:
            return draw_large_instances(image, shown, self.label_map)
        names = [self.label_map.names[label] for label in shown.labels]
        masks = shown.masks() if names else None
        return draw_instances(image, shown.boxes_xyxy, names, masks, shown.scores, label_map=self.label_map)


def _in_original(view: View, found: dict[str, Tensor], size_hw: SizeHW) -> InstancePrediction:
    return _as_prediction({**found, "boxes": view.boxes_to_original(found["boxes"], size_hw)}, size_hw)


def _as_prediction(found: Mapping[str, Tensor], size_hw: SizeHW) -> InstancePrediction:
    return InstancePrediction(
        found["boxes"].cpu().numpy(),
        found["labels"].cpu().numpy(),
        found["scores"].cpu().numpy(),
        masks_to_rle(found["masks"], found["boxes"], size_hw),
    )


class SemanticPredictor(Predictor[np.ndarray]):
    """UPerNet on original images; a prediction is (H, W) uint8 class indices.

    Args:
        model: In evaluation mode, on `device`.
        label_map: Its classes.
        settings: How images are resized or cut, and whether in windows.
        device: Where the model is.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, model: UPerNet, label_map: LabelMap, settings: InferenceSettings, device: torch.device) -> None:
        self.tiling = tiling_of(settings)
        views = semantic_views(settings)
        super().__init__(label_map, views if self.tiling is None else None, device)
        self.model = model
        self.window = sliding_window(settings.slide_crop_hw, settings.slide_stride_hw)

    @torch.inference_mode()
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> np.ndarray:
        """As in `Predictor`."""
        if self.gives_losses:  # nothing is averaged, so nothing but the labels is kept
            return _labels(self.model.predict_labels(self._view(image).image[None], original_size_hw)[0])
        if self.tiling is None:
            return _labels(self._scores(image, original_size_hw).argmax(dim=0))
        return label_tiles(_channels_last(image), self.tiling, self._scores)

    @property
    def gives_losses(self) -> bool:
        """As in `Predictor`, without windows."""
        return self.resize is not None and self.window is None

    @torch.inference_mode()
    def predict_with_losses(
        self, image: Tensor, original_size_hw: SizeHW, target: Tensor
    ) -> tuple[np.ndarray, Mapping[str, LossTerm]]:
        """As in `Predictor`."""
        view = self._view(image)
        logits, losses = self.model.logits_and_losses(view.image[None], target[None].to(self.device))
        return _labels(likeliest_classes(logits, [original_size_hw])[0]), losses

    def _scores(self, image: Tensor, size_hw: SizeHW) -> Tensor:
        """(3, h, w) to (K, H, W), highest for the class of a pixel: of one view logits, of several probabilities."""
        if self.has_several_views:
            return mean_probabilities(self._views(image), self._logits, size_hw)
        return logits_in_original(self._view(image), self._logits, size_hw)

    def _logits(self, images: Tensor) -> Tensor:
        return self.model(images) if self.window is None else self.window(images, self.model)

    def picture(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The classes laid over their image, with a legend."""
        if self.tiling is not None:
            return draw_large_semantic(image, prediction, self.label_map)
        return draw_semantic(image, prediction, self.label_map)


def _labels(classes: Tensor) -> np.ndarray:
    return classes.to(torch.uint8).cpu().numpy()


class ClassificationPredictor(Predictor[np.ndarray]):
    """A classifier on original images; a prediction is (K,) float32 probabilities.

    Args:
        model: In evaluation mode, on `device`.
        label_map: Its classes.
        settings: How images are cropped.
        device: Where the model is.

    Raises:
        ConfigError: The model does not read RGB, or the settings ask for tiles or several views.
    """

    def __init__(
        self, model: Classifier, label_map: LabelMap, settings: InferenceSettings, device: torch.device
    ) -> None:
        for name, wanted in (("tile_size", None), ("augmented", False)):
            if getattr(settings, name) != wanted:
                raise ConfigError(f"inference.{name}: a classifier sees an image once and whole; leave it out.")
        super().__init__(label_map, Views([classification_inference(settings.crop_size_hw)]), device)
        self.model = model
        self.normalize = Normalize(model.backbone.config.in_channels).to(device)

    @torch.inference_mode()
    def predict(self, image: Tensor, original_size_hw: SizeHW) -> np.ndarray:
        """As in `Predictor`."""
        return self._logits(image)[0].softmax(dim=0).cpu().numpy()

    @property
    def gives_losses(self) -> bool:
        """As in `Predictor`; always."""
        return True

    @torch.inference_mode()
    def predict_with_losses(
        self, image: Tensor, original_size_hw: SizeHW, target: int
    ) -> tuple[np.ndarray, Mapping[str, LossTerm]]:
        """As in `Predictor`; labels are smoothed as in training, images are not mixed."""
        logits = self._logits(image)
        loss = image_loss(logits, torch.tensor([target], device=self.device))
        return logits[0].softmax(dim=0).cpu().numpy(), {"loss_classification": LossTerm(loss, 1)}

    def _logits(self, image: Tensor) -> Tensor:
        return at_least_float32(self.model(self.normalize(self._view(image).image[None])))

    def picture(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The image with the most probable classes."""
        return draw_classification(image, prediction, self.label_map)


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


class _ResizedImages(Dataset[tuple[int, Tensor, SizeHW, Any]]):
    def __init__(
        self,
        paths: Sequence[ImageSource],
        sizes_hw: Sequence[SizeHW | None],
        resize: Resizing | None,
        target_of: TargetOf | None,
    ) -> None:
        self._paths = paths
        self._sizes_hw = sizes_hw
        self._resize = resize
        self._target_of = target_of

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor, SizeHW, Any]:
        image = read_source(self._paths[index], self._sizes_hw[index])
        seen = resized(image, self._resize)
        target = None if self._target_of is None else self._target_of(index, (seen.shape[1], seen.shape[2]))
        return index, seen, (image.shape[0], image.shape[1]), target
