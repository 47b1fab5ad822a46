from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from swin_dense.blocks import PatchMergingV2
from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.swin import SwinTransformer
from swin_dense.weights import backbone_names
from swin_dense.weights.backbone_names import (
    HUGGING_FACE,
    HUGGING_FACE_IN_MEMORY,
    OFFICIAL_CLASSIFICATION,
    OFFICIAL_DENSE,
    OPENMMLAB,
    TIMM,
    TIMM_FEATURES,
    TORCHVISION,
)
from swin_dense.weights.rules import Rule, to_file_names, to_own_names

V1 = SwinConfig(
    embed_dim=8,
    depths=(1, 2, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_size=3,
    absolute_pos_embed_hw=(5, 5),
    out_features=("c2", "c3", "c4", "c5"),
)
CONFIGS = {1: V1, 2: replace(V1, version=2)}
TABLES: dict[str, dict[int, tuple[Rule, ...]]] = {
    "official dense": {1: OFFICIAL_DENSE, 2: OFFICIAL_DENSE},
    "official classification": {1: OFFICIAL_CLASSIFICATION, 2: OFFICIAL_CLASSIFICATION},
    "OpenMMLab": OPENMMLAB,
    "torchvision": TORCHVISION,
    "timm": {1: TIMM, 2: TIMM},
    "timm features": {1: TIMM_FEATURES, 2: TIMM_FEATURES},
    "Hugging Face": {1: HUGGING_FACE, 2: HUGGING_FACE},
    "Hugging Face in memory": {1: HUGGING_FACE_IN_MEMORY},
}
CASES = [(name, version) for name, versions in TABLES.items() for version in versions]

ATTENTION, HF = "backbone.layers.0.blocks.1.attn", "encoder.layers.0.blocks.1"
TABLE = "relative_position_bias_table"
# As the families' own code calls them: block 1 of stage 0, and what surrounds it.
EXPECTED = {
    "official dense": {
        "backbone.patch_embed.proj.weight": "patch_embed.proj.weight",
        f"{ATTENTION}.relative_position_bias_table": "layers.0.blocks.1.attn.relative_position_bias_table",
        "backbone.layers.0.downsample.reduction.weight": "layers.0.downsample.reduction.weight",
        "backbone.norm2.bias": "norm2.bias",
    },
    "official classification": {
        "backbone.layers.0.blocks.1.mlp.fc2.bias": "layers.0.blocks.1.mlp.fc2.bias",
        "backbone.layers.0.downsample.norm.weight": "layers.0.downsample.norm.weight",
        "final_norm.weight": "norm.weight",
        "head.bias": "head.bias",
    },
    "OpenMMLab": {
        "backbone.patch_embed.proj.weight": "patch_embed.projection.weight",
        "backbone.patch_embed.norm.weight": "patch_embed.norm.weight",
        "backbone.layers.0.blocks.1.norm1.weight": "stages.0.blocks.1.norm1.weight",
        f"{ATTENTION}.qkv.bias": "stages.0.blocks.1.attn.w_msa.qkv.bias",
        f"{ATTENTION}.relative_position_bias_table": "stages.0.blocks.1.attn.w_msa.relative_position_bias_table",
        "backbone.layers.0.blocks.1.mlp.fc1.weight": "stages.0.blocks.1.ffn.layers.0.0.weight",
        "backbone.layers.0.blocks.1.mlp.fc2.weight": "stages.0.blocks.1.ffn.layers.1.weight",
        "backbone.layers.0.downsample.reduction.weight": "stages.0.downsample.reduction.weight",
        "backbone.norm3.weight": "norm3.weight",
    },
    "torchvision": {
        "backbone.patch_embed.proj.weight": "0.0.weight",
        "backbone.patch_embed.norm.bias": "0.2.bias",
        "backbone.layers.0.blocks.1.norm2.weight": "1.1.norm2.weight",
        f"{ATTENTION}.qkv.weight": "1.1.attn.qkv.weight",
        "backbone.layers.0.blocks.1.mlp.fc1.bias": "1.1.mlp.0.bias",
        "backbone.layers.0.blocks.1.mlp.fc2.bias": "1.1.mlp.3.bias",
        "backbone.layers.0.downsample.norm.weight": "2.norm.weight",
        "backbone.layers.3.blocks.0.norm1.weight": "7.0.norm1.weight",
        "backbone.layers.2.downsample.reduction.weight": "6.reduction.weight",
        "final_norm.bias": "norm.bias",
        "head.weight": "head.weight",
    },
    "timm": {
        "backbone.patch_embed.norm.weight": "patch_embed.norm.weight",
        "backbone.layers.0.blocks.1.mlp.fc1.bias": "layers.0.blocks.1.mlp.fc1.bias",
        "backbone.layers.0.downsample.norm.weight": "layers.1.downsample.norm.weight",
        "backbone.layers.2.downsample.reduction.weight": "layers.3.downsample.reduction.weight",
        "final_norm.weight": "norm.weight",
        "head.weight": "head.fc.weight",
    },
    "timm features": {
        "backbone.layers.0.blocks.1.norm1.bias": "layers_0.blocks.1.norm1.bias",
        "backbone.layers.0.downsample.norm.weight": "layers_1.downsample.norm.weight",
    },
    "Hugging Face": {
        "backbone.patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "backbone.patch_embed.norm.weight": "embeddings.norm.weight",
        "backbone.layers.0.blocks.1.norm1.weight": f"{HF}.layernorm_before.weight",
        "backbone.layers.0.blocks.1.norm2.weight": f"{HF}.layernorm_after.weight",
        f"{ATTENTION}.proj.bias": f"{HF}.attention.output.dense.bias",
        f"{ATTENTION}.relative_position_bias_table": f"{HF}.attention.self.relative_position_bias_table",
        f"{ATTENTION}.logit_scale": f"{HF}.attention.self.logit_scale",
        f"{ATTENTION}.cpb_mlp.2.weight": f"{HF}.attention.self.continuous_position_bias_mlp.2.weight",
        "backbone.layers.0.blocks.1.mlp.fc1.weight": f"{HF}.intermediate.dense.weight",
        "backbone.layers.0.blocks.1.mlp.fc2.weight": f"{HF}.output.dense.weight",
        "backbone.layers.0.downsample.reduction.weight": "encoder.layers.0.downsample.reduction.weight",
        "backbone.norm0.weight": "hidden_states_norms.stage1.weight",
        "final_norm.weight": "layernorm.weight",
        "head.weight": "classifier.weight",
    },
    "Hugging Face in memory": {
        f"{ATTENTION}.proj.bias": f"{HF}.attention.o_proj.bias",
        f"{ATTENTION}.{TABLE}": f"{HF}.attention.relative_position_bias.{TABLE}",
        "backbone.layers.0.blocks.1.mlp.fc1.weight": f"{HF}.mlp.fc1.weight",
        "backbone.layers.0.blocks.1.mlp.fc2.weight": f"{HF}.mlp.fc2.weight",
    },
}


def own_tensors(version, randomise):
    """A backbone's and a classifier's, by this library's names."""
    config = CONFIGS[version]
    state = randomise(SwinTransformer(config)).state_dict()
    tensors = {f"backbone.{name}": value for name, value in state.items()}
    head = randomise(classifier(replace(config, out_features=("c5",)), 3)).state_dict()
    tensors |= {name: value for name, value in head.items() if name.startswith("head.")}
    return tensors | {"final_norm.weight": torch.ones(64), "final_norm.bias": torch.zeros(64)}


@pytest.mark.parametrize(("name", "version"), CASES)
def test_names_are_translated_there_and_back(name, version, randomise):
    own = own_tensors(version, randomise)
    there = to_file_names(own, TABLES[name][version])
    back = to_own_names(there.tensors, TABLES[name][version])
    translated = {**back.tensors, **there.rest}
    assert back.rest == {} and translated.keys() == own.keys()
    assert all(torch.equal(value, translated[key]) for key, value in own.items())
    assert sum(value.numel() for value in there.tensors.values()) >= sum(v.numel() for v in back.tensors.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_names_are_those_of_the_family(name):
    version = max(TABLES[name])
    table = TABLES[name][version]
    for own, file in EXPECTED[name].items():
        value = torch.ones(4, 8)
        assert list(to_file_names({own: value}, table).tensors) == [file]
        assert list(to_own_names({file: value}, table).tensors) == [own]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Hugging Face", ("attention.self.query", "attention.self.key", "attention.self.value")),
        ("Hugging Face in memory", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ],
)
def test_hugging_face_keeps_query_key_and_value_apart(name, parts):
    table = TABLES[name][1]
    for leaf, shape in (("weight", (8, 8)), ("bias", (8,))):
        values = [torch.full(shape, float(number)) for number in (1, 2, 3)]
        own = to_own_names({f"{HF}.{part}.{leaf}": value for part, value in zip(parts, values, strict=True)}, table)
        assert torch.equal(own.tensors[f"{ATTENTION}.qkv.{leaf}"], torch.cat(values))
    lonely = {f"{HF}.{parts[0]}.weight": torch.ones(8, 8)}
    assert to_own_names(lonely, table).rest.keys() <= lonely.keys()
    assert f"{ATTENTION}.qkv.weight" not in to_own_names(lonely, table).tensors


def test_torchvision_v2_has_a_bias_for_keys_that_is_left_out():
    bias = torch.arange(1.0, 13.0)
    found = to_own_names({"1.1.attn.qkv.bias": bias}, TORCHVISION[2])
    assert torch.equal(found.tensors[f"{ATTENTION}.q_bias"], bias[:4])
    assert torch.equal(found.tensors[f"{ATTENTION}.v_bias"], bias[8:])
    assert set(found.changes) == {f"{ATTENTION}.q_bias", f"{ATTENTION}.v_bias"}
    written = to_file_names(found.tensors, TORCHVISION[2]).tensors["1.1.attn.qkv.bias"]
    assert torch.equal(written, torch.cat([bias[:4], torch.zeros(4), bias[8:]]))


def test_torchvision_v2_position_network_is_no_mlp():
    """Both are called mlp.0 there."""
    found = to_own_names(
        {"1.1.attn.cpb_mlp.0.weight": torch.ones(1), "1.1.mlp.0.weight": torch.ones(1)}, TORCHVISION[2]
    )
    assert set(found.tensors) == {f"{ATTENTION}.cpb_mlp.0.weight", "backbone.layers.0.blocks.1.mlp.fc1.weight"}


@pytest.mark.parametrize("name", ["official classification", "timm", "Hugging Face"])
def test_position_embedding_is_a_list_of_tokens_elsewhere(name, randomise):
    grid = torch.arange(2.0 * 9).view(1, 2, 3, 3)
    there = to_file_names({"backbone.absolute_pos_embed": grid}, TABLES[name][1])
    ((file_name, tokens),) = there.tensors.items()
    assert file_name == ("embeddings.position_embeddings" if name == "Hugging Face" else "absolute_pos_embed")
    assert tokens.shape == (1, 9, 2) and torch.equal(tokens[0, 5], grid[0, :, 1, 2])


def test_merging_of_openmmlab_is_reordered_and_nothing_else():
    own = {
        "backbone.layers.0.downsample.norm.weight": torch.arange(8.0),
        "backbone.layers.0.downsample.reduction.weight": torch.arange(32.0).view(4, 8),
        "backbone.layers.0.blocks.1.norm1.weight": torch.arange(8.0),
    }
    there = to_file_names(own, OPENMMLAB[1])
    assert set(there.changes) == {f"stages.0.downsample.{part}.weight" for part in ("norm", "reduction")}
    # Channel 0 of the four cells row by row, then channel 1; here cells count (0,0) (1,0) (0,1) (1,1).
    assert there.tensors["stages.0.downsample.norm.weight"].tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert there.tensors["stages.0.blocks.1.norm1.weight"].tolist() == list(range(8))


def test_the_norm_of_a_v2_merging_has_no_cells_to_reorder():
    """It follows the reduction of four cells to one, here computed by torch's unfold as OpenMMLab's code does it."""
    merging = PatchMergingV2(3).double()
    for parameter in merging.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    own = {f"backbone.layers.0.downsample.{name}": value for name, value in merging.state_dict().items()}
    file = to_file_names(own, OPENMMLAB[2]).tensors
    weight, bias, reduction = (
        file[f"stages.0.downsample.{name}"] for name in ("norm.weight", "norm.bias", "reduction.weight")
    )
    x = torch.randn(2, 6, 8, 3, dtype=torch.float64)
    cells = functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
    merged = functional.layer_norm(functional.linear(cells, reduction), (6,), weight, bias)
    assert (merged.view(2, 3, 4, 6) - merging(x)).abs().max() < 1e-12


def test_mask_former_counts_its_norms_from_zero():
    for stage in range(4):
        for name in (f"hidden_states_norms.{stage}.weight", f"hidden_states_norms.stage{stage + 1}.weight"):
            assert list(to_own_names({name: torch.ones(1)}, HUGGING_FACE).tensors) == [f"backbone.norm{stage}.weight"]


def test_every_table_is_tested():
    public = {name for name in vars(backbone_names) if name.isupper() and not name.startswith("_")}
    assert public == {
        "OFFICIAL_CLASSIFICATION",
        "OFFICIAL_DENSE",
        "OPENMMLAB",
        "TORCHVISION",
        "TIMM",
        "TIMM_FEATURES",
        "HUGGING_FACE",
        "HUGGING_FACE_IN_MEMORY",
    }
