"""Swin backbones of other libraries with the weights of one of ours, and with the same maps as output.

timm and torchvision have no norm for each map: ours follow theirs. What a peer computes at a size is told by the
`window_rule` of ours that it is equal to, see `SwinConfig.window_rule`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from swin_dense.config import STAGE_NAMES, SwinConfig, WindowRule
from swin_dense.errors import ConfigError
from swin_dense.swin import SwinTransformer
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import in_format
from swin_dense.windows import SizeHW


class TorchvisionStages(nn.Module):
    """The stages of torchvision's Swin: images (B, 3, H, W) to raw maps (B, h, w, C), finest first.

    Args:
        config: Of a Swin V1.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

        self.features = TorchvisionSwin(
            [config.patch_size] * 2,
            config.embed_dim,
            list(config.depths),
            list(config.num_heads),
            [one_window(config)] * 2,
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=config.drop_path_rate,
        ).features

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to as many maps as there are stages."""
        maps, x = [], images
        for index, part in enumerate(self.features):  # patch embedding and merging stand before each stage
            x = part(x)
            if index % 2 == 1:
                maps.append(x)
        return maps


class TimmStages(nn.Module):
    """The stages of timm's Swin, built for one image size: then it keeps its masks instead of making them every time.

    Args:
        config: Of a Swin V1.
        size_hw: (height, width) of the images.
    """

    def __init__(self, config: SwinConfig, size_hw: SizeHW) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer as TimmSwin

        model = TimmSwin(
            img_size=size_hw,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=one_window(config),
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path_rate,
            num_classes=0,
        )
        self.patch_embed, self.layers = model.patch_embed, model.layers

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to as many maps as there are stages."""
        maps, x = [], self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class NormedStages(nn.Module):
    """Raw maps, normalised: images (B, 3, H, W) to {"c2": (B, C, H/4, W/4), …} as ours.

    Args:
        stages: Images to maps (B, h, w, C).
        norms: One for each.
    """

    def __init__(self, stages: nn.Module, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = stages
        self.norms = nn.ModuleList(norms)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name, channels first."""
        maps = zip(STAGE_NAMES, self.norms, self.stages(images), strict=True)
        return {name: norm(stage_map).permute(0, 3, 1, 2) for name, norm, stage_map in maps}


class HuggingFaceMaps(nn.Module):
    """Hugging Face's SwinBackbone, its maps by name.

    Args:
        model: A `transformers.SwinBackbone`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to {"c2": (B, C, H/4, W/4), …}."""
        return dict(zip(STAGE_NAMES, self.model(images).feature_maps, strict=True))


def torchvision_backbone(backbone: SwinTransformer, size_hw: SizeHW) -> NormedStages:
    """Swin of torchvision with the weights of ours; arguments as for `timm_backbone`."""
    stages = TorchvisionStages(backbone.config)
    stages.load_state_dict(_tensors(backbone, "torchvision"))
    return NormedStages(stages, _norms(backbone))


def timm_backbone(backbone: SwinTransformer, size_hw: SizeHW) -> NormedStages:
    """Swin of timm with the weights of ours.

    Args:
        backbone: Ours, a Swin V1 with all maps.
        size_hw: (height, width) of the images that it will see.

    Raises:
        ConfigError: timm has no such network: it takes multiples of a patch, and windows no larger than a map.
    """
    require_timm_size(backbone.config, size_hw)
    stages = TimmStages(backbone.config, size_hw)
    stages.load_state_dict(_tensors(backbone, "timm"))
    return NormedStages(stages, _norms(backbone))


def hugging_face_backbone(backbone: SwinTransformer, size_hw: SizeHW) -> HuggingFaceMaps:
    """SwinBackbone of Hugging Face with the weights of ours; arguments as for `timm_backbone`."""
    from transformers import SwinBackbone

    return HuggingFaceMaps(from_tensors(SwinBackbone, hugging_face_config(backbone.config), backbone))


@dataclass(frozen=True)
class BackbonePeer:
    """A library that has Swin.

    Attributes:
        window_rule: Of ours, that it is equal to.
        build: Its backbone with the weights of ours, for images of one size.
    """

    window_rule: WindowRule
    build: Callable[[SwinTransformer, SizeHW], nn.Module]


BACKBONE_PEERS = {
    "timm": BackbonePeer("timm", timm_backbone),
    "torchvision": BackbonePeer("classification", torchvision_backbone),
    "huggingface": BackbonePeer("dense", hugging_face_backbone),
}


def hugging_face_config(config: SwinConfig) -> Any:  # noqa: ANN401 - a transformers.SwinConfig
    """Hugging Face's configuration of the same backbone, all maps."""
    import transformers

    build: Any = transformers.SwinConfig
    return build(
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=one_window(config),
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path_rate,
        out_features=[f"stage{stage + 1}" for stage in range(len(config.depths))],
    )


def from_tensors(model_class: Any, config: Any, model: nn.Module) -> nn.Module:  # noqa: ANN401 - of transformers
    """One of Hugging Face's models with the weights of ours; nothing is read from a file or the network.

    Args:
        model_class: Of transformers.
        config: Of the same architecture as `model`.
        model: Ours.
    """
    from transformers.utils import logging

    written = in_format(recognise(model.state_dict(), "swin-dense"), "huggingface").tensors
    tensors = {name: value.clone() for name, value in written.items()}  # they become its parameters as they are
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded, told = model_class.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, dtype=next(iter(tensors.values())).dtype
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    return loaded


def require_timm_size(config: SwinConfig, size_hw: SizeHW) -> None:
    """Refuse what timm's Swin is another network for, with parameters of other shapes.

    Raises:
        ConfigError: Names the size and what fits.
    """
    if any(side % config.patch_size for side in size_hw):
        raise ConfigError(f"timm takes multiples of {config.patch_size} pixels, got --size {size_hw[0]} {size_hw[1]}.")
    stride = config.patch_size * 2 ** (len(config.depths) - 1)
    least = one_window(config) * stride
    if any(math.ceil(side / stride) * stride < least for side in size_hw):
        raise ConfigError(
            f"timm makes its windows smaller for --size {size_hw[0]} {size_hw[1]}; choose at least {least} pixels a "
            "side, or other --peers."
        )


def one_window(config: SwinConfig) -> int:
    """The window side that all stages have, of a Swin V1.

    Raises:
        ConfigError: It is a Swin V2, or its windows differ.
    """
    windows = {config.stage_window_size(stage) for stage in range(len(config.depths))}
    if config.version != 1 or len(windows) > 1:
        raise ConfigError("peers are compared for Swin V1; choose such a --variant, or --peers without a name.")
    return windows.pop()


def _tensors(backbone: SwinTransformer, family: str) -> dict[str, Tensor]:
    written = in_format(recognise(backbone.state_dict(), "swin-dense"), family)
    return {name: value for name, value in written.tensors.items() if name not in written.kept}


def _norms(backbone: SwinTransformer) -> list[nn.Module]:
    stages = range(len(backbone.config.depths))
    return [copy.deepcopy(backbone.get_submodule(f"norm{stage}")) for stage in stages]
