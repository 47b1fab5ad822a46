"""Swin as an image classifier: one label for a whole image.

The classifier of both papers (https://arxiv.org/abs/2103.14030, section 3.1, and https://arxiv.org/abs/2111.09883): the
mean of the last stage's normalised map, then one linear layer. The backbone's last output norm is the published
classifiers' final norm, so their weights give their logits.

    images (B, 3, H, W) -> backbone "c5" (B, 8C, h, w) -> mean over the cells (B, 8C) -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from swin_dense.config import STAGE_NAMES, SwinConfig, variant_config
from swin_dense.errors import ConfigError
from swin_dense.swin import SwinTransformer
from swin_dense.typed_values import convert


class Classifier(nn.Module):
    """Backbone and linear layer.

    Args:
        backbone: Its coarsest map is classified.
        num_classes: K.

    Attributes:
        architecture: What rebuilds the model, in plain types.
    """

    def __init__(self, backbone: SwinTransformer, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.architecture: dict[str, Any] = {
            "head": "classifier",
            "backbone": backbone.config.to_dict(),
            "num_classes": num_classes,
        }
        *_, coarsest = backbone.feature_specs.values()
        self.head = nn.Linear(coarsest.channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)  # the official initialisation
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: (B, in_channels, H, W) float, normalised as the weights expect (published ones: RGB in [0, 1], less
                ImageNet's mean, over its standard deviation); any H, W >= 1.

        Returns:
            Logits (B, K).
        """
        *_, coarsest = self.backbone(images).values()
        return self.head(coarsest.mean(dim=(2, 3)))


def classifier(
    backbone: str | SwinConfig | SwinTransformer,
    num_classes: int,
    weights: str | None = None,
    **changes: Any,  # noqa: ANN401 - the fields of SwinConfig
) -> Classifier:
    """A Swin classifier as published. Unlike the heads it leaves normalising images to the caller, as backbones do.

    Args:
        backbone: A variant name or a configuration, from which only the last map is built, with its norm, and whose
            window rule becomes "classification", that of the official classifiers, unless `changes` say otherwise; or
            a backbone, which stays as it is.
        num_classes: K.
        weights: A weights file to load into the model or into its backbone; None leaves random weights.
        changes: Fields of `SwinConfig` to set differently, such as `window_rule="timm"` or `drop_path_rate=0.1`.

    Raises:
        ConfigError: The variant or a field is unknown, or a setting is out of range.
        CheckpointError: The weights do not fit.

    Example:
        >>> import torch
        >>> config = SwinConfig(embed_dim=8, depths=(1, 1), num_heads=(1, 2), out_features=("c2", "c3"))
        >>> model = classifier(config, num_classes=10).eval()
        >>> model(torch.rand(2, 3, 41, 67)).shape
        torch.Size([2, 10])
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes must be 1 or more, got {num_classes}.")
    if isinstance(backbone, str):
        backbone = variant_config(backbone)
    if isinstance(backbone, SwinConfig):
        backbone = SwinTransformer(_classification_config(backbone, changes))
    elif changes:
        raise ConfigError(f"{', '.join(changes)}: a backbone that is built cannot be changed; pass its configuration.")
    model = Classifier(backbone, num_classes)
    if weights is not None:
        from swin_dense.weights import load_weights

        load_weights(model, weights)
    return model


def _classification_config(config: SwinConfig, changes: Mapping[str, Any]) -> SwinConfig:
    depths = convert(tuple[int, ...], changes.get("depths", config.depths), "SwinConfig", "depths")
    last_map = STAGE_NAMES[: len(depths)][-1:]
    defaults = {"window_rule": "classification", "out_features": last_map, "output_norm": True}
    return SwinConfig.from_dict({**vars(config), **defaults, **changes})
