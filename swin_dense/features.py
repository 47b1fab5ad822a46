"""What a backbone promises about each map it returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureSpec:
    """One feature map of shape (B, channels, ceil(H / stride), ceil(W / stride)) for images (B, 3, H, W).

    Attributes:
        channels: The number of channels.
        stride: Image pixels per cell, along both sides.
    """

    channels: int
    stride: int
