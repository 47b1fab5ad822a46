"""Instance segmentation: COCO-format data, Mask R-CNN or its cascade, box and mask AP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swin_dense.box_masks import BoxMasks
from swin_dense.datasets.coco import CocoDataset, InstanceSample, detector_target, find_coco_split
from swin_dense.datasets.coco_self_check import require_perfect_score
from swin_dense.datasets.copy_paste import CopyPaste
from swin_dense.datasets.drawing import draw_instances, side_by_side
from swin_dense.datasets.geometry import Resize
from swin_dense.datasets.instance_scores import InstanceScores
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.transforms import InstanceTransform, instance_training, large_scale_jitter
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import MaskRCNN, mask_rcnn
from swin_dense.tools.predictors import InstancePrediction, InstancePredictor, Predictor
from swin_dense.tools.tasks import NUM_WORST, Evaluator, Scores, Task, ValidationData
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import even_slices

DETECTORS: dict[str, Callable[..., MaskRCNN]] = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}


@dataclass(frozen=True)
class InstanceBatch:
    """Images of any sizes with their targets, as `MaskRCNN.forward` takes them, but 8-bit."""

    images: list[Tensor]
    targets: list[dict[str, Tensor | BoxMasks]]
    image_ids: list[int]
    least_size_hw: tuple[int, int] = (0, 0)
    """They are padded to at least this: the size of the batch that they are a part of."""

    @property
    def ids(self) -> list[int]:
        """The image ids."""
        return self.image_ids

    def describe(self) -> str:
        """The image ids and sizes, for messages."""
        images = zip(self.image_ids, self.images, strict=True)
        return f"images {', '.join(f'{name} ({image.shape[1]} x {image.shape[2]})' for name, image in images)}"

    def split(self, parts: int) -> list[InstanceBatch]:
        """Batches of fewer images, padded as the whole is."""
        sizes_hw = [self.least_size_hw, *((image.shape[1], image.shape[2]) for image in self.images)]
        height, width = (max(sides) for sides in zip(*sizes_hw, strict=True))
        return [
            InstanceBatch(self.images[part], self.targets[part], self.image_ids[part], (height, width))
            for part in even_slices(len(self.images), parts)
        ]

    def plain(self) -> dict[str, Any]:
        """Images, targets and ids, to be saved."""
        targets = [
            {name: vars(value) if isinstance(value, BoxMasks) else value for name, value in target.items()}
            for target in self.targets
        ]
        return {"images": self.images, "targets": targets, "image_ids": self.image_ids}

    def pin_memory(self) -> InstanceBatch:
        """In memory that a GPU copies from without waiting."""
        targets = [{name: value.pin_memory() for name, value in target.items()} for target in self.targets]
        return replace(self, images=[image.pin_memory() for image in self.images], targets=targets)


class InstanceTask(Task[InstanceSample, InstanceBatch, InstancePrediction]):
    """See `Task`."""

    main_score = "mask AP"
    class_columns = ("box_AP", "box_AP50", "mask_AP", "mask_AP50")

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
    def losses(model: nn.Module, batch: InstanceBatch, device: torch.device) -> Mapping[str, LossTerm]:
        """Mask R-CNN's five losses, or three of each stage and two of the proposals of a cascade."""
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            # Which objects are crowds is asked on the host, which need not wait for a GPU then.
            {
                name: value if name == "iscrowd" else value.to(device, non_blocking=True)
                for name, value in target.items()
            }
            for target in batch.targets
        ]
        assert isinstance(model, MaskRCNN)
        return model.loss_terms(images, targets, batch.least_size_hw)  # type: ignore[arg-type]  # a target's own keys

    def sample_picture(self, sample: InstanceSample, label_map: LabelMap) -> np.ndarray:
        """The objects, and the regions that take no part."""
        boxes, labels, masks, is_crowd = (sample.target[name] for name in ("boxes", "labels", "masks", "iscrowd"))
        assert isinstance(masks, BoxMasks) and isinstance(boxes, Tensor)
        names = _named(label_map, labels, is_crowd)
        image = sample.image.permute(1, 2, 0).numpy()
        return draw_instances(image, boxes.numpy(), names, masks.full().numpy(), label_map=label_map)

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

    def prove(self) -> list[str]:
        """As in `ValidationData`, with COCO's numbers."""
        return require_perfect_score(self.dataset.ground_truth, self.dataset.label_map)

    def evaluator(self, predictions: Path | None = None) -> InstanceEvaluator:
        """COCO's metrics; predictions go into a COCO results file."""
        return InstanceEvaluator(self.dataset, predictions)

    def target(self, index: int, size_hw: tuple[int, int]) -> dict[str, Tensor | BoxMasks]:
        """The objects, as training samples have them."""
        return detector_target(Resize(size_hw).instances(self.dataset.instances(index)))

    def picture(
        self, index: int, predictor: Predictor[InstancePrediction], prediction: InstancePrediction
    ) -> np.ndarray:
        """Annotated objects beside found ones."""
        image, instances = self.dataset.raw(index)
        instances, masks = instances.with_masks()
        label_map = self.dataset.label_map
        names = _named(label_map, instances.labels, instances.is_crowd)
        truth = draw_instances(image, instances.boxes_xyxy, names, masks.full().numpy(), label_map=label_map)
        return side_by_side([truth, predictor.picture(image, prediction)], ["ground truth", "prediction"])


class InstanceEvaluator(Evaluator[InstancePrediction]):
    """COCO's metrics of collected detections, and what is wrong with them.

    Args:
        dataset: The annotated images.
        predictions: The results file to write, or None.
    """

    def __init__(self, dataset: CocoDataset, predictions: Path | None) -> None:
        self._predictions = predictions
        self._image_ids = dataset.image_ids
        self._file_names = [dataset.image_path(index).name for index in range(len(dataset))]
        keep_results = predictions is not None
        self._scores = InstanceScores(dataset.ground_truth, dataset.label_map, keep_results=keep_results)

    def add(self, index: int, prediction: InstancePrediction) -> None:
        """Take the detections of one image."""
        image_id, found = self._image_ids[index], prediction
        detections = self._scores.coco.detections(
            image_id, found.boxes_xyxy, found.scores, found.labels, found.masks_rle
        )
        self._scores.add(image_id, detections)

    def merge(self, other: Any) -> None:  # noqa: ANN401
        """Take what another process has collected."""
        self._scores.merge(other._scores)

    def finish(self) -> Scores:
        """As `InstanceScores.compute`, with the worst images."""
        if self._predictions is not None:
            self._scores.coco.write_results(self._predictions)
        scores = self._scores.compute()
        index_of = {image_id: index for index, image_id in enumerate(self._image_ids)}
        worst = [
            {"index": index_of[image_id], "name": self._file_names[index_of[image_id]], "errors": errors}
            for image_id, errors in self._scores.worst_images(NUM_WORST)
        ]
        return {**scores, "worst_images": worst}


def _named(label_map: LabelMap, labels: Any, is_ignored: Any) -> list[str]:  # noqa: ANN401 - tensors or arrays
    return [
        label_map.names[label] + (" (ignored)" if ignored else "")
        for label, ignored in zip(labels.tolist(), is_ignored.tolist(), strict=True)
    ]
