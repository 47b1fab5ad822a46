"""The backbone beside those of timm, torchvision and Hugging Face: four normalised maps of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from swin_dense.compilation import compile as swin_dense_compile
from swin_dense.config import WindowRule
from swin_dense.swin import SwinTransformer
from swin_dense.tools.backbone_peers import BACKBONE_PEERS
from swin_dense.tools.benchmark_agreement import Outputs
from swin_dense.tools.benchmark_contest import OURS, Batch, Contest, Contestant, Row, plain, spread_weights
from swin_dense.training.loss_terms import total

GRADIENT = "the gradient of the images"


@dataclass(frozen=True)
class BackboneBatch(Batch):
    """Images, and what is multiplied with the maps to have something to minimise.

    Attributes:
        images: (B, 3, H, W) float, as if normalised.
        factors: By the maps' names, (B, C, h, w).
    """

    images: Tensor
    factors: Mapping[str, Tensor]

    def first(self) -> BackboneBatch:
        """The first image alone."""
        return BackboneBatch(self.images[:1], {name: value[:1] for name, value in self.factors.items()})

    def to(self, device: torch.device) -> BackboneBatch:
        """The same on a device."""
        return BackboneBatch(self.images.to(device), {name: value.to(device) for name, value in self.factors.items()})

    def cast(self, dtype: torch.dtype) -> BackboneBatch:
        """The same with images of a dtype."""
        return BackboneBatch(self.images.to(dtype), self.factors)


class BackboneContestant(Contestant[BackboneBatch]):
    """A backbone that returns {"c2": …, "c3": …}."""

    def losses(self, batch: BackboneBatch) -> dict[str, Tensor]:
        """For each map the sum of its products with the batch's factors."""
        return self._losses(self.model(batch.images), batch)

    def predictions(self, batch: BackboneBatch) -> Outputs:
        """The maps."""
        return self.model(batch.images)

    @torch.no_grad()
    def maps(self, batch: BackboneBatch) -> Outputs:
        """All of them."""
        return self.model(batch.images)

    def outputs(self, batch: BackboneBatch) -> Outputs:
        """The maps."""
        return self.model(batch.images)

    def results(self, batch: BackboneBatch, training: bool) -> Outputs:
        """In training, what flows back through all maps to the images."""
        if not training:
            return {}
        images = batch.images.clone().requires_grad_()
        losses = self._losses(self.model(images), batch)
        return {GRADIENT: torch.autograd.grad(total(losses), images)[0]}

    @staticmethod
    def _losses(maps: Outputs, batch: BackboneBatch) -> dict[str, Tensor]:
        return {name: (stage_map * batch.factors[name]).sum() for name, stage_map in maps.items()}


class OwnBackbone(BackboneContestant):
    """Ours."""

    def compile(self) -> None:
        """By `swin_dense.compile`."""
        swin_dense_compile(self.model)


@dataclass(frozen=True)
class BackboneContest(Contest[BackboneBatch]):
    """Backbones; there is no head."""

    title = "Backbone"
    peers = tuple(BACKBONE_PEERS)
    default_rows: ClassVar = {
        "cuda": (
            Row("forward and backward", "bfloat16", 8, (800, 1344)),
            Row("inference", "bfloat16", 8, (800, 1344)),
            Row("forward and backward", "bfloat16", 16, (512, 512)),
        ),
        "cpu": (
            Row("inference", "float32", 1, (512, 512)),
            Row("inference", "bfloat16", 1, (512, 512), cast_once=True),
            Row("inference", "bfloat16", 1, (512, 512)),
            Row("train step", "bfloat16", 1, (512, 512)),
            Row("train step", "float32", 1, (512, 512)),
        ),
    }
    remarks = (
        "Inference is the four maps, each normalised; backward goes through all four to the weights, and a train step "
        "ends with AdamW.",
    )
    peer_remarks = ("timm and torchvision have no norm for each map; ours follow theirs.",)

    def batch(self, row: Row) -> BackboneBatch:
        """Normal random images."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(row.batch_size, 3, *row.size_hw, generator=generator)
        with torch.device("meta"):
            maps = SwinTransformer(plain(self.config))(torch.empty(images.shape))
        shapes = {name: stage_map.shape for name, stage_map in maps.items()}
        return BackboneBatch(images, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})

    def own(self, row: Row) -> OwnBackbone:
        """Ours, random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = SwinTransformer(plain(self.config))
        spread_weights(backbone, torch.Generator().manual_seed(0))
        return OwnBackbone(OURS, backbone)

    def peer(self, name: str, own: Contestant[BackboneBatch], row: Row) -> BackboneContestant:
        """The library's Swin."""
        return BackboneContestant(name, BACKBONE_PEERS[name].build(own.model, row.size_hw))

    def references(
        self, name: str, own: Contestant[BackboneBatch]
    ) -> Mapping[str, Callable[[], Contestant[BackboneBatch]]]:
        """Ours, and ours with the peer's window rule."""
        rule = BACKBONE_PEERS[name].window_rule
        return {OURS: lambda: own, f"{OURS} with window_rule={rule}": partial(_with_rule, own.model, rule)}


def _with_rule(backbone: SwinTransformer, rule: WindowRule) -> OwnBackbone:
    changed = SwinTransformer(dataclasses.replace(backbone.config, window_rule=rule))
    changed.load_state_dict(backbone.state_dict())
    return OwnBackbone(OURS, changed.to(next(backbone.parameters()).device))
