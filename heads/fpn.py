"""Feature pyramid network: one width and strong semantics at every level.

Feature Pyramid Networks for Object Detection (Lin et al., 2017), https://arxiv.org/abs/1612.03144.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from swin_dense.errors import ConfigError
from swin_dense.features import FeatureSpec


class FPN(nn.Module):
    """torchvision's pyramid with levels named by stride: level p<k> has stride 2^k.

    Nearest upsampling to the finer map's own size (any size works), and one more level by subsampling the coarsest.

    Args:
        feature_specs: What the backbone returns, finest first.
        channels: The channels of every level; 256 in the paper.

    Raises:
        ConfigError: A stride is not a power of two, or strides do not double from map to map.
    """

    def __init__(self, feature_specs: Mapping[str, FeatureSpec], channels: int = 256) -> None:
        super().__init__()
        strides = [spec.stride for spec in feature_specs.values()]
        doubling = all(2 * fine == coarse for fine, coarse in pairwise(strides))
        if not strides or strides[0] & (strides[0] - 1) or not doubling:
            raise ConfigError(f"FPN needs strides that are powers of two and double, got {strides}.")
        strides.append(2 * strides[-1])
        self.in_names = tuple(feature_specs)
        self.feature_specs = {f"p{stride.bit_length() - 1}": FeatureSpec(channels, stride) for stride in strides}
        self.pyramid = FeaturePyramidNetwork(
            [spec.channels for spec in feature_specs.values()], channels, extra_blocks=LastLevelMaxPool()
        )

    @property
    def roi_specs(self) -> dict[str, FeatureSpec]:
        """The levels that boxes are pooled from: all but the coarsest, which serves proposals only."""
        return dict(list(self.feature_specs.items())[:-1])

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Backbone maps, {name: (B, C_i, h_i, w_i)}, to levels, {"p2": (B, channels, h, w), …}, finest first."""
        levels = self.pyramid(OrderedDict((name, features[name]) for name in self.in_names))
        return dict(zip(self.feature_specs, levels.values(), strict=True))
