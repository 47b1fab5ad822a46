import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch.nn import functional
from torchvision.models.swin_transformer import PatchMergingV2 as TorchvisionMergingV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from torchvision.models.swin_transformer import SwinTransformerBlockV2 as TorchvisionBlockV2

from swin_dense import blocks
from swin_dense.blocks import PatchMerging, PatchMergingV2
from swin_dense.config import SwinConfig, variant_config
from swin_dense.swin import SwinTransformer

DEPTHS, HEADS, DIM = (2, 2, 2, 2), (1, 2, 3, 4), 12
TINY = SwinConfig(version=2, embed_dim=DIM, depths=DEPTHS, num_heads=HEADS, window_size=4, output_norm=False)


def lively(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        scale = 0.3 if "weight" in name or "bias" in name else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name)
    return model.double().eval()


def build(**changes):
    return SwinTransformer(SwinConfig.from_dict({**vars(TINY), **changes}))


def image(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def torchvision_name(name, channels_of):
    parts = name.split(".")
    if parts[0] == "patch_embed":
        return ".".join(["features.0", "0" if parts[1] == "proj" else "2", parts[2]])
    stage = int(parts[1])
    if parts[2] == "downsample":
        return ".".join([f"features.{2 * stage + 2}", *parts[3:]])
    rest = ".".join(parts[4:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    return f"features.{2 * stage + 1}.{parts[3]}.{rest}"


@pytest.mark.parametrize("hidden_at_once", [1, 60, blocks._HIDDEN_AT_ONCE])
def test_mlp_is_two_layers_with_a_gelu_between(hidden_at_once, monkeypatch):
    monkeypatch.setattr(blocks, "_HIDDEN_AT_ONCE", hidden_at_once)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mlp = blocks.MLP(5, 17).to(dtype)
        x = torch.randn(2, 3, 7, 5, dtype=dtype)
        wanted = mlp.fc2(functional.gelu(mlp.fc1(x)))
        assert torch.allclose(mlp(x), wanted, atol=allowed)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert torch.allclose(mlp(x), wanted, atol=allowed)


def test_hooks_of_an_mlp_see_whole_maps(monkeypatch):
    monkeypatch.setattr(blocks, "_HIDDEN_AT_ONCE", 1)
    mlp, seen = blocks.MLP(5, 17), []
    mlp.fc1.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        mlp(torch.randn(2, 3, 7, 5))
    assert seen == [(2, 3, 7, 17)]


def test_v2_equals_torchvision_under_its_rule():
    ours = lively(build(window_rule="classification"))
    theirs = TorchvisionSwin(
        [4, 4], DIM, list(DEPTHS), list(HEADS), [4, 4], stochastic_depth_prob=0.0, num_classes=1,
        block=TorchvisionBlockV2, downsample_layer=TorchvisionMergingV2,
    ).double().eval()  # fmt: skip
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if name.endswith(("q_bias", "v_bias")):
            start = 0 if name.endswith("q_bias") else 2 * len(value)
            bias = state[torchvision_name(name[:-6] + "qkv.bias", None)]
            bias[start : start + len(value)] = value
        else:
            target = state[torchvision_name(name, None)]
            assert target.shape == value.shape
            target.copy_(value)
    for height, width in ((64, 64), (96, 160), (44, 120)):
        maps, x = list(ours(image(height, width)).values()), image(height, width)
        for index, layer in enumerate(theirs.features):
            x = layer(x)
            if index % 2 == 1:
                assert torch.allclose(maps[index // 2], x.permute(0, 3, 1, 2), atol=1e-9), (height, width, index)


def test_v2_with_pretrained_windows_equals_timm():
    ours = lively(build(window_rule="timm", window_size=(4, 4, 4, 2), pretrained_window_sizes=(3, 3, 3, 2)))
    theirs = TimmSwinV2(
        img_size=64, window_size=4, embed_dim=DIM, depths=DEPTHS, num_heads=HEADS, num_classes=0, drop_path_rate=0.0,
        pretrained_window_sizes=(3, 3, 3, 2),
    ).double().eval()  # fmt: skip
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        parts = name.split(".")
        if "downsample" in name:
            name = ".".join(["layers", str(int(parts[1]) + 1), *parts[2:]])
        assert state[name].shape == value.shape
        state[name].copy_(value)
    maps = list(ours(image(64, 64)).values())
    x = theirs.patch_embed(image(64, 64))
    for index, layer in enumerate(theirs.layers):
        x = layer(x)
        assert torch.allclose(maps[index], x.permute(0, 3, 1, 2), atol=1e-9), index


def test_dense_v2_is_the_classifier_where_nothing_fits_one_window():
    dense, classification = lively(build()), lively(build(window_rule="classification"))
    x = image(160, 192)
    for one, other in zip(dense(x).values(), classification(x).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("size_hw", [(1, 1), (37, 53), (97, 131)])
def test_v2_takes_any_size_and_each_image_alone(size_hw):
    model = lively(build(output_norm=True))
    features = model(image(*size_hw))
    for name, spec in model.feature_specs.items():
        sides = [-(-side // spec.stride) for side in size_hw]
        assert features[name].shape == (2, spec.channels, *sides) and features[name].isfinite().all()
        assert torch.allclose(features[name][1:], model(image(*size_hw)[1:])[name], atol=1e-12)


def test_every_parameter_of_v2_gets_a_gradient():
    model = lively(build(output_norm=True)).train()
    sum(feature.square().sum() for feature in model(image(33, 47)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_new_v2_blocks_are_the_identity():
    model = build().eval()
    x = torch.randn(1, 9, 11, DIM)
    assert torch.equal(model.layers[0](x)[0], x)


@pytest.mark.parametrize(("merging", "norm_channels"), [(PatchMerging, 20), (PatchMergingV2, 10)])
def test_merging_halves_sides_and_doubles_channels(merging, norm_channels):
    module = merging(5)
    assert module.norm.normalized_shape == (norm_channels,)
    assert module(torch.randn(2, 7, 4, 5)).shape == (2, 4, 2, 10)


@pytest.mark.parametrize(
    ("name", "millions"), [("swin_v2_t", 27.6), ("swin_v2_s", 49.0), ("swin_v2_b", 86.9), ("swin_v2_l", 195.2)]
)
def test_v2_variants_have_the_size_of_torchvisions(name, millions):
    with torch.device("meta"):
        model = SwinTransformer(variant_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


def test_larger_windows_keep_the_published_pretrained_ones():
    config = variant_config("swin_v2_b_w12to24_384")
    assert [config.stage_window_size(stage) for stage in range(4)] == [24, 24, 24, 12]
    assert [config.stage_pretrained_window_size(stage) for stage in range(4)] == [12, 12, 12, 6]
