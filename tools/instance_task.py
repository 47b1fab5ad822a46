"""Instance segmentation: COCO-format data, Mask R-CNN or its cascade, box and mask AP."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swin_dense.box_masks import BoxMasks
from swin_dense.datasets.coco import CocoDataset, InstanceSample, find_coco_split
from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.copy_paste import CopyPaste
from swin_dense.datasets.drawing import draw_instances, side_by_side
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.transforms import InstanceTransform, instance_training, large_scale_jitter
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import MaskRCNN, mask_rcnn
from swin_dense.tools.predictors import InstancePrediction, InstancePredictor, Predictor
from swin_dense.tools.tasks import Evaluator, Scores, Task, ValidationData

DETECTORS: dict[str, Callable[..., MaskRCNN]] = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}


@dataclass(frozen=True)
class InstanceBatch:
    """Images of any sizes with their targets, as `MaskRCNN.forward` takes them, but 8-bit."""

    images: list[Tensor]
    targets: list[dict[str, Tensor | BoxMasks]]
    image_ids: list[int]

    def describe(self) -> str:
        """The image ids, for messages."""
        return f"images {', '.join(map(str, self.image_ids))}"

    def pin_memory(self) -> InstanceBatch:
        """In memory that a GPU copies from without waiting."""
        targets = [{name: value.pin_memory() for name, value in target.items()} for target in self.targets]
        return InstanceBatch([image.pin_memory() for image in self.images], targets, self.image_ids)


class InstanceTask(Task[InstanceSample, InstanceBatch, InstancePrediction]):
    """See `Task`."""

    main_score = "mask AP"

    def training_data(self) -> CocoDataset:
        """Images with at least one object, augmented."""
        annotations, images = self._files("train")
        return CocoDataset(
            annotations,
            images,
            self._transform(),
            copy_paste=CopyPaste(self.recipe.augmentation.copy_paste_probability),
            skip_empty=True,
            seed=self.recipe.run.seed,
        )

    def _transform(self) -> InstanceTransform:
        augmentation = self.recipe.augmentation
        if augmentation.jitter_size is not None:
            return large_scale_jitter(
                augmentation.jitter_size,
                augmentation.jitter_range,
                augmentation.flip_probability,
                augmentation.tile_size,
                augmentation.tile_least_share,
            )
        return instance_training(
            augmentation.short_edges,
            augmentation.max_long_edge,
            augmentation.flip_probability,
            augmentation.crop_branch,
            tile_size=augmentation.tile_size,
            tile_least_share=augmentation.tile_least_share,
        )

    def validation_data(self, label_map: LabelMap) -> InstanceValidation:
        """All images, as they are."""
        annotations, images = self._files("val")
        return InstanceValidation(CocoDataset(annotations, images, label_map=label_map))

    def _files(self, split: str) -> tuple[Path, Path]:
        settings = self.recipe.dataset
        annotations = self.data_path(getattr(settings, f"{split}_annotations"))
        images = self.data_path(getattr(settings, f"{split}_images"))
        if annotations is None or images is None:
            found_annotations, found_images = find_coco_split(self.data_root(), split)
            annotations, images = annotations or found_annotations, images or found_images
        return annotations, images

    def batch_groups(self, dataset: CocoDataset) -> np.ndarray | None:
        """Wide images apart from tall ones, so that less of a batch is padding; squares need no padding."""
        if self.recipe.augmentation.jitter_size is not None:
            return None
        return (dataset.aspect_ratios > 1).astype(np.int64)

    def build_model(self, num_classes: int) -> MaskRCNN:
        """The recipe's detector with its settings and random weights."""
        build = DETECTORS[self.recipe.model.detector]
        return build(self.backbone_config(), num_classes, **self.head_settings(build))

    @staticmethod
    def collate(samples: Sequence[InstanceSample]) -> InstanceBatch:
        """Images keep their sizes."""
        return InstanceBatch(
            [sample.image for sample in samples],
            [sample.target for sample in samples],
            [sample.image_id for sample in samples],
        )

    @staticmethod
    def losses(model: nn.Module, batch: InstanceBatch, device: torch.device) -> Mapping[str, Tensor]:
        """Mask R-CNN's five losses, or three of each stage and two of the proposals of a cascade."""
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch.targets
        ]
        return model(images, targets)

    def predictor(self, model: nn.Module, label_map: LabelMap, device: torch.device) -> InstancePredictor:
        """Detections in original pixels."""
        assert isinstance(model, MaskRCNN)
        return InstancePredictor(model, label_map, self.recipe.inference, device)

    def table(self, scores: Scores) -> dict[str, float | None]:
        """The numbers usually reported, for boxes and masks."""
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        return {f"{kind} {name}": scores[kind][name] for kind in ("box", "mask") for name in names}


class InstanceValidation(ValidationData[InstancePrediction]):
    """COCO-format images to score and to draw.

    Args:
        dataset: Without transform.
    """

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset
        self.paths = [dataset.image_path(index) for index in range(len(dataset))]
        self.sizes_hw = [(int(height), int(width)) for height, width in dataset.sizes_hw]

    def evaluator(self, predictions: Path | None = None) -> InstanceEvaluator:
        """COCO's metrics; predictions go into a COCO results file."""
        return InstanceEvaluator(self.dataset, predictions)

    def picture(
        self, index: int, predictor: Predictor[InstancePrediction], prediction: InstancePrediction
    ) -> np.ndarray:
        """Annotated objects beside found ones."""
        image, instances = self.dataset.raw(index)
        instances, masks = instances.with_masks()
        label_map = self.dataset.label_map
        names = [
            label_map.names[label] + (" (ignored)" if ignored else "")
            for label, ignored in zip(instances.labels, instances.is_crowd, strict=True)
        ]
        truth = draw_instances(image, instances.boxes_xyxy, names, masks.full().numpy(), label_map=label_map)
        return side_by_side([truth, predictor.picture(image, prediction)], ["ground truth", "prediction"])


class InstanceEvaluator(Evaluator[InstancePrediction]):
    """COCO's metrics of collected detections.

    Args:
        dataset: The annotated images.
        predictions: The results file to write, or None.
    """

    def __init__(self, dataset: CocoDataset, predictions: Path | None) -> None:
        self._predictions = predictions
        self._image_ids = dataset.image_ids
        self._coco = CocoEvaluator(dataset.ground_truth, dataset.label_map)

    def add(self, index: int, prediction: InstancePrediction) -> None:
        """Take the detections of one image."""
        self._coco.add(
            self._image_ids[index],
            prediction.boxes_xyxy,
            prediction.scores,
            prediction.labels,
            prediction.masks_rle,
        )

    def merge(self, other: Any) -> None:  # noqa: ANN401
        """Take what another process has collected."""
        self._coco.merge(other._coco)

    def finish(self) -> Scores:
        """{"box": {…}, "mask": {…}, "per_class": {…}}."""
        if self._predictions is not None:
            self._predictions.parent.mkdir(parents=True, exist_ok=True)
            self._predictions.write_text(json.dumps(self._coco.results()))
        return self._coco.compute()
