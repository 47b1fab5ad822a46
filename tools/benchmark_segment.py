"""UPerNet beside those of Hugging Face and segmentation-models-pytorch."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from swin_dense.compilation import compile as swin_dense_compile
from swin_dense.config import WindowRule
from swin_dense.heads.backbones import Normalize
from swin_dense.heads.model_file import build_model
from swin_dense.heads.upernet import UPerNet, upernet
from swin_dense.tools.benchmark_agreement import Outputs
from swin_dense.tools.benchmark_contest import OURS, Batch, Contest, Contestant, Row, plain, spread_weights
from swin_dense.tools.segmenter_peers import hugging_face_twin, smp_twin
from swin_dense.training.loss_terms import total

NUM_CLASSES = 150
"""Of ADE20K."""

COARSE = "the logits at a quarter of the size"
LOGITS = "the logits"
LOSS = "the loss"


@dataclass(frozen=True)
class SegmentationBatch(Batch):
    """Images with labels.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: (B, H, W) int64, a class everywhere.
    """

    images: Tensor
    labels: Tensor

    def first(self) -> SegmentationBatch:
        """The first image alone."""
        return SegmentationBatch(self.images[:1], self.labels[:1])

    def to(self, device: torch.device) -> SegmentationBatch:
        """The same on a device."""
        return SegmentationBatch(self.images.to(device), self.labels.to(device))

    def cast(self, dtype: torch.dtype) -> SegmentationBatch:
        """The same with images of a dtype."""
        return SegmentationBatch(self.images.to(dtype), self.labels)


class Segmenter(Contestant[SegmentationBatch]):
    """What all have in common."""

    @abstractmethod
    def predictions(self, batch: SegmentationBatch) -> Tensor:
        """Logits (B, K, H, W)."""

    def outputs(self, batch: SegmentationBatch) -> Outputs:
        """The logits; the loss of random weights is almost the same whatever they are."""
        return {LOGITS: self.predictions(batch)}


class OwnSegmenter(Segmenter):
    """Ours."""

    def losses(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        """Of both heads."""
        return self.model(batch.images, batch.labels)

    def predictions(self, batch: SegmentationBatch) -> Tensor:
        """Logits (B, K, H, W)."""
        return self.model(batch.images)

    def compile(self) -> None:
        """By `swin_dense.compile`."""
        swin_dense_compile(self.model)

    @torch.no_grad()
    def maps(self, batch: SegmentationBatch) -> Outputs:
        """Logits before and after they are enlarged."""
        model: UPerNet = self.model
        features = model.backbone(model.normalize(batch.images))
        return {COARSE: model.decode_head(list(features.values())), LOGITS: model(batch.images)}

    @torch.no_grad()
    def results(self, batch: SegmentationBatch, training: bool) -> Outputs:
        """In training, the sum of both heads' losses."""
        return {LOSS: total(self.losses(batch))} if training else {}


class HuggingFaceSegmenter(Segmenter):
    """Hugging Face's; its images are normalised as ours."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__("huggingface", _Normalized(model))

    def losses(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        """Of both heads in one."""
        return {"loss": self.model(batch.images, labels=batch.labels).loss}

    def predictions(self, batch: SegmentationBatch) -> Tensor:
        """Logits (B, K, H, W)."""
        return self.model(batch.images).logits

    @torch.no_grad()
    def maps(self, batch: SegmentationBatch) -> Outputs:
        """Logits."""
        return {LOGITS: self.predictions(batch)}

    @torch.no_grad()
    def results(self, batch: SegmentationBatch, training: bool) -> Outputs:
        """In training, the sum of both heads' losses."""
        return {LOSS: total(self.losses(batch))} if training else {}


class SmpSegmenter(Segmenter):
    """segmentation-models-pytorch's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__("smp", _Normalized(model))

    def losses(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        """Of its only head."""
        return {"loss": functional.cross_entropy(self.model(batch.images).float(), batch.labels)}

    def predictions(self, batch: SegmentationBatch) -> Tensor:
        """Logits (B, K, H, W)."""
        return self.model(batch.images)

    @torch.no_grad()
    def maps(self, batch: SegmentationBatch) -> Outputs:
        """Logits before they are enlarged, which it does with aligned corners."""
        inner = self.model.model
        features = inner.encoder(self.model.normalize(batch.images))
        return {COARSE: inner.segmentation_head[0](inner.decoder(features))}

    def results(self, batch: SegmentationBatch, training: bool) -> Outputs:
        """Nothing: its loss is that of other logits."""
        return {}


class _Normalized(torch.nn.Module):
    """A model with the normalisation that ours has inside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> object:
        """(B, 3, H, W) in [0, 1] to what the model gives."""
        options = {} if labels is None else {"labels": labels}
        return self.model(self.normalize(images), **options)


@dataclass(frozen=True)
class SegmentationContest(Contest[SegmentationBatch]):
    """UPerNets; `head` is what `upernet` takes."""

    title = "UPerNet"
    peers = ("huggingface", "smp")
    least_training_batch = 2  # their batch normalisation cannot train on the 1 x 1 maps of one
    default_rows: ClassVar = {
        "cuda": (
            Row("train step", "bfloat16", 16, (512, 512)),
            Row("inference", "bfloat16", 16, (512, 512)),
        ),
        "cpu": (
            Row("train step", "float32", 2, (512, 512)),
            Row("inference", "float32", 2, (512, 512)),
        ),
    }
    remarks = (
        "Inference is logits of the images' size for 150 classes; a train step is the loss of the main and of the "
        "auxiliary head, its gradients and AdamW.",
    )
    peer_remarks = (
        "smp has no auxiliary head, so its train step does less; it enlarges logits with aligned corners, so they are "
        "compared before.",
    )

    def batch(self, row: Row) -> SegmentationBatch:
        """Random images and labels."""
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(row.batch_size, 3, *row.size_hw, generator=generator)
        num_classes = self.head.get("num_classes", NUM_CLASSES)
        labels = torch.randint(0, num_classes, (row.batch_size, *row.size_hw), generator=generator)
        return SegmentationBatch(images, labels)

    def own(self, row: Row) -> OwnSegmenter:
        """Ours, random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = upernet(plain(self.config), **{"num_classes": NUM_CLASSES, **self.head, "dropout": 0.0})
        spread_weights(model, torch.Generator().manual_seed(0))
        return OwnSegmenter(OURS, model)

    def peer(self, name: str, own: Contestant[SegmentationBatch], row: Row) -> Contestant[SegmentationBatch]:
        """The library's UPerNet."""
        if name == "smp":
            return SmpSegmenter(smp_twin(own.model, row.size_hw))
        return HuggingFaceSegmenter(hugging_face_twin(own.model))

    def references(
        self, name: str, own: Contestant[SegmentationBatch]
    ) -> Mapping[str, Callable[[], Contestant[SegmentationBatch]]]:
        """Ours, and for smp ours with timm's window rule."""
        references: dict[str, Callable[[], Contestant[SegmentationBatch]]] = {OURS: lambda: own}
        if name == "smp":
            references[f"{OURS} with window_rule=timm"] = partial(_with_rule, own.model, "timm")
        return references


def _with_rule(model: UPerNet, rule: WindowRule) -> OwnSegmenter:
    config = dataclasses.replace(model.backbone.config, window_rule=rule)
    changed = build_model({**model.architecture, "backbone": config.to_dict()})
    changed.load_state_dict(model.state_dict())
    return OwnSegmenter(OURS, changed.to(next(model.parameters()).device))
