"""Mask R-CNN beside torchvision's, on torchvision's Swin and on timm's.

Ours is the published network, which torchvision's is not: it pools, matches and pastes in other ways. What is compared
is therefore ours built with `style="torchvision"`, which is torchvision's network with the same weights.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from swin_dense.box_masks import BoxMasks
from swin_dense.compilation import compile as swin_dense_compile
from swin_dense.config import WindowRule
from swin_dense.heads.mask_rcnn import MaskRCNN, mask_rcnn
from swin_dense.heads.model_file import build_model
from swin_dense.tools.backbone_peers import BACKBONE_PEERS
from swin_dense.tools.benchmark_agreement import Outputs
from swin_dense.tools.benchmark_contest import OURS, Batch, Contest, Contestant, Row, plain, spread_weights
from swin_dense.tools.benchmark_peers import torchvision_target
from swin_dense.tools.detector_peers import torchvision_twin
from swin_dense.training.random_state import repeated_random_state

NUM_CLASSES = 80
"""Of COCO."""

_OBJECTS_EACH = 15
_LOGIT_STD = 2.0  # some boxes of most images are then above the usual score threshold, 0.05, as in a trained model


@dataclass(frozen=True)
class DetectionBatch(Batch):
    """Images with objects.

    Attributes:
        images: B of (3, H, W) in [0, 1].
        targets: Of each, as `MaskRCNN` takes them.
        full_targets: The same as torchvision takes them, masks as large as the image.
    """

    images: Sequence[Tensor]
    targets: Sequence[Mapping[str, Any]]
    full_targets: Sequence[Mapping[str, Any]]

    def first(self) -> DetectionBatch:
        """The first image alone."""
        return DetectionBatch(self.images[:1], self.targets[:1], self.full_targets[:1])

    def to(self, device: torch.device) -> DetectionBatch:
        """The same on a device."""
        targets, full = (
            [{name: value.to(device) for name, value in target.items()} for target in both]
            for both in (self.targets, self.full_targets)
        )
        return DetectionBatch([image.to(device) for image in self.images], targets, full)

    def cast(self, dtype: torch.dtype) -> DetectionBatch:
        """The same with images of a dtype."""
        return DetectionBatch([image.to(dtype) for image in self.images], self.targets, self.full_targets)


class Detector(Contestant[DetectionBatch]):
    """What ours and torchvision's have in common."""

    # Boxes of almost the same score change places: one of 512 samples more or less is a thousandth of a loss.
    results_tolerance = 2e-2

    def predictions(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores and masks of each image's size."""
        return self.model(list(batch.images))

    @torch.no_grad()
    def maps(self, batch: DetectionBatch) -> Outputs:
        """The levels of the pyramid."""
        return self.outputs(batch)

    def outputs(self, batch: DetectionBatch) -> Outputs:
        """The levels of the pyramid; what follows depends on which boxes are chosen."""
        return {f"p{level}": x for level, x in enumerate(self.levels(batch), start=2)}

    @torch.no_grad()
    def results(self, batch: DetectionBatch, training: bool) -> Outputs:
        """In training the losses, with the same draws; otherwise the scores of what is detected."""
        if not training:
            return {"the scores": torch.cat([found["scores"] for found in self.predictions(batch)])}
        self.model.train()
        with repeated_random_state():
            losses = dict(self.losses(batch))
        self.model.eval()
        return losses

    @abstractmethod
    def levels(self, batch: DetectionBatch) -> list[Tensor]:
        """The pyramid's, finest first."""


class OwnDetector(Detector):
    """Ours."""

    def losses(self, batch: DetectionBatch) -> Mapping[str, Tensor]:
        """Its five."""
        return self.model(batch.images, batch.targets)

    def levels(self, batch: DetectionBatch) -> list[Tensor]:
        """p2 to p6."""
        _, levels = self.model.pyramid(batch.images)
        return list(levels.values())

    def compile(self) -> None:
        """By `swin_dense.compile`: backbone and pyramid, as what follows depends on how many boxes there are."""
        swin_dense_compile(self.model)


class TorchvisionDetector(Detector):
    """torchvision's."""

    def losses(self, batch: DetectionBatch) -> Mapping[str, Tensor]:
        """Its five."""
        return self.model(list(batch.images), list(batch.full_targets))

    def levels(self, batch: DetectionBatch) -> list[Tensor]:
        """As ours."""
        images, _ = self.model.transform(list(batch.images), None)
        return list(self.model.backbone(images.tensors).values())

    def compile(self) -> None:
        """The same parts as of ours; its backbone is both."""
        self.model.backbone.compile()


@dataclass(frozen=True)
class DetectionContest(Contest[DetectionBatch]):
    """Detectors; `head` is what `mask_rcnn` takes."""

    title = "Mask R-CNN"
    peers = ("torchvision", "timm")
    default_rows: ClassVar = {
        "cuda": (
            Row("train step", "bfloat16", 8, (800, 1344)),
            Row("inference", "bfloat16", 8, (800, 1344)),
        ),
        "cpu": (
            Row("train step", "float32", 1, (512, 512)),
            Row("inference", "float32", 1, (512, 512)),
        ),
    }
    remarks = (
        "Inference is all that a user gets: boxes, labels, scores and, for each of at most 100 objects an image, a "
        f"mask of the image's size. A train step is the five losses of images with {_OBJECTS_EACH} objects each, their "
        "gradients and AdamW.",
        "With --compile, detectors are compiled up to their pyramid only: what follows depends on the number of boxes.",
    )
    peer_remarks = (
        "The peers are torchvision's MaskRCNN on torchvision's Swin and on timm's, which give the same; timed is our "
        "published network, which pools, matches and pastes in other ways than torchvision's.",
    )

    def batch(self, row: Row) -> DetectionBatch:
        """Random images with filled boxes."""
        generator = torch.Generator().manual_seed(1)
        images = list(torch.rand(row.batch_size, 3, *row.size_hw, generator=generator))
        num_classes = self.head.get("num_classes", NUM_CLASSES)
        targets = [_random_target(row, num_classes, generator) for _ in images]
        return DetectionBatch(images, targets, [torchvision_target(target) for target in targets])

    def own(self, row: Row) -> OwnDetector:
        """Ours, random, as sure of its classes as a trained one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = mask_rcnn(plain(self.config), **{"num_classes": NUM_CLASSES, **self.head}).eval()
        spread_weights(model.backbone, torch.Generator().manual_seed(0))
        _spread_logits(model, self.batch(dataclasses.replace(row, batch_size=1)))
        return OwnDetector(OURS, model)

    def peer(self, name: str, own: Contestant[DetectionBatch], row: Row) -> TorchvisionDetector:
        """The Mask R-CNN of torchvision on the library's Swin."""
        body = BACKBONE_PEERS[name].build(own.model.backbone, row.size_hw)
        return TorchvisionDetector(name, torchvision_twin(own.model, body))

    def references(
        self, name: str, own: Contestant[DetectionBatch]
    ) -> Mapping[str, Callable[[], Contestant[DetectionBatch]]]:
        """Ours in torchvision's style, with our window rule and the peer's."""
        rule = BACKBONE_PEERS[name].window_rule
        return {
            f"{OURS} with style=torchvision": partial(_as_torchvision, own.model, "dense"),
            f"{OURS} with style=torchvision, window_rule={rule}": partial(_as_torchvision, own.model, rule),
        }


def _random_target(row: Row, num_classes: int, generator: torch.Generator) -> dict[str, Any]:
    height, width = row.size_hw
    corners = torch.rand(_OBJECTS_EACH, 2, 2, generator=generator).sort(dim=1).values
    # At least 5 pixels from side to side; whole pixels, as a mask has.
    low = (corners[:, 0] * torch.tensor([width - 6, height - 6])).floor()
    high = torch.maximum(low + 5, (corners[:, 1] * torch.tensor([width, height])).floor())
    boxes = torch.cat([low, high], dim=1)
    masks = torch.zeros(_OBJECTS_EACH, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": boxes,
        "labels": torch.randint(0, num_classes, (_OBJECTS_EACH,), generator=generator),
        "masks": BoxMasks.from_full(masks),
        "iscrowd": torch.zeros(_OBJECTS_EACH, dtype=torch.bool),
    }


def _spread_logits(model: MaskRCNN, batch: DetectionBatch) -> None:
    """Scale the classifier, in place, so that its logits on a batch have the standard deviation of `_LOGIT_STD`."""
    seen: list[Tensor] = []
    layer = model.roi_heads.box_predictor.cls_score
    hook = layer.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    with torch.no_grad():
        model.detect(batch.images)
        hook.remove()
        layer.weight.mul_(_LOGIT_STD / seen[0].std(dim=1).mean())


def _as_torchvision(model: MaskRCNN, rule: WindowRule) -> OwnDetector:
    config = dataclasses.replace(model.backbone.config, window_rule=rule)
    changed: Any = build_model({**model.architecture, "style": "torchvision", "backbone": config.to_dict()})
    changed.load_state_dict(model.state_dict())
    return OwnDetector(OURS, changed.to(next(model.parameters()).device))
