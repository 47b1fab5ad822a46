import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError
from swin_dense.heads import cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.swin import SwinTransformer
from swin_dense.weights import load_weights
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import FORMATS, in_format

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SwinConfig(embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=3, out_features=("c2", "c3"))
FOUR_STAGES = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=3)
WIDTHS: dict[str, Any] = {"fpn_channels": 8, "box_head_channels": 8, "mask_head_channels": 8}
CLASSIFIER_FORMATS = ("official", "torchvision", "timm", "huggingface")
COMPUTED = ("relative_position_index", "relative_coords_table")


@cache
def file_of(name, version):
    """Tensors of a small model as a family writes them: of a classifier where it has one, else of a backbone."""
    config = replace(CONFIG, version=version)
    model = classifier(config, 5, out_features=("c3",)) if name in CLASSIFIER_FORMATS else SwinTransformer(config)
    found = recognise(model.state_dict(), "own")
    return in_format(replace(found, fields={**found.fields, "window_size": 3}), name).tensors


@pytest.fixture(
    params=[(name, version) for name in FORMATS if name != "mmseg" for version in (1, 2)],
    ids=lambda pair: f"{pair[0]} V{pair[1]}",
)
def file(request):
    return dict(file_of(*request.param))


def is_refused(tensors):
    try:
        return bool(recognise(tensors, "file").faults)
    except CheckpointError:
        return True


def backbone_names(file):
    """One name of each kind: numbers of stages and blocks do not count."""
    names = [
        name
        for name in file
        if not name.endswith(COMPUTED) and not re.match(r"(\w+\.)?(norm|layernorm|head|classifier)\.", name)
    ]
    names = [name for name in names if not name.startswith(("norm.", "layernorm."))]
    return {re.sub(r"\d+", "N", name): name for name in names}.values()


# ---- What is whole.


def test_every_format_is_recognised_whole(file):
    found = recognise(file, "file")
    assert (found.faults, found.unused) == ((), {}) and found.fields["depths"] == (1, 2)
    assert set(found.origins.values()) <= set(file) and set(found.changes) <= set(found.tensors)


HEADS = {
    None: SwinTransformer,
    "classifier": lambda config: classifier(config, 5),
    "mask_rcnn": lambda config: mask_rcnn(config, 3, **WIDTHS),
    "cascade_mask_rcnn": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS),
    "upernet": lambda config: upernet(config, 3, channels=8, auxiliary_channels=8),
}


@pytest.mark.parametrize("head", HEADS)
def test_own_state_dicts_are_recognised(head):
    found = recognise(HEADS[head](FOUR_STAGES).state_dict(), "own")
    assert (found.head, found.faults, found.unused, found.changes) == (head, (), {}, {})
    # Backbone and UPerNet have the official names, and so the official family.
    assert found.family == ("official" if head in (None, "upernet") else "swin_dense")


@pytest.mark.parametrize("name", FORMATS)
def test_the_window_rule_is_the_familys(name):
    rules = {"timm": "timm", "torchvision": "classification"}
    dense = in_format(recognise(HEADS[None](FOUR_STAGES).state_dict(), "own"), name)
    assert recognise(dense.tensors, "file").fields["window_rule"] == rules.get(name, "dense")
    classes = in_format(recognise(HEADS["classifier"](FOUR_STAGES).state_dict(), "own"), name)
    assert recognise(classes.tensors, "file").fields["window_rule"] == rules.get(name, "classification")


def test_a_final_norm_beside_output_norms_leaves_the_rule_dense():
    """Hugging Face's backbones carry one that nothing reads; it must not make another network of them."""
    found = recognise({**HEADS[None](FOUR_STAGES).state_dict(), **final_norm(64)}, "own")
    for name in ("official", "mmdet", "huggingface", "detectron2"):
        assert recognise(in_format(found, name).tensors, "file").fields["window_rule"] == "dense"


def final_norm(channels):
    return {"final_norm.weight": torch.ones(channels), "final_norm.bias": torch.zeros(channels)}


@pytest.mark.parametrize("prefix", ["encoder.", "model.backbone.", "student.0."])
@pytest.mark.parametrize("name", FORMATS)
def test_a_prefix_does_not_matter(name, prefix):
    file = file_of(name, 1)
    plain, found = recognise(file, "file"), recognise({prefix + key: value for key, value in file.items()}, "file")
    backbone = {key for key in plain.tensors if key.startswith("backbone.")}
    assert backbone <= found.tensors.keys() and found.faults == ()
    assert all(found.origins[key] == prefix + plain.origins[key] for key in backbone)


def test_of_two_backbones_the_one_with_the_shorter_prefix_is_read():
    file = file_of("official", 1)
    pair = {f"encoder_k.{name}": torch.full_like(value, 7) for name, value in file.items()}
    pair |= {f"encoder.{name}": value for name, value in file.items()}
    found, alone = recognise(pair, "file"), recognise(file, "file")
    assert set(found.unused) == {f"encoder_k.{name}" for name in file}
    assert all(torch.equal(value, found.tensors[name]) for name, value in alone.tensors.items())


def test_one_stage_of_timm_is_told_by_its_head():
    state = classifier(replace(CONFIG, depths=(2,), num_heads=(1,), out_features=("c2",)), 5).state_dict()
    found = recognise(in_format(recognise(state, "own"), "timm").tensors, "file")
    assert (found.family, found.head, found.faults, found.unused) == ("timm", "classifier", (), {})


def test_variant_is_the_published_one():
    with torch.device("meta"):
        assert recognise(SwinTransformer(SwinConfig()).state_dict(), "file").variant == "swin_t"
        assert recognise(SwinTransformer(replace(SwinConfig(), window_size=5)).state_dict(), "file").variant is None
        v2 = recognise(SwinTransformer(replace(SwinConfig(), version=2)).state_dict(), "file")
    assert v2.variant is None  # its window is not told
    told = replace(v2, fields={**v2.fields, "window_size": [8, 8, 8, 8]})  # as a file of this library says it
    assert told.variant == "swin_v2_t"


# ---- What is not.


def test_one_renamed_tensor_is_noticed(file):
    for name in backbone_names(file):
        assert is_refused({key + "x" * (key == name): value for key, value in file.items()}), name


def test_one_missing_tensor_is_noticed(file):
    for name in backbone_names(file):
        assert is_refused({key: value for key, value in file.items() if key != name}), name


def test_one_transposed_tensor_is_noticed(file):
    names = [name for name in backbone_names(file) if file[name].ndim == 2 and len(set(file[name].shape)) == 2]
    assert len(names) >= 4
    for name in names:
        assert is_refused({**file, name: file[name].T}), name


BLOCKS = {
    "official": "layers.1.blocks.0.",
    "timm": "layers.1.blocks.0.",
    "mmdet": "stages.1.blocks.0.",
    "mmseg": "stages.1.blocks.0.",
    "torchvision": "features.3.0.",
    "huggingface": "swin.encoder.layers.1.blocks.0.",
    "detectron2": "backbone.bottom_up.layers.1.blocks.0.",
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_missing_block_is_noticed(name):
    file = file_of(name, 1)
    start = next(key for key in file if BLOCKS[name] in key).partition(BLOCKS[name])[0] + BLOCKS[name]
    less = {key: value for key, value in file.items() if not key.startswith(start)}
    assert len(less) <= len(file) - 12 and is_refused(less)


def test_without_its_last_block_a_file_is_a_smaller_model_that_does_not_load():
    file = {key: value for key, value in file_of("official", 1).items() if not key.startswith("layers.1.blocks.1.")}
    assert recognise(file, "file").fields["depths"] == (1, 1)
    with pytest.raises(CheckpointError, match=r"less than 95% of the backbone would be loaded|does not fit the model"):
        load_weights(SwinTransformer(CONFIG), file)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_halves_of_two_formats_are_no_file(first, second):
    same = ({"mmdet", "mmseg"}, {"official", "timm"})  # these share most names
    if first == second or {first, second} in same:
        return
    one, other = file_of(first, 1), file_of(second, 1)
    half = dict(list(one.items())[: len(one) // 2])
    assert is_refused({**half, **dict(list(other.items())[len(other) // 2 :])})


def other_networks():
    import timm
    import torchvision

    models = torchvision.models
    return {
        "ResNet": models.resnet18,
        "torchvision ViT": models.vit_b_16,
        "ConvNeXt": models.convnext_tiny,
        "MaxViT": models.maxvit_t,
        "torchvision Mask R-CNN": lambda: models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None),
        "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224"),
        "DeiT": lambda: timm.create_model("deit_tiny_patch16_224"),
        "PVT": lambda: timm.create_model("pvt_v2_b0"),
        "Video Swin": models.video.swin3d_t,
        "Swin V2 CR": lambda: timm.create_model("swinv2_cr_tiny_224"),
    }


@pytest.mark.parametrize("name", other_networks())
def test_other_networks_are_not_recognised(name):
    with torch.device("meta"):
        state = other_networks()[name]().state_dict()
    found = recognise(state, "file")
    assert found.fields == {} and found.variant is None
    assert len(found.unused) + len(found.tensors) == len(state)


def test_nothing_is_not_recognised():
    found = recognise({}, "file")
    assert (found.family, found.head, found.fields, found.tensors, found.unused) == ("unknown", None, {}, {}, {})
    for state in ({}, {"conv1.weight": torch.ones(3, 3)}):
        with pytest.raises(CheckpointError):
            load_weights(SwinTransformer(CONFIG), state)


def test_a_network_with_similar_names_is_refused():
    import timm

    with torch.device("meta"):
        state = timm.create_model("davit_tiny").state_dict()
    with pytest.raises(CheckpointError, match=r"^file: the backbone is not whole: patch_embed.proj.weight is missing"):
        recognise(state, "file")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(FORMATS), version=st.sampled_from([1, 2]))
def test_any_damage_ends_in_faults_or_one_error(data, name, version):
    """Tensors of other shapes, under other names, with other numbers: never another exception."""
    file = dict(file_of(name, version))
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(file)))
        damage = data.draw(st.sampled_from(["drop", "empty", "scalar", "reshape", "rename", "values"]))
        value = file.pop(key)
        if damage == "empty":
            file[key] = value[:0] if value.ndim else value
        elif damage == "scalar":
            file[key] = value.flatten()[0] if value.numel() else value
        elif damage == "reshape":
            file[key] = value.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1, 1)])))
        elif damage == "rename":
            number = data.draw(st.sampled_from(["0", "3", "4", "77", "9999", "9" * 5000]))
            file[re.sub(r"\d+", number, key, count=1)] = value
        elif damage == "values":
            bad = data.draw(st.sampled_from([0.0, float("nan"), float("inf"), 1e30]))
            file[key] = torch.full_like(value, bad) if value.is_floating_point() else torch.zeros_like(value)
    is_refused(file)
