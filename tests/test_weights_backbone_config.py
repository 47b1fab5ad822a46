from dataclasses import replace

import pytest
import torch

from swin_dense.attention import log_offsets
from swin_dense.config import STAGE_NAMES, VARIANTS, SwinConfig
from swin_dense.errors import CheckpointError
from swin_dense.swin import SwinTransformer
from swin_dense.weights.backbone_config import backbone_faults, config_fields
from swin_dense.windows import relative_position_index

TINY = SwinConfig(embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=3, out_features=("c2", "c3"))
V2 = replace(TINY, version=2)
CHANGES = {
    "as it is": {},
    "one stage": {"depths": (2,), "num_heads": (1,), "out_features": ("c2",)},
    "three stages": {"depths": (1, 1, 3), "num_heads": (1, 2, 4), "out_features": STAGE_NAMES[:3]},
    "four stages": {"depths": (1, 2, 1, 1), "num_heads": (8, 4, 2, 1), "out_features": STAGE_NAMES},
    "patch 2": {"patch_size": 2},
    "patch 1": {"patch_size": 1},
    "no patch norm": {"patch_norm": False},
    "no bias": {"qkv_bias": False},
    "mlp ratio 3": {"mlp_ratio": 3.0},
    "mlp ratio 2.5": {"mlp_ratio": 2.5},
    "five channels": {"in_channels": 5},
    "position embedding": {"absolute_pos_embed_hw": (5, 7)},
    "some outputs": {"out_features": ("c3",)},
    "raw outputs": {"output_norm": False},
    "window 1": {"window_size": 1},
    "window per stage": {"window_size": (7, 4)},
    "everything": {
        "patch_size": 2,
        "patch_norm": False,
        "qkv_bias": False,
        "mlp_ratio": 3.0,
        "in_channels": 1,
        "absolute_pos_embed_hw": (3, 2),
        "window_size": (2, 5),
    },
}


def state_of(config):
    with torch.device("meta"):
        return SwinTransformer(config).state_dict()


def index_buffers(config, flat=False):
    return {
        f"layers.{stage}.blocks.{block}.attn.relative_position_index": index.flatten() if flat else index
        for stage, depth in enumerate(config.depths)
        for index in [relative_position_index(config.stage_window_size(stage))]
        for block in range(depth)
    }


def table_buffers(config, dtype=torch.float32):
    buffers = {}
    for stage in range(len(config.depths)):
        window = config.stage_window_size(stage)
        table = log_offsets(window, config.stage_pretrained_window_size(stage)).to(dtype)
        buffers[f"layers.{stage}.blocks.0.attn.relative_coords_table"] = table.view(
            1, 2 * window - 1, 2 * window - 1, 2
        )
    return buffers


# ---- What shapes tell.


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("version", [1, 2])
def test_configuration_is_told_exactly(changes, version):
    config = replace(TINY, version=version, **changes)
    fields = config_fields(state_of(config), index_buffers(config) if version == 2 else {})
    assert SwinConfig(**fields) == config
    assert backbone_faults(state_of(config), fields) == ([], [])


@pytest.mark.parametrize("version", [1, 2])
def test_raw_maps_are_told_as_all_stages(version):
    """Without norms nothing tells which maps were wanted."""
    config = replace(TINY, version=version, output_norm=False, out_features=("c3",))
    assert config_fields(state_of(config), {})["out_features"] == ("c2", "c3")


@pytest.mark.parametrize(
    "name", [*(n for n in ("swin_t", "swin_v2_t")), *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS)]
)
def test_published_configurations_are_told_exactly(name):
    config = VARIANTS[name]
    buffers = {**index_buffers(config), **table_buffers(config)} if config.version == 2 else {}
    assert SwinConfig(**config_fields(state_of(config), buffers)) == config


# ---- The windows of Swin V2.


@pytest.mark.parametrize("window", [3, (3, 2), (7, 8)])
def test_windows_of_v2_are_told_by_index_or_table(window):
    config = replace(V2, window_size=window)
    state = state_of(config)
    kinds = (index_buffers(config), index_buffers(config, flat=True), table_buffers(config))
    assert [config_fields(state, buffers)["window_size"] for buffers in kinds] == [window] * 3


def test_without_buffers_the_window_of_v2_is_not_told():
    fields = config_fields(state_of(V2), {})
    assert "window_size" not in fields and "pretrained_window_sizes" not in fields
    one_stage_only = {name: value for name, value in index_buffers(V2).items() if name.startswith("layers.1.")}
    assert "window_size" not in config_fields(state_of(V2), one_stage_only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_window_of_training_is_told_by_the_table(dtype):
    for window in (3, 8, 16, 24):
        for trained in (2, 6, 8, 12):
            config = replace(V2, window_size=window, pretrained_window_sizes=(trained, trained + 1))
            fields = config_fields(state_of(config), table_buffers(config, dtype))
            assert (fields["window_size"], fields["pretrained_window_sizes"]) == (window, (trained, trained + 1))


def test_a_window_of_training_equal_to_the_window_is_not_told():
    assert "pretrained_window_sizes" not in config_fields(state_of(V2), table_buffers(V2))


# ---- What is impossible.


def with_shape(state, name, *shape):
    return {**state, name: torch.zeros(shape, device="meta")}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "patch_embed.proj.weight",
            (8, 3, 4, 2),
            r"patch_embed.proj.weight has shape \(8, 3, 4, 2\); expected square patches",
        ),
        ("patch_embed.proj.weight", (8, 3, 4), r"has shape \(8, 3, 4\); expected 4 dimensions"),
        ("patch_embed.proj.weight", (0, 3, 4, 4), r"has shape \(0, 3, 4, 4\); expected 4 dimensions, none of them 0"),
        ("layers.1.blocks.0.attn.relative_position_bias_table", (24, 2), r"\(24, 2\); expected \(2M - 1\)\^2 rows"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", (16, 1), r"\(16, 1\); expected \(2M - 1\)\^2 rows"),
        ("layers.0.blocks.0.mlp.fc1.weight", (2**62, 0), r"expected 2 dimensions, none of them 0"),
        ("layers.0.blocks.999.norm1.weight", (8,), r"not whole: its numbers tell of 1002 blocks"),
        ("layers.9999.blocks.0.norm1.weight", (8,), r"not whole: its numbers tell of 1000\d blocks"),
    ],
)
def test_impossible_tensors_are_one_message(name, shape, message):
    with pytest.raises(CheckpointError, match=message):
        config_fields(with_shape(state_of(TINY), name, *shape), {})


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.proj.weight",
        "layers.0.blocks.0.mlp.fc1.weight",
        "layers.1.blocks.0.attn.relative_position_bias_table",
    ],
)
def test_a_tensor_that_tells_something_must_be_there(name):
    state = state_of(TINY)
    del state[name]
    with pytest.raises(CheckpointError, match=rf"^the backbone is not whole: {name} is missing\.$"):
        config_fields(state, {})


def test_numbers_that_contradict_each_other_are_one_message():
    state = with_shape(state_of(TINY), "layers.0.blocks.0.attn.relative_position_bias_table", 25, 3)
    with pytest.raises(
        CheckpointError, match=r"shapes of its backbone contradict each other: SwinConfig.num_heads must be"
    ):
        backbone_faults(state, config_fields(state, {}))
    five_stages = {
        **state_of(TINY),
        **{f"layers.{stage}.blocks.0.attn.relative_position_bias_table": torch.zeros(25, 1) for stage in (2, 3, 4)},
    }
    with pytest.raises(CheckpointError, match=r"SwinConfig.depths must be one to four numbers"):
        backbone_faults(five_stages, config_fields(five_stages, {}))


@pytest.mark.parametrize("number", [0.0, 1e-30, -1.0, 1e30, float("nan"), float("inf")])
def test_a_table_without_offsets_is_one_message(number):
    buffers = {name: torch.full_like(table, number) for name, table in table_buffers(V2).items()}
    with pytest.raises(CheckpointError, match=r"layers.0.blocks.0.attn.relative_coords_table does not hold offsets"):
        config_fields(state_of(V2), buffers)


def test_buffers_of_no_shape_tell_nothing():
    buffers = dict.fromkeys(table_buffers(V2), torch.tensor(1.0))
    assert "window_size" not in config_fields(state_of(V2), buffers)


# ---- What a backbone lacks.


@pytest.mark.parametrize("config", [TINY, V2], ids=["V1", "V2"])
def test_every_tensor_that_is_missing_or_misshapen_is_a_fault(config):
    state = state_of(config)
    fields = config_fields(state, {})
    for name, value in state.items():
        less = {key: other for key, other in state.items() if key != name}
        assert backbone_faults(less, fields) == ([f"{name} is missing"], [])
        shape = (*value.shape, 1)
        wrong = [f"{name} has shape {shape}, expected {tuple(value.shape)}"]
        assert backbone_faults(with_shape(state, name, *shape), fields) == (wrong, [])


def test_what_a_backbone_has_no_place_for_is_named():
    state = {**state_of(TINY), "layers.1.downsample.norm.weight": torch.ones(3), "mask_token": torch.ones(3)}
    faults, strangers = backbone_faults(state, config_fields(state, {}))
    assert (faults, strangers) == ([], ["layers.1.downsample.norm.weight", "mask_token"])


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (1, "patch_embed.norm.weight"),
        (1, "layers.0.blocks.0.attn.qkv.bias"),
        (2, "layers.0.blocks.0.attn.q_bias"),
        (1, "norm0.weight"),
    ],
)
def test_one_of_several_optional_tensors_that_is_missing_is_a_fault(version, name):
    """Not a model without them."""
    state = state_of(replace(TINY, version=version))
    del state[name]
    assert backbone_faults(state, config_fields(state, {}))[0] == [f"{name} is missing"]
