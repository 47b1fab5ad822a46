"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019): two images in one, and their classes in the same shares.

As in the training of the published classifiers, a whole batch is mixed with itself in reverse order, in one proportion.
"""

from dataclasses import dataclass

import torch

from swin_dense.errors import ConfigError


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed.

    Attributes:
        share: how much of each image's class stays; the rest is its partner's.
        box: (top, left, bottom, right) in pixels, which the partner fills; None blends all pixels by `share`.
    """

    share: float
    box: tuple[int, int, int, int] | None

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the mixed images, (B, C, H, W) float; the given ones stay as they are."""
        if self.box is None:
            return self.targets(images)
        top, left, bottom, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        return mixed

    def targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mixed shares of the classes, (B, K) float."""
        if self.share == 1:
            return targets
        return targets * self.share + targets.flip(0) * (1 - self.share)


def draw_mix(size_hw: tuple[int, int], mixup_alpha: float, cutmix_alpha: float) -> Mix:
    """Draws a mix from torch's CPU generator, mixup or CutMix with equal probability where both are wanted.

    Args:
        size_hw: (height, width) of the images.
        mixup_alpha: both parameters of the beta distribution of `Mix.share`; published: 0.8. 0 for none.
        cutmix_alpha: likewise for CutMix; published: 1. 0 for none. With both 0 the mix changes nothing.

    Raises:
        ConfigError: an alpha is negative.
    """
    if min(mixup_alpha, cutmix_alpha) < 0:
        raise ConfigError(
            f"augmentation: mixup_alpha and cutmix_alpha must be from 0, got {mixup_alpha}, {cutmix_alpha}"
        )
    cuts = cutmix_alpha > 0 and (mixup_alpha == 0 or float(torch.rand(())) < 0.5)
    alpha = cutmix_alpha if cuts else mixup_alpha
    if alpha == 0:
        return Mix(1.0, None)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not cuts:
        return Mix(share, None)
    # A box of the image's shape and of 1 - share of its area, its centre anywhere: the border may cut it.
    height, width = size_hw
    sides = [int(side * (1 - share) ** 0.5) for side in size_hw]
    centre = [int(torch.randint(side, ())) for side in size_hw]
    top, left = (max(0, middle - side // 2) for middle, side in zip(centre, sides, strict=True))
    bottom, right = (min(full, m + side // 2) for full, m, side in zip(size_hw, centre, sides, strict=True))
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))
