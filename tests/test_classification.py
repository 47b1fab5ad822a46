import dataclasses
import re

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import swin_dense
from swin_dense.classification import Classifier, classifier
from swin_dense.config import SwinConfig, variant_config
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.swin import SwinTransformer

TINY = SwinConfig(embed_dim=8, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=4, drop_path_rate=0.0)
SHAPE = {"embed_dim": 8, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
# Torchvision's names, in the order they are replaced; the numbers of its "features" count stages and mergings in turn.
TORCHVISION = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^norm\.", "norm3."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^features\.([1357])\.(\d)\.", lambda found: f"layers.{int(found[1]) // 2}.blocks.{found[2]}."),
    (r"^features\.([246])\.", lambda found: f"layers.{int(found[1]) // 2 - 1}.downsample."),
)
# Timm merges at the start of a stage.
TIMM = (
    (r"^head\.fc\.", "head."),
    (r"^norm\.", "norm3."),
    (r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample"),
)


def lively(model, seed=0):
    """Weights far from any initialisation, so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise * 0.3 + ("norm" in name and name.endswith("weight"))).double()
    return model.double().eval()


def ours_from(twin, patterns, **changes):
    """A classifier with the weights of another library's, renamed."""
    state = {}
    for name, value in twin.state_dict().items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.bias") and changes.get("version") == 2:
            query, _, state[name.replace("qkv.bias", "v_bias")] = value.chunk(3)  # keys have no bias in Swin V2
            state[name.replace("qkv.bias", "q_bias")] = query
        elif not name.endswith(("relative_position_index", "relative_coords_table", "attn_mask")):
            state[name] = value
    model = classifier(TINY, 5, **changes).double().eval()
    model.head.load_state_dict({part: state.pop(f"head.{part}") for part in ("weight", "bias")})
    model.backbone.load_state_dict(state)
    return model


def images(*size_hw, batch=2):
    return torch.randn(batch, 3, *size_hw, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("version", [1, 2])
def test_logits_are_torchvisions(version):
    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    twin = lively(TorchvisionSwin([4, 4], **SHAPE, window_size=[4, 4], num_classes=5, **parts))
    model = ours_from(twin, TORCHVISION, version=version)
    with torch.no_grad():
        for size_hw in ((64, 64), (96, 160), (44, 120)):
            assert float((model(images(*size_hw)) - twin(images(*size_hw))).abs().max()) < 1e-9
    assert float(twin(images(64, 64)).detach().std()) > 0.1


@pytest.mark.parametrize("size_hw", [(128, 128), (128, 192)])
def test_logits_are_timms(size_hw):
    twin = lively(TimmSwin(img_size=size_hw, window_size=4, **SHAPE, num_classes=5, drop_path_rate=0.0))
    model = ours_from(twin, TIMM, window_rule="timm")
    with torch.no_grad():
        assert float((model(images(*size_hw)) - twin(images(*size_hw))).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("variant", "million"), [("swin_t", 28.29), ("swin_s", 49.61), ("swin_b", 87.77), ("swin_v2_t", 28.35)]
)
def test_variants_have_the_published_size(variant, million):
    with torch.device("meta"):
        model = classifier(variant, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(million, abs=0.005)


def test_logits_are_the_head_on_the_mean_of_the_last_map():
    model = lively(classifier(TINY, 5))
    (last_map,) = model.backbone(images(41, 67)).values()
    wanted = last_map.flatten(2).mean(dim=2) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(images(41, 67)), wanted, atol=1e-12)


def test_batch_is_each_image_alone():
    model = lively(classifier(TINY, 5))
    together = model(images(37, 53, batch=3))
    for index in range(3):
        assert torch.allclose(model(images(37, 53, batch=3)[index : index + 1])[0], together[index], atol=1e-12)


def test_only_what_is_used_is_built_and_trained():
    model = classifier(TINY, 5)
    assert set(model.backbone.feature_specs) == {"c5"} and model.backbone.config.window_rule == "classification"
    model(images(37, 53).float()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.head.bias.detach().eq(0).all()
    assert float(classifier("swin_t", 100).head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("depths", [(1,), (1, 2), (1, 1, 2)])
def test_fewer_stages_classify_the_last_map(depths):
    heads = (1,) * len(depths)
    of_config = classifier(SwinConfig(embed_dim=8, depths=depths, num_heads=heads, out_features=("c2",)), 5)
    of_name = classifier("swin_t", 5, embed_dim=8, depths=list(depths), num_heads=list(heads))
    for model in (of_config, of_name):
        assert len(model.backbone.layers) == len(depths)
        assert model.head.in_features == 8 * 2 ** (len(depths) - 1)
        assert model(torch.rand(2, 3, 37, 53)).shape == (2, 5)


def test_changes_win_and_a_built_backbone_stays_as_it_is():
    model = classifier(TINY, 5, window_rule="dense", out_features=("c3", "c4"), in_channels=4)
    assert model.backbone.config == dataclasses.replace(
        TINY, window_rule="dense", out_features=("c3", "c4"), in_channels=4
    )
    assert model.head.in_features == 32
    backbone = SwinTransformer(TINY)
    assert classifier(backbone, 5).backbone is backbone and backbone.config == TINY
    with pytest.raises(ConfigError, match="window_rule: a backbone that is built cannot be changed"):
        classifier(backbone, 5, window_rule="timm")


def test_architecture_is_plain_and_complete():
    model = classifier(TINY, 5)
    assert model.num_classes == 5
    assert model.architecture == {"head": "classifier", "backbone": model.backbone.config.to_dict(), "num_classes": 5}


def test_public_names_are_these():
    assert swin_dense.classifier is classifier and swin_dense.Classifier is Classifier


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: classifier("swin_tt", 5), "did you mean 'swin_t'"),
        (lambda: classifier("swin_t", 0), "num_classes must be 1 or more, got 0"),
        (lambda: classifier("swin_t", 5, windows=3), "unknown key 'windows'"),
        (lambda: classifier("swin_t", 5, depths=3), "depths must be a list of whole numbers, got 3"),
        (lambda: classifier("swin_t", 5, depths=()), "depths must be one to four numbers"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_weights_come_back_from_a_file(tmp_path):
    model = classifier(TINY, 5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = classifier(TINY, 5, weights=str(tmp_path / "weights.pth"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        classifier(TINY, 5, weights=str(tmp_path / "none.pth"))


def test_variant_and_its_configuration_make_the_same_model():
    with torch.device("meta"):
        assert classifier("swin_t", 5).architecture == classifier(variant_config("swin_t"), 5).architecture
