"""How each family names a Swin backbone: one table a family, this library's names on the left.

This library's names are those of the official detection and segmentation code, under "backbone."; a classifier's final
norm and linear layer, which that code has not, are "final_norm.*" and "head.*". The tables give what follows a file's
own prefix ("backbone.", "backbone.bottom_up.", "encoder.", …). Sources: the code of each family, and its files as this
library's tests build them.
"""

from __future__ import annotations

from swin_dense.weights.rules import Rule, rename
from swin_dense.weights.values import (
    add_key_bias,
    drop_key_bias,
    grid_from_tokens,
    merging_from_channel_major,
    merging_to_channel_major,
    stack,
    tokens_from_grid,
    unstack,
)

_BLOCK = "backbone.layers.{stage}.blocks.{block}"
_MERGING = "backbone.layers.{stage}.downsample"

_POSITION_TOKENS = Rule(
    ("backbone.absolute_pos_embed",),
    ("absolute_pos_embed",),
    grid_from_tokens,
    tokens_from_grid,
    change="position embedding from tokens to a grid",
)

# microsoft/Swin-Transformer, MoBY and timm before 0.9, which took it over.
OFFICIAL_CLASSIFICATION = (
    _POSITION_TOKENS,
    rename("final_norm.*", "norm.*"),
    rename("head.*", "head.*"),
    rename("backbone.*", "*"),
)

# SwinTransformer/Swin-Transformer-Object-Detection and -Semantic-Segmentation, detectron2, and this library.
OFFICIAL_DENSE = (rename("backbone.*", "*"),)


def _openmmlab(of_four_cells: str) -> tuple[Rule, ...]:
    """The table for a patch merging of which these parameters see the four merged cells."""
    return (
        _POSITION_TOKENS,
        rename("backbone.patch_embed.proj.*", "patch_embed.projection.*"),
        rename(f"{_BLOCK}.attn.*", "stages.{stage}.blocks.{block}.attn.w_msa.*"),
        rename(f"{_BLOCK}.mlp.fc1.*", "stages.{stage}.blocks.{block}.ffn.layers.0.0.*"),
        rename(f"{_BLOCK}.mlp.fc2.*", "stages.{stage}.blocks.{block}.ffn.layers.1.*"),
        Rule(
            (f"{_MERGING}.{of_four_cells}",),
            (f"stages.{{stage}}.downsample.{of_four_cells}",),
            merging_from_channel_major,
            merging_to_channel_major,
            change="patch merging from channel-major to cell-major order",
        ),
        rename("backbone.layers.*", "stages.*"),
        rename("backbone.*", "*"),
    )


# mmdetection from 3.0, mmsegmentation from 1.0 and mmpretrain. The norm of Swin V2 follows the reduction.
OPENMMLAB = {1: _openmmlab("*"), 2: _openmmlab("reduction.*")}

# Under "features.", but for the final norm and the head.
_TORCHVISION = (
    rename("backbone.patch_embed.proj.*", "0.0.*"),
    rename("backbone.patch_embed.norm.*", "0.2.*"),
    rename(f"{_BLOCK}.mlp.fc1.*", "{2*stage+1}.{block}.mlp.0.*"),
    rename(f"{_BLOCK}.mlp.fc2.*", "{2*stage+1}.{block}.mlp.3.*"),
    rename(f"{_BLOCK}.*", "{2*stage+1}.{block}.*"),
    rename(f"{_MERGING}.*", "{2*stage+2}.*"),
    rename("final_norm.*", "norm.*"),
    rename("head.*", "head.*"),
)
TORCHVISION = {
    1: _TORCHVISION,
    2: (
        Rule(
            (f"{_BLOCK}.attn.q_bias", f"{_BLOCK}.attn.v_bias"),
            ("{2*stage+1}.{block}.attn.qkv.bias",),
            drop_key_bias,
            add_key_bias,
            change="the bias of the keys, which torchvision zeroes in every forward, left out",
        ),
        *_TORCHVISION,
    ),
}

# From 0.9 on, patch merging stands at the start of the next stage.
TIMM = (
    _POSITION_TOKENS,
    rename(f"{_MERGING}.*", "layers.{stage+1}.downsample.*"),
    rename("final_norm.*", "norm.*"),
    rename("head.*", "head.fc.*"),
    rename("backbone.patch_embed.*", "patch_embed.*"),
    rename("backbone.layers.*", "layers.*"),
)
# timm.create_model(…, features_only=True), and the encoders of segmentation-models-pytorch.
TIMM_FEATURES = (
    rename(f"{_MERGING}.*", "layers_{stage+1}.downsample.*"),
    rename("backbone.layers.*", "layers_*"),
    rename("backbone.patch_embed.*", "patch_embed.*"),
)


def _hugging_face(
    block: str, query_key_value: tuple[str, str, str], mlp: tuple[str, str], attention: dict[str, str]
) -> tuple[Rule, ...]:
    query, key, value = (f"{block}.attention.{part}" for part in query_key_value)
    return (
        Rule((f"{_BLOCK}.attn.qkv.weight",), (f"{query}.weight", f"{key}.weight", f"{value}.weight"), stack, unstack),
        Rule((f"{_BLOCK}.attn.qkv.bias",), (f"{query}.bias", f"{key}.bias", f"{value}.bias"), stack, unstack),
        rename(f"{_BLOCK}.attn.q_bias", f"{query}.bias"),
        rename(f"{_BLOCK}.attn.v_bias", f"{value}.bias"),
        *(rename(f"{_BLOCK}.attn.{own}", f"{block}.attention.{file}") for own, file in attention.items()),
        rename(f"{_BLOCK}.mlp.fc1.*", f"{block}.{mlp[0]}.*"),
        rename(f"{_BLOCK}.mlp.fc2.*", f"{block}.{mlp[1]}.*"),
        rename(f"{_BLOCK}.norm1.*", f"{block}.layernorm_before.*"),
        rename(f"{_BLOCK}.norm2.*", f"{block}.layernorm_after.*"),
        rename(f"{_MERGING}.*", "encoder.layers.{stage}.downsample.*"),
        rename("backbone.patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
        rename("backbone.patch_embed.norm.*", "embeddings.norm.*"),
        Rule(
            ("backbone.absolute_pos_embed",),
            ("embeddings.position_embeddings",),
            grid_from_tokens,
            tokens_from_grid,
            change=_POSITION_TOKENS.change,
        ),
        rename("backbone.norm{stage}.*", "hidden_states_norms.stage{stage+1}.*"),
        rename("backbone.norm{stage}.*", "hidden_states_norms.{stage}.*"),  # MaskFormer
        rename("final_norm.*", "layernorm.*"),
        rename("head.*", "classifier.*"),
    )


# Under "swin.", "swinv2." or "model.", but for norms of stages and heads. These are the names of its files: up to 4.x
# everywhere, and still what 5.x writes.
HUGGING_FACE = _hugging_face(
    "encoder.layers.{stage}.blocks.{block}",
    ("self.query", "self.key", "self.value"),
    ("intermediate.dense", "output.dense"),
    {"proj.*": "output.dense.*", "cpb_mlp.*": "self.continuous_position_bias_mlp.*", "*": "self.*"},
)
# What 5.x calls the parameters of Swin V1 in memory.
HUGGING_FACE_IN_MEMORY = _hugging_face(
    "encoder.layers.{stage}.blocks.{block}",
    ("q_proj", "k_proj", "v_proj"),
    ("mlp.fc1", "mlp.fc2"),
    {"proj.*": "o_proj.*", "*": "relative_position_bias.*"},
)
