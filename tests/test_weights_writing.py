import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swin_dense.classification import classifier
from swin_dense.config import VARIANTS, SwinConfig, variant_config
from swin_dense.errors import ConfigError
from swin_dense.heads import cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.swin import SwinTransformer
from swin_dense.weights import load_weights
from swin_dense.weights.files import read_weights_file
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import FORMATS, in_format, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

V1 = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=3)
V2 = replace(V1, version=2, window_size=(5, 4, 4, 3), pretrained_window_sizes=(3, 3, 3, 2))
CONFIGS = {"V1": V1, "V2": V2}
WIDTHS: dict[str, Any] = {"fpn_channels": 8, "box_head_channels": 8, "mask_head_channels": 8}
MODELS = {
    "backbone": SwinTransformer,
    "raw maps": lambda config: SwinTransformer(replace(config, output_norm=False)),
    "classifier": lambda config: classifier(config, 5),
    "mask_rcnn": lambda config: mask_rcnn(config, 3, **WIDTHS),
    "cascade_mask_rcnn": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS),
    "cascade with shared boxes": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS, shared_regression=True),
    "upernet": lambda config: upernet(config, 3, channels=8, auxiliary_channels=8),
}
# Which formats have a name for everything.
COMPLETE = {
    "backbone": {"official", "mmdet", "mmseg", "huggingface", "detectron2"},
    "raw maps": set(FORMATS),
    "classifier": {"official", "torchvision", "timm", "huggingface"},
    "mask_rcnn": {"official", "mmdet", "mmseg", "detectron2"},
    "cascade_mask_rcnn": {"official", "mmdet", "mmseg"},
    "cascade with shared boxes": {"official", "mmdet", "mmseg"},
    "upernet": {"official", "mmdet", "mmseg", "huggingface"},
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def found(kind, config, randomise):
    """The weights of a model with all that a file may hold."""
    return recognised(randomise(MODELS[kind](config)), config)


def recognised(model, config):
    found = recognise(model.state_dict(), "own")
    windows = {"window_size": config.window_size, "pretrained_window_sizes": config.pretrained_window_sizes}
    return replace(found, fields={**found.fields, **windows})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- There and back.


@pytest.mark.parametrize("name", FORMATS)
def test_every_head_comes_back_bit_for_bit_from_a_file_of_every_format(found, kind, name, tmp_path):
    written = in_format(found, name)
    assert bool(written.kept) == (name not in COMPLETE[kind])
    write_weights(tmp_path / "weights.safetensors", written, name, found.head, None)
    back = recognise(read_weights_file(tmp_path / "weights.safetensors").tensors, "file")
    assert same(found.tensors, back.tensors)
    assert (back.head, back.faults, back.unused) == (found.head, (), {})
    # One code for both of OpenMMLab's; only the head tells which.
    family = ("mmseg" if found.head == "upernet" else "mmdet") if name.startswith("mm") else name
    assert back.family == family
    tells_window = found.fields["version"] == 1 or name not in ("timm", "huggingface")
    silent = {"window_rule", *(() if tells_window else ("window_size", "pretrained_window_sizes"))}
    told = {field: value for field, value in found.fields.items() if field not in silent and value is not None}
    assert {field: value for field, value in back.fields.items() if field != "window_rule"} == told


def require_same_through(found, first, second):
    original = in_format(found, first).tensors
    middle = recognise(in_format(recognise(original, first), second).tensors, second)
    known = {field: found.fields[field] for field in ("window_size", "pretrained_window_sizes")}
    back = in_format(replace(middle, fields={**middle.fields, **known}), first).tensors
    assert same(original, back), (first, second)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_a_file_through_another_format_is_itself_again(first, second, randomise):
    """Of a model that takes turns; below, of every model."""
    turn = 8 * FORMATS.index(first) + FORMATS.index(second)
    kind, config = list(MODELS)[turn % len(MODELS)], (V1, V2)[turn % 2]
    require_same_through(recognised(randomise(MODELS[kind](config)), config), first, second)


@pytest.mark.slow
@pytest.mark.parametrize("first", FORMATS)
def test_a_file_of_any_model_through_any_other_format_is_itself_again(found, first):
    for second in FORMATS:
        require_same_through(found, first, second)


def test_rows_of_background_that_are_not_zero_are_kept(randomise, tmp_path):
    found = recognised(randomise(MODELS["mask_rcnn"](V1)), V1)
    rows = found.tensors["roi_heads.box_predictor.bbox_pred.weight"][:4]
    assert rows.abs().min() > 0
    tensors = in_format(found, "mmdet").tensors
    assert torch.equal(tensors["roi_head.bbox_head.fc_reg.background_weight"], rows)
    assert tensors["roi_head.bbox_head.fc_reg.weight"].shape == (4 * 3, 8)
    for value in (found.tensors[f"roi_heads.box_predictor.bbox_pred.{part}"] for part in ("weight", "bias")):
        value[:4] = 0
    assert not any("fc_reg.background" in name for name in in_format(found, "mmdet").tensors)


def test_source_tensors_are_not_changed(found):
    before = {name: value.clone() for name, value in found.tensors.items()}
    for name in FORMATS:
        for value in in_format(found, name).tensors.values():
            assert value.is_contiguous()
    assert same(before, found.tensors)


@pytest.mark.parametrize(
    "variant",
    [name if name in ("swin_t", "swin_v2_t") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
@pytest.mark.parametrize("name", FORMATS)
def test_published_sizes_come_back_whole(variant, name):
    config = variant_config(variant)
    with torch.device("meta"):
        state = SwinTransformer(config).state_dict()
    found = recognise(state, "own")
    windows = {"window_size": config.window_size, "pretrained_window_sizes": config.pretrained_window_sizes}
    written = in_format(replace(found, fields={**found.fields, **windows}), name)
    back = recognise(written.tensors, name)
    assert {key: value.shape for key, value in back.tensors.items()} == {
        f"backbone.{key}": value.shape for key, value in state.items()
    }
    assert (back.unused, back.faults) == ({}, ())
    assert back.variant == (None if config.version == 2 and name in ("timm", "huggingface") else variant)


# ---- The families' own models take what is written.


@contextmanager
def third_party():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torchvision_classifier(config):
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if config.version == 2 else {}
    sizes = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": [3, 3]}
    return SwinTransformer(patch_size=[4, 4], num_classes=5, **sizes, **parts)


def timm_classifier(config):
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 3, "img_size": (88, 120)}
    return (SwinTransformer if config.version == 1 else SwinTransformerV2)(num_classes=5, **sizes)


PARENTS = {
    "torchvision": (torchvision_classifier, "classification", (96, 128)),
    "timm": (timm_classifier, "timm", (88, 120)),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", PARENTS)
def test_classifiers_load_strictly_into_the_parent_and_give_equal_logits(name, version, randomise, tmp_path):
    build, window_rule, size_hw = PARENTS[name]
    config = replace(V1, version=version, window_rule=window_rule)
    own = randomise(classifier(config, 5, window_rule=window_rule)).eval()
    path = tmp_path / "weights.safetensors"
    write_weights(path, in_format(recognised(own, config), name), name, "classifier", None)
    with third_party():
        parent = build(config).eval()
    tensors = load_file(path)
    parent.load_state_dict(tensors, strict=True)
    if name == "torchvision":  # its file holds what it computes, with its values
        state = build(config).state_dict()
        assert same(
            {k: v for k, v in state.items() if k.endswith("index")},
            {k: v for k, v in tensors.items() if k.endswith("index")},
        )
        tables = [key for key in state if key.endswith("relative_coords_table")]
        assert all(torch.allclose(state[key], tensors[key], rtol=0, atol=1e-6) for key in tables)
    images = torch.randn(2, 3, *size_hw, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (parent.double()(images) - own.double()(images)).abs().max()
    assert float(difference) <= 1e-9


def hugging_face_parents():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "embed_dim": 8,
        "depths": [1, 2, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 3,
        "image_size": [200, 264],
    }
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    swin = {**sizes, "attn_implementation": "sdpa"}
    upernet_sizes = {"hidden_size": 8, "auxiliary_channels": 8, "auxiliary_in_channels": 32, "num_labels": 3}
    return {
        "classifier V1": (transformers.SwinForImageClassification, transformers.SwinConfig(**swin, num_labels=5)),
        "classifier V2": (transformers.Swinv2ForImageClassification, transformers.Swinv2Config(**sizes, num_labels=5)),
        "backbone V1": (transformers.SwinBackbone, transformers.SwinConfig(**swin, **stages)),
        "backbone V2": (transformers.Swinv2Backbone, transformers.Swinv2Config(**sizes, **stages)),
        "upernet": (
            transformers.UperNetForSemanticSegmentation,
            transformers.UperNetConfig(backbone_config=transformers.SwinConfig(**swin, **stages), **upernet_sizes),
        ),
    }


@cache
def hugging_face_parent(kind):
    with third_party():
        return hugging_face_parents()[kind]


def own_model(kind):
    if kind.startswith("classifier"):
        return classifier(replace(V1, version=int(kind[-1])), 5)
    if kind == "backbone V2":  # it has no output norms
        return SwinTransformer(replace(V1, version=2, output_norm=False))
    if kind == "backbone V1":
        return SwinTransformer(V1)
    return upernet(V1, 3, channels=8, auxiliary_channels=8, image_mean=(0, 0, 0), image_std=(1, 1, 1))


@pytest.mark.parametrize("kind", ["classifier V1", "classifier V2", "backbone V1", "backbone V2", "upernet"])
def test_hugging_face_loads_a_folder_with_the_written_file(kind, randomise, tmp_path):
    parent_class, parent_config = hugging_face_parent(kind)
    own = randomise(own_model(kind)).eval()
    found = recognise(own.state_dict(), "own")
    with third_party():
        parent_config.save_pretrained(tmp_path)
        write_weights(tmp_path / "model.safetensors", in_format(found, "huggingface"), "huggingface", found.head, None)
        parent, told = parent_class.from_pretrained(tmp_path, output_loading_info=True)
    # Its backbones carry a final norm that nothing reads.
    unread = {name for name in told["missing_keys"] if name.rpartition(".")[0].endswith("layernorm")}
    assert set(told["missing_keys"]) == unread and len(unread) in (0, 2)
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    images = torch.randn(2, 3, 97, 131, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), third_party():
        out, ours = parent.double().eval()(images), own.double()(images)
    pairs = zip(out.feature_maps, ours.values(), strict=True) if "backbone" in kind else [(out.logits, ours)]
    assert max(float((one - other).abs().max()) for one, other in pairs) <= 1e-9


# ---- Files.


@pytest.mark.parametrize(
    ("name", "kind", "keys"),
    [
        ("official", "classifier", {"model"}),
        ("official", "backbone", {"model"}),
        ("official", "mask_rcnn", {"meta", "state_dict"}),
        ("mmdet", "cascade_mask_rcnn", {"meta", "state_dict"}),
        ("mmseg", "upernet", {"meta", "state_dict"}),
        ("detectron2", "mask_rcnn", {"model"}),
        ("torchvision", "classifier", None),
        ("timm", "classifier", None),
        ("huggingface", "upernet", None),
    ],
)
def test_torch_files_lie_under_the_families_keys(name, kind, keys, tmp_path):
    found = recognised(MODELS[kind](V1), V1)
    written = in_format(found, name)
    write_weights(tmp_path / "weights.pth", written, name, found.head, ["dog", "cat", "cup"])
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert content.keys() == (written.tensors.keys() if keys is None else keys)
    told = read_weights_file(tmp_path / "weights.pth").class_names
    assert told == (("dog", "cat", "cup") if keys == {"meta", "state_dict"} else None)


def test_openmmlab_files_without_class_names_say_nothing_of_classes(tmp_path):
    found = recognised(MODELS["mask_rcnn"](V1), V1)
    write_weights(tmp_path / "weights.pth", in_format(found, "mmdet"), "mmdet", found.head, None)
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["meta"] == {}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_loads_into_a_model(name, config, randomise, tmp_path):
    kind = list(MODELS)[FORMATS.index(name)]
    found = recognised(randomise(MODELS[kind](config)), config)
    write_weights(tmp_path / "weights.bin", in_format(found, name), name, found.head, None)
    target = MODELS[kind](config)
    report = load_weights(target, tmp_path / "weights.bin")
    assert not report.missing and not report.unused and report.backbone_share == 1.0
    assert same(recognise(target.state_dict(), "loaded").tensors, found.tensors)


def test_wrong_use_is_one_message(tmp_path):
    found = recognised(MODELS["backbone"](V1), V1)
    with pytest.raises(ConfigError, match=r"there is no format 'keras'; known are official, mmdet"):
        in_format(found, "keras")
    with pytest.raises(ConfigError, match=r"nothing: no Swin backbone in it to write"):
        in_format(recognise({"conv1.weight": torch.ones(3, 3)}, "nothing"), "timm")
    with pytest.raises(
        ConfigError, match=r"weights.ckpt: weights are written to .safetensors, .pth, .pt or .bin files"
    ):
        write_weights(tmp_path / "weights.ckpt", in_format(found, "timm"), "timm", None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failure_leaves_the_old_file_and_nothing_else(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save" if suffix == ".pth" else "safetensors.torch.save", fail)
    found = recognised(MODELS["backbone"](V1), V1)
    with pytest.raises(OSError, match="No space left"):
        write_weights(path, in_format(found, "official"), "official", None, None)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
