import dataclasses
import math

import pytest
import safetensors.torch
import torch

import swin_dense
from swin_dense.config import SwinConfig, variant_config
from swin_dense.errors import CheckpointError
from swin_dense.heads.mask_rcnn import mask_rcnn
from swin_dense.heads.model_file import save_model
from swin_dense.heads.upernet import upernet
from swin_dense.swin import SwinTransformer
from swin_dense.weights.adaptation import resized_bias_table
from swin_dense.weights.loading import load_weights, read_config

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4)


def randomise(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    return model


def backbone(seed=0, **changes):
    return randomise(SwinTransformer(dataclasses.replace(TINY, **changes)), seed)


def detector(seed=0, num_classes=2):
    model = mask_rcnn(TINY, num_classes, fpn_channels=8, box_head_channels=8, mask_head_channels=8)
    return randomise(model, seed)


def segmenter(seed=0, num_classes=5):
    return randomise(upernet(TINY, num_classes, channels=8, auxiliary_channels=8), seed)


def classifier(seed=0, num_classes=3, **changes):
    return randomise(swin_dense.classifier(dataclasses.replace(TINY, **changes), num_classes), seed)


def official_classifier(seed=0, num_classes=3, **changes):
    """The state dict of the official classification code for this library's classifier of the same seed."""
    state = classifier(seed, num_classes, **changes).state_dict()
    return {name.removeprefix("backbone.").replace("norm3.", "norm."): value for name, value in state.items()}


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def backbone_state(model):
    return getattr(model, "backbone", model).state_dict()


# ---- Between files and models of this library.


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", None])
def test_weights_come_back_bit_for_bit_from_every_kind_of_source(tmp_path, suffix):
    wanted, model = backbone(1), backbone(2)
    source = wanted.state_dict()
    if suffix is not None:
        path = tmp_path / f"weights{suffix}"
        safetensors.torch.save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
        source = path
    report = load_weights(model, source)
    assert equal(model.state_dict(), wanted.state_dict())
    assert report.source == ("state dict" if suffix is None else str(source))
    assert report.loaded == tuple(wanted.state_dict())
    assert (report.missing, report.unused, report.resized, report.permuted) == ((), (), (), ())
    assert report.backbone_share == report.share == 1.0


@pytest.mark.parametrize("build", [detector, segmenter, classifier])
def test_a_model_takes_a_file_of_its_own_kind_whole(build):
    wanted, model = build(1), build(2)
    report = load_weights(model, wanted.state_dict())
    assert not report.missing and not report.unused
    assert equal(model.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("build", [detector, segmenter])
def test_a_backbone_takes_its_share_of_a_whole_models_file(tmp_path, build):
    wanted, model = build(1), backbone(2)
    torch.save({"state_dict": wanted.state_dict(), "meta": {"epoch": 3}}, tmp_path / "model.pth")
    report = load_weights(model, tmp_path / "model.pth")
    assert equal(model.state_dict(), wanted.backbone.state_dict())
    assert report.backbone_share == 1.0 and not report.missing
    assert set(report.unused) == {
        name for name in wanted.state_dict() if not name.startswith("backbone.") and "num_batches" not in name
    }


@pytest.mark.parametrize("build", [detector, segmenter])
def test_a_model_takes_a_backbones_file_into_its_backbone(build):
    wanted, model = backbone(1), build(2)
    before = copy_of(model.state_dict())
    report = load_weights(model, wanted.state_dict())
    assert equal(model.backbone.state_dict(), wanted.state_dict())
    assert report.backbone_share == 1.0 and not report.unused
    assert report.missing and not any(name.startswith("backbone.") for name in report.missing)
    assert all(
        torch.equal(value, before[name])
        for name, value in model.state_dict().items()
        if not name.startswith("backbone.")
    )


def test_a_file_of_a_trained_model_tells_its_family_head_and_window(tmp_path):
    model = classifier(1, version=2, window_size=(4, 4, 4, 2))
    save_model(tmp_path / "best.safetensors", model, {"labels": {"names": ["a", "b", "c"]}})
    report = load_weights(classifier(2, version=2), tmp_path / "best.safetensors")
    assert (report.family, report.head) == ("swin_dense", "classifier")
    assert read_config(tmp_path / "best.safetensors") == model.backbone.config


# ---- From a classifier.


def test_a_classifiers_file_fills_all_but_the_norms():
    state, model = official_classifier(1), backbone(2)
    before = copy_of(model.state_dict())
    report = load_weights(model, state)
    assert (report.family, report.head) == ("official", "classifier")
    assert set(report.missing) == {f"norm{stage}.{part}" for stage in range(4) for part in ("weight", "bias")}
    assert set(report.unused) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.missing)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in report.loaded)


def test_the_final_norm_becomes_the_last_norm_only_when_asked():
    state, model = official_classifier(1), backbone(2)
    report = load_weights(model, state, norm_from_classifier=True)
    assert torch.equal(model.norm3.weight, state["norm.weight"]) and torch.equal(model.norm3.bias, state["norm.bias"])
    assert "norm3.weight" in report.loaded and "norm2.weight" in report.missing


def test_a_classifier_gives_the_logits_of_the_file():
    wanted, model = classifier(1).eval(), classifier(2).eval()
    report = load_weights(model, official_classifier(1))
    assert not report.missing and not report.unused
    images = torch.randn(2, 3, 35, 41)
    assert torch.equal(model(images), wanted(images))


# ---- Fitting to a model of other sizes.


def test_position_tables_are_fitted_to_another_window():
    wanted, model = backbone(1), backbone(2, window_size=6)
    report = load_weights(model, wanted.state_dict())
    tables = {name for name in wanted.state_dict() if name.endswith("relative_position_bias_table")}
    assert set(report.resized) == tables and not report.missing
    for name in tables:
        assert torch.equal(model.state_dict()[name], resized_bias_table(wanted.state_dict()[name], 121))


def test_position_embeddings_and_the_first_convolution_are_fitted():
    wanted = backbone(1, absolute_pos_embed_hw=(4, 4))
    model = backbone(2, absolute_pos_embed_hw=(5, 7), in_channels=1)
    report = load_weights(model, wanted.state_dict())
    assert set(report.resized) == {"absolute_pos_embed", "patch_embed.proj.weight"} and not report.missing
    assert torch.equal(model.patch_embed.proj.weight, wanted.patch_embed.proj.weight.sum(1, keepdim=True))


def test_rows_of_known_classes_are_taken_by_name_and_named_in_the_receipt():
    wanted, model = detector(1, num_classes=3), detector(2, num_classes=2)
    before = copy_of(model.state_dict())
    checkpoint = {"state_dict": wanted.state_dict(), "meta": {"CLASSES": ("cat", "dog", "cup")}}
    report = load_weights(model, checkpoint, class_names=["tree", "dog"])
    assert report.kept_classes == ("dog",) and "classes kept by name: 1 (dog)" in str(report)
    score, old = model.roi_heads.box_predictor.cls_score, wanted.roi_heads.box_predictor.cls_score
    assert torch.equal(score.weight[[0, 2]], old.weight[[0, 2]])
    assert torch.equal(score.weight[1], before["roi_heads.box_predictor.cls_score.weight"][1])
    assert len(report.resized) == 6 and not report.missing


def test_without_names_rows_of_another_number_of_classes_start_fresh():
    wanted, model = segmenter(1, num_classes=5), segmenter(2, num_classes=4)
    report = load_weights(model, wanted.state_dict())
    assert set(report.missing) == {
        f"{head}.conv_seg.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")
    }
    assert "5 classes in the file, 4 in the model, none known to be the same" in str(report)


def test_half_precision_files_load_into_full_precision_models():
    wanted, model = backbone(1), backbone(2)
    load_weights(model, {name: value.half() for name, value in wanted.state_dict().items()})
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted.state_dict()[name].half().float())


def test_the_source_is_neither_changed_nor_shared():
    state = copy_of(backbone(1).state_dict())
    before = copy_of(state)
    model = backbone(2)
    load_weights(model, state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert equal(state, before)


# ---- What is refused, and changes nothing.


def renamed(state):
    state["layers.1.blocks.0.mlp.fc9.weight"] = state.pop("layers.1.blocks.0.mlp.fc1.weight")


def transposed(state):
    state["layers.2.blocks.1.mlp.fc1.weight"] = state["layers.2.blocks.1.mlp.fc1.weight"].t()


def without_a_norm(state):
    del state["norm0.bias"]


def without_a_block(state):
    for name in [name for name in state if name.startswith("layers.2.blocks.0.")]:
        del state[name]


def not_finite(state):
    state["layers.1.blocks.0.mlp.fc1.weight"][3, 2] = math.nan


def other_patches(state):
    state["patch_embed.proj.weight"] = torch.zeros(8, 3, 2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            renamed,
            r"backbone in it is not whole \(official format\): layers\.1\.blocks\.0\.mlp\.fc1\.weight is missing",
        ),
        (transposed, r"layers\.2\.blocks\.1\.mlp\.fc1\.weight has shape \(32, 128\), expected \(128, 32\)"),
        (without_a_norm, r"norm0\.bias is missing"),
        (without_a_block, r"layers\.2\.blocks\.0\..* is missing"),
        (not_finite, r"not finite in 1 tensors, the first is backbone\.layers\.1\.blocks\.0\.mlp\.fc1\.weight"),
        (other_patches, r"does not fit the model: patch_embed\.proj\.weight: shape \(8, 3, 2, 2\) in the file"),
        (dict.clear, "no Swin backbone of a known format in it"),
    ],
)
def test_damaged_weights_are_refused_and_change_nothing(damage, message):
    state, model = copy_of(backbone(1).state_dict()), backbone(2)
    damage(state)
    before = copy_of(model.state_dict())
    if not state:
        state["conv1.weight"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, state)
    assert equal(model.state_dict(), before)


def test_another_variant_is_refused_and_named():
    file, model = SwinTransformer(variant_config("swin_t")), SwinTransformer(variant_config("swin_s"))
    with pytest.raises(CheckpointError, match=r"(?s)official format, swin_t\).*less than 95% of the backbone"):
        load_weights(model, file.state_dict())


def test_another_version_is_refused():
    with pytest.raises(CheckpointError, match="check that file and model are of the same variant"):
        load_weights(backbone(version=2), backbone().state_dict())


def test_part_of_a_head_is_refused_and_none_of_it_accepted():
    state, model = copy_of(segmenter(1).state_dict()), segmenter(2)
    state["decode_head.fpn_bottleneck.conv.weights"] = state.pop("decode_head.fpn_bottleneck.conv.weight")
    with pytest.raises(CheckpointError, match=r"does not fit the model: decode_head\.fpn_bottleneck\.conv\.weight"):
        load_weights(model, state)
    without = {name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}
    without["decode_head.fpn_bottleneck.conv.weight"] = without.pop("decode_head.fpn_bottleneck.conv.weights")
    report = load_weights(model, without)
    assert report.missing and all(name.startswith("auxiliary_head.") for name in report.missing)


def test_what_fits_is_loaded_when_asked():
    state, model = copy_of(backbone(1).state_dict()), backbone(2)
    del state["layers.2.blocks.1.mlp.fc1.weight"]
    before = copy_of(model.state_dict())
    report = load_weights(model, state, allow_partial=True)
    assert 0 < report.backbone_share < 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] if name in report.loaded else before[name])


# ---- Reading a configuration.


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}])
def test_config_comes_back_from_a_file(tmp_path, wrap):
    torch.save(wrap(backbone().state_dict()), tmp_path / "weights.pth")
    assert read_config(tmp_path / "weights.pth") == read_config(wrap(backbone().state_dict())) == TINY
    assert swin_dense.read_config(tmp_path / "weights.pth", in_channels=5).in_channels == 5


def test_config_says_the_one_thing_that_the_file_cannot_tell(tmp_path):
    torch.save(backbone(version=2).state_dict(), tmp_path / "v2.pth")
    with pytest.raises(CheckpointError, match=r"v2\.pth: a Swin V2 .* does not tell its window size. Give it, such as"):
        read_config(tmp_path / "v2.pth")
    assert read_config(tmp_path / "v2.pth", window_size=4) == dataclasses.replace(TINY, version=2)


def test_config_of_another_kind_of_file_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(
        CheckpointError, match=r"resnet\.pth: no Swin backbone .* its tensors are 1 \(conv1\.weight\)\."
    ):
        read_config(tmp_path / "resnet.pth")


def test_what_is_neither_file_nor_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: there is no such weights file"):
        load_weights(backbone(), tmp_path / "none.pth")
    with pytest.raises(swin_dense.SwinDenseError, match="imagenet1k"):
        load_weights(backbone(), "imagenet1")
