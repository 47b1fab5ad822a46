import dataclasses
import json
import pickle

import pytest

from swin_dense.config import STAGE_NAMES, VARIANTS, WINDOW_RULES, SwinConfig, variant_config
from swin_dense.errors import ConfigError, SwinDenseError
from swin_dense.typed_values import did_you_mean

UNUSUAL = SwinConfig(
    embed_dim=24,
    depths=(1, 3, 2),
    num_heads=(1, 2, 3),
    window_size=(7, 5, 3),
    patch_size=2,
    in_channels=5,
    mlp_ratio=2.5,
    qkv_bias=False,
    patch_norm=False,
    absolute_pos_embed_hw=(11, 13),
    drop_path_rate=0.3,
    window_rule="timm",
    shift_mask_value=-50.0,
    output_norm=False,
    out_features=("c3",),
    frozen_stages=1,
    checkpoint_stages=(0, 2),
)


@pytest.mark.parametrize("config", [SwinConfig(), UNUSUAL, *VARIANTS.values()])
def test_to_dict_from_dict_round_trip_through_json(config):
    assert SwinConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_is_frozen_hashable_and_picklable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwinConfig().embed_dim = 4
    assert hash(SwinConfig(window_size=5)) == hash(SwinConfig(window_size=5))
    assert pickle.loads(pickle.dumps(UNUSUAL)) == UNUSUAL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, r"SwinConfig\.version must be 1 \(Swin\) or 2 \(Swin V2\), got 3"),
        ({"pretrained_window_sizes": (7, 7, 7, 7)}, r"pretrained_window_sizes must be 4 numbers .* for version 2 only"),
        ({"version": 2, "pretrained_window_sizes": (7, 7)}, r"pretrained_window_sizes must be 4 numbers from 2"),
        ({"depths": ()}, r"depths must be one to four numbers, got \(\)"),
        ({"depths": (1, 1, 1, 1, 1)}, r"depths must be one to four numbers"),
        ({"depths": (2, 0, 6, 2)}, r"depths must be numbers from 1, got \(2, 0, 6, 2\)"),
        ({"num_heads": (3, 6)}, r"num_heads must be 4 numbers, as depths has, got \(3, 6\)"),
        ({"num_heads": (5, 6, 12, 24)}, r"num_heads must be divisors of the stage channels \(stage 1 has 96\)"),
        ({"num_heads": (3, 6, 12, 0)}, r"num_heads must be divisors of the stage channels \(stage 4 has 768\)"),
        ({"window_size": (7, 7)}, r"window_size must be one number or 4, got \(7, 7\)"),
        ({"window_size": 0}, r"window_size must be numbers from 1, got 0"),
        ({"embed_dim": 0}, r"embed_dim must be a number from 1, got 0"),
        ({"patch_size": 0}, r"patch_size must be a number from 1, got 0"),
        ({"in_channels": 0}, r"in_channels must be a number from 1, got 0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio must be a number above 0, got 0\.0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be a number from 0 up to, not including, 1, got 1\.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be"),
        ({"window_rule": "Dense"}, r"window_rule must be one of dense, classification, timm, got 'Dense'"),
        ({"out_features": ()}, r"out_features must be some of c2, c3, c4, c5, each once, got \(\)"),
        ({"out_features": ("c2", "c2")}, r"out_features must be some of"),
        ({"out_features": ("c6",)}, r"out_features must be some of"),
        ({"frozen_stages": 5}, r"frozen_stages must be 0 to 4, got 5"),
        ({"frozen_stages": -1}, r"frozen_stages must be 0 to 4, got -1"),
        ({"checkpoint_stages": (4,)}, r"checkpoint_stages must be indices 0 to 3, got \(4,\)"),
        ({"absolute_pos_embed_hw": (3,)}, r"absolute_pos_embed_hw must be \(height, width\), got \(3,\)"),
        ({"absolute_pos_embed_hw": (0, 3)}, r"absolute_pos_embed_hw must be \(height, width\)"),
    ],
)
def test_config_refuses_what_cannot_be_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        SwinConfig(**changes)


def test_out_features_of_a_stage_that_does_not_exist_are_refused():
    with pytest.raises(ConfigError, match="out_features must be some of c2, c3, each once"):
        SwinConfig(depths=(2, 2), num_heads=(3, 6))


def test_config_error_is_a_value_error_of_the_tree():
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, SwinDenseError)
    assert ConfigError.exit_code == 2


def test_from_dict_names_an_unknown_field_and_the_nearest_known():
    with pytest.raises(ConfigError, match="SwinConfig: unknown key 'embed_dims'; did you mean 'embed_dim'"):
        SwinConfig.from_dict({"embed_dims": 8})


def test_did_you_mean_lists_all_where_nothing_is_near():
    assert did_you_mean("zzzz", ["beta", "alpha"]) == "; known are alpha, beta."


def test_variant_config_changes_only_what_is_named():
    changed = variant_config("swin_b", window_size=4, frozen_stages=2)
    assert changed == dataclasses.replace(VARIANTS["swin_b"], window_size=4, frozen_stages=2)
    assert variant_config("swin_b") == VARIANTS["swin_b"]


def test_variant_config_refuses_unknown_names():
    with pytest.raises(ConfigError, match="no Swin variant 'swin_tt'; did you mean 'swin_t'"):
        variant_config("swin_tt")
    with pytest.raises(ConfigError, match="unknown key 'windows_size'; did you mean 'window_size'"):
        variant_config("swin_t", windows_size=4)


def test_variants_are_table_7_of_the_paper():
    published = {
        "swin_t": (96, (2, 2, 6, 2)),
        "swin_s": (96, (2, 2, 18, 2)),
        "swin_b": (128, (2, 2, 18, 2)),
        "swin_l": (192, (2, 2, 18, 2)),
    }
    for name, (channels, depths) in published.items():
        for suffix, window in (("", 7), ("_w12_384", 12)):
            config = VARIANTS[name + suffix]
            assert (config.embed_dim, config.depths, config.window_size) == (channels, depths, window)
            # every head has 32 channels
            assert [config.stage_channels(i) // h for i, h in enumerate(config.num_heads)] == [32] * 4
            assert (config.mlp_ratio, config.patch_size, config.qkv_bias, config.window_rule) == (4.0, 4, True, "dense")
    assert len([config for config in VARIANTS.values() if config.version == 1]) == 8


def test_drop_path_rates_grow_linearly_over_all_blocks():
    rates = SwinConfig(depths=(2, 1, 3, 1), num_heads=(1, 1, 1, 1), drop_path_rate=0.6).drop_path_rates()
    assert [len(stage) for stage in rates] == [2, 1, 3, 1]
    flat = [rate for stage in rates for rate in stage]
    assert flat == pytest.approx([0.1 * block for block in range(7)])


def test_drop_path_rates_of_one_block_are_zero():
    config = SwinConfig(depths=(1,), num_heads=(3,), out_features=("c2",), drop_path_rate=0.5)
    assert config.drop_path_rates() == ((0.0,),)


def test_stage_numbers_follow_from_the_fields():
    assert [UNUSUAL.stage_window_size(i) for i in range(3)] == [7, 5, 3]
    assert [SwinConfig(window_size=5).stage_window_size(i) for i in range(4)] == [5] * 4
    assert [UNUSUAL.stage_channels(i) for i in range(3)] == [24, 48, 96]
    assert UNUSUAL.num_built_stages == 2
    assert [SwinConfig(out_features=(name,)).num_built_stages for name in STAGE_NAMES] == [1, 2, 3, 4]


@pytest.mark.parametrize("rule", WINDOW_RULES)
def test_every_window_rule_is_accepted(rule):
    assert SwinConfig(window_rule=rule).window_rule == rule
