import pytest
import torch
from torch.nn import functional

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.features import FeatureSpec
from swin_dense.heads.fpn import FPN
from swin_dense.swin import SwinTransformer

SPECS = {"c2": FeatureSpec(5, 4), "c3": FeatureSpec(7, 8), "c4": FeatureSpec(11, 16)}


def random_features(sizes=((13, 17), (7, 9), (4, 5))):
    return {
        name: torch.rand(2, spec.channels, *size, dtype=torch.float64)
        for (name, spec), size in zip(SPECS.items(), sizes, strict=True)
    }


@pytest.mark.parametrize("sizes", [((13, 17), (7, 9), (4, 5)), ((16, 8), (8, 4), (4, 2)), ((1, 1), (1, 1), (1, 1))])
def test_fpn_is_lateral_plus_nearest_upsampling_then_smoothing(sizes):
    fpn, features = FPN(SPECS, 3).double(), random_features(sizes)
    levels = fpn(features)
    state = None
    wanted = {}
    for index, name in reversed(list(enumerate(features))):
        lateral, smooth = fpn.pyramid.inner_blocks[index][0], fpn.pyramid.layer_blocks[index][0]
        map = functional.conv2d(features[name], lateral.weight, lateral.bias)
        if state is not None:
            rows = torch.arange(map.shape[2]) * state.shape[2] // map.shape[2]
            columns = torch.arange(map.shape[3]) * state.shape[3] // map.shape[3]
            map = map + state[:, :, rows][:, :, :, columns]
        state = map
        wanted[f"p{index + 2}"] = functional.conv2d(map, smooth.weight, smooth.bias, padding=1)
    for name, map in wanted.items():
        assert torch.allclose(levels[name], map, atol=1e-12)
    assert torch.equal(levels["p5"], levels["p4"][:, :, ::2, ::2])


def test_fpn_levels_are_named_by_stride_and_keep_what_specs_promise():
    fpn = FPN(SPECS, 6)
    assert fpn.feature_specs == {f"p{k}": FeatureSpec(6, 2**k) for k in (2, 3, 4, 5)}
    levels = fpn.float()({name: map.float() for name, map in random_features().items()})
    assert {name: tuple(map.shape) for name, map in levels.items()} == {
        "p2": (2, 6, 13, 17),
        "p3": (2, 6, 7, 9),
        "p4": (2, 6, 4, 5),
        "p5": (2, 6, 2, 3),
    }


def test_fpn_reads_maps_by_name_not_by_order():
    fpn, features = FPN(SPECS, 3).double(), random_features()
    shuffled = dict(reversed(features.items()))
    one, other = fpn(features), fpn(shuffled)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_fpn_fits_a_backbone_of_any_power_of_two(patch_size):
    config = SwinConfig(embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, patch_size=patch_size)
    backbone = SwinTransformer(config)
    fpn = FPN(backbone.feature_specs, 4)
    levels = fpn(backbone(torch.rand(1, 3, 37, 53)))
    assert list(levels) == list(fpn.feature_specs)
    for name, spec in fpn.feature_specs.items():
        assert spec.stride == 2 ** int(name[1:])
        assert levels[name].shape[2:] == (-(-37 // spec.stride), -(-53 // spec.stride))


@pytest.mark.parametrize("strides", [(3, 6), (4, 16), (8, 4), ()])
def test_fpn_refuses_strides_it_cannot_name(strides):
    specs = {f"c{i}": FeatureSpec(4, stride) for i, stride in enumerate(strides)}
    with pytest.raises(ConfigError, match=r"strides that are powers of two and double, got \["):
        FPN(specs, 4)


def test_boxes_are_pooled_from_all_levels_but_the_extra_one():
    fpn = FPN(SPECS, 4)
    assert list(fpn.roi_specs) == list(fpn.feature_specs)[:-1] and len(fpn.roi_specs) == len(SPECS)
    assert all(fpn.feature_specs[name] == spec for name, spec in fpn.roi_specs.items())
