"""The model that a file of any family holds, told by the shapes in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError
from swin_dense.heads.model_file import build_model
from swin_dense.swin import SwinTransformer
from swin_dense.weights.recognition import Recognised


def build_recognised(found: Recognised, **known: Any) -> nn.Module:  # noqa: ANN401 - the fields of SwinConfig
    """A model of the same architecture as the one in a file, with random weights.

    Args:
        found: What was read of the file, see `swin_dense.weights.recognition.recognise`; it holds a backbone.
        known: Fields of `SwinConfig` that the file cannot tell, such as `window_size=16`.

    Returns:
        A `SwinTransformer`, or the model that has the file's head.

    Raises:
        CheckpointError: The head is not whole.
        ConfigError: The shapes contradict each other.
    """
    config = SwinConfig.from_dict({**found.fields, **known})
    if found.head is None:
        return SwinTransformer(config)
    backbone = config.to_dict()
    if found.head == "classifier":
        backbone |= {"output_norm": True, "out_features": backbone["out_features"][-1:]}
    try:
        settings = _head_settings(found)
    except KeyError as error:
        raise CheckpointError(
            f"{found.source}: the {found.head} in it is not whole: {error.args[0]} is missing."
        ) from None
    return build_model({"head": found.head, "backbone": backbone, **settings})


def _head_settings(found: Recognised) -> dict[str, Any]:
    rows = {name: value.shape[0] for name, value in found.tensors.items() if value.ndim > 0}
    if found.head == "classifier":
        return {"num_classes": rows["head.weight"]}
    if found.head == "upernet":
        settings = {
            "num_classes": rows["decode_head.conv_seg.weight"],
            "channels": rows["decode_head.bottleneck.conv.weight"],
        }
        auxiliary = rows.get("auxiliary_head.convs.0.conv.weight")
        return settings if auxiliary is None else {**settings, "auxiliary_channels": auxiliary}
    stage = "0." if found.head == "cascade_mask_rcnn" else ""
    last_linear = "5" if found.head == "cascade_mask_rcnn" else "fc6"
    settings = {
        "num_classes": rows[f"roi_heads.box_predictor.{stage}cls_score.weight"] - 1,
        "fpn_channels": rows["fpn.pyramid.layer_blocks.0.0.weight"],
        "box_head_channels": rows[f"roi_heads.box_head.{stage}{last_linear}.weight"],
        "mask_head_channels": rows[f"roi_heads.mask_head.{stage}0.0.weight"],
    }
    if found.head == "cascade_mask_rcnn":
        return {**settings, "shared_regression": rows["roi_heads.box_predictor.0.bbox_pred.weight"] == 4}
    return {**settings, "style": "torchvision" if found.family == "torchvision" else "published"}
