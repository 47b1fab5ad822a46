"""The numbers that every detector is built from, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swin_dense.errors import ConfigError

COCO_IGNORE_OVERLAP = 0.5
"""From this overlap on COCO's evaluation forgives a detection in a crowd, at the lowest of its thresholds."""

_COUNTS = (
    "num_classes",
    "fpn_channels",
    "box_head_channels",
    "mask_head_channels",
    "max_detections",
    "max_proposals",
    "samples_per_image",
)


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """What `mask_rcnn` and `cascade_mask_rcnn` have in common.

    Attributes:
        num_classes: K, background not counted.
        fpn_channels: The channels of every pyramid level.
        box_head_channels: Width of the hidden linear layers of a box head.
        mask_head_channels: Width of a mask head.
        score_threshold: Detections at or below it are dropped.
        max_detections: The most detections of one image.
        anchor_scale: Anchor side over stride.
        max_proposals: Proposals of one image.
        samples_per_image: Proposals that a box head is trained on.
        ignore_overlap: Anchors and proposals with this share of their area in a crowd or another region to ignore are
            not background, see `matching.without_ignored`; None makes such regions background, as published.
        image_mean: Of each channel; None is ImageNet's.
        image_std: Of each channel; None is ImageNet's.

    Raises:
        ConfigError: A count is below 1, the scale is not above 0, or the overlap is not a share.
    """

    num_classes: int
    fpn_channels: int
    box_head_channels: int
    mask_head_channels: int
    score_threshold: float
    max_detections: int
    anchor_scale: float
    max_proposals: int
    samples_per_image: int
    ignore_overlap: float | None
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            count = getattr(self, name)
            if count < 1:
                raise ConfigError(f"{name} must be 1 or more, got {count}.")
        if self.anchor_scale <= 0:
            raise ConfigError(f"anchor_scale must be above 0, got {self.anchor_scale}.")
        if self.ignore_overlap is not None and not 0 < self.ignore_overlap <= 1:
            raise ConfigError(f"ignore_overlap must be above 0 and at most 1, or None, got {self.ignore_overlap}.")

    def plain(self) -> dict[str, Any]:
        """The settings by name, in types that JSON has."""
        settings = asdict(self)
        for name in ("image_mean", "image_std"):
            settings[name] = list(settings[name]) if settings[name] else None
        return settings
