"""UPerNet of other libraries on Swin, as large as ours and with our weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from swin_dense.config import SwinConfig
from swin_dense.heads.upernet import UPerNet
from swin_dense.tools.backbone_peers import from_tensors, hugging_face_config, one_window, require_timm_size
from swin_dense.weights.backbone_names import TIMM_FEATURES
from swin_dense.weights.head_names import SMP_UPERNET
from swin_dense.weights.rules import to_file_names
from swin_dense.windows import SizeHW


def smp_upernet(architecture: Mapping[str, Any], **options: Any) -> nn.Module:  # noqa: ANN401 - of timm
    """segmentation-models-pytorch's UPerNet on timm's Swin, as wide as ours; it has no auxiliary head.

    Args:
        architecture: Of our UPerNet.
        options: Of timm's Swin, such as `img_size`.
    """
    import segmentation_models_pytorch as smp

    config = SwinConfig.from_dict(architecture["backbone"])
    return smp.UPerNet(
        "tu-swin_tiny_patch4_window7_224",
        encoder_weights=None,
        decoder_channels=architecture["channels"],
        classes=architecture["num_classes"],
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=one_window(config),
        drop_path_rate=config.drop_path_rate,
        **options,
    )


def smp_twin(model: UPerNet, size_hw: SizeHW) -> nn.Module:
    """segmentation-models-pytorch's UPerNet with the weights of ours, built for one image size.

    Args:
        model: Ours; its auxiliary head has no counterpart.
        size_hw: (height, width) of the images that it will see.

    Raises:
        ConfigError: timm, whose Swin it has, has no such network.
    """
    require_timm_size(model.backbone.config, size_hw)
    twin = smp_upernet(model.architecture, img_size=size_hw)
    heads = to_file_names(model.state_dict(), SMP_UPERNET)
    backbone = to_file_names(heads.rest, TIMM_FEATURES)
    encoder = {f"encoder.model.{name}": value for name, value in backbone.tensors.items()}
    twin.load_state_dict({**heads.tensors, **encoder})
    return twin


def hugging_face_twin(model: UPerNet) -> nn.Module:
    """Hugging Face's UperNetForSemanticSegmentation with the weights of ours, both heads.

    Args:
        model: Ours.
    """
    import transformers

    build: Any = transformers.UperNetConfig
    architecture, specs = model.architecture, list(model.backbone.feature_specs.values())
    config = build(
        backbone_config=hugging_face_config(model.backbone.config),
        hidden_size=architecture["channels"],
        auxiliary_channels=architecture["auxiliary_channels"],
        auxiliary_in_channels=specs[2].channels,
        auxiliary_loss_weight=model.auxiliary_weight,
        num_labels=model.num_classes,
    )
    return from_tensors(transformers.UperNetForSemanticSegmentation, config, model)
