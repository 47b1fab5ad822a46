"""Every family's own model, with random weights, against the model that its file is loaded into here."""

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swin_dense.classification import classifier
from swin_dense.config import STAGE_NAMES, VARIANTS, SwinConfig, variant_config
from swin_dense.errors import CheckpointError
from swin_dense.heads import cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.swin import SwinTransformer
from swin_dense.weights import load_weights, read_config
from swin_dense.weights.files import read_weights_file
from swin_dense.weights.loading import recognise_file
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import in_format
from swin_dense.windows import relative_position_index

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {(1, torch.float64): 1e-9, (2, torch.float64): 1e-9, (1, torch.float32): 5e-5, (2, torch.float32): 2e-3}
# Maps of 25 x 33 to 4 x 5 cells are no multiples of the window; for parents of whole patches only, 22 x 30 to 3 x 4.
SIZE_HW, WHOLE_PATCHES_HW = (97, 131), (88, 120)
SIZES: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 1, 2), "num_heads": (1, 2, 2, 4)}
RAW = SwinConfig(**SIZES, window_size=3, output_norm=False)
NORMED = replace(RAW, output_norm=True)
WIDTHS: dict[str, Any] = {"fpn_channels": 8, "box_head_channels": 8, "mask_head_channels": 8}
PLAIN: dict[str, Any] = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}  # images as they are


@contextmanager
def third_party():
    """Other libraries may warn as they like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_torch(parent, folder):
    torch.save(parent.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def save_safetensors(parent, folder):
    from safetensors.torch import save_file

    save_file(parent.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_pretrained(parent, folder):
    with third_party():
        parent.save_pretrained(folder)
    return folder / "model.safetensors"


@dataclass
class Case:
    """A parent, and what is expected of its file.

    `maps` are the parent's stage outputs (B, C, h, w), `logits` its classes. `known` is what a file does not tell.
    """

    parent: nn.Module
    family: str
    head: str | None
    config: SwinConfig
    maps: Callable[[Any, torch.Tensor], Any]
    logits: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    size_hw: tuple[int, int] = SIZE_HW
    seen_hw: tuple[int, int] | None = None
    known: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    save: Callable[[Any, Path], Path] = save_torch


def torchvision_maps(parent, images):
    maps = []
    for index, part in enumerate(parent.features):
        images = part(images)
        if index % 2 == 1:
            maps.append(images.permute(0, 3, 1, 2))
    return maps


def torchvision_case(version):
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    parent = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2, 1, 2],
        num_heads=[1, 2, 2, 4],
        window_size=[3, 3],
        num_classes=5,
        **parts,
    )
    config = replace(RAW, version=version, window_rule="classification")
    # Its convolution passes over the pixels behind the last whole patch.
    return Case(parent, "torchvision", "classifier", config, torchvision_maps, nn.Module.__call__, seen_hw=(96, 128))


def timm_case(version, **settings):
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes = {**SIZES, "window_size": 3, "patch_size": 4, "img_size": WHOLE_PATCHES_HW, "num_classes": 5, **settings}
    parent = (SwinTransformer if version == 1 else SwinTransformerV2)(**sizes)
    config = replace(RAW, version=version, window_rule="timm")
    return Case(
        parent,
        "timm",
        "classifier",
        config,
        lambda parent, images: parent.forward_intermediates(images)[1],
        nn.Module.__call__,
        WHOLE_PATCHES_HW,
        known={} if version == 1 else {"window_size": 3},
        save=save_safetensors,
    )


def timm_case_of_other_sizes():
    case = timm_case(
        1, patch_size=2, in_chans=5, mlp_ratio=3.0, qkv_bias=False, img_size=(34, 46), depths=(1, 2), num_heads=(2, 4)
    )
    config = replace(
        RAW,
        window_rule="timm",
        patch_size=2,
        in_channels=5,
        mlp_ratio=3.0,
        qkv_bias=False,
        depths=(1, 2),
        num_heads=(2, 4),
        out_features=("c2", "c3"),
    )
    return replace(case, config=config, size_hw=(34, 46))


def timm_case_of_another_training_window():
    case = timm_case(2, pretrained_window_sizes=(2, 2, 2, 2))
    known = {"window_size": 3, "pretrained_window_sizes": (2, 2, 2, 2)}
    return replace(case, config=replace(case.config, pretrained_window_sizes=(2, 2, 2, 2)), known=known)


def timm_features_case():
    import timm

    settings = {**SIZES, "window_size": 3, "img_size": WHOLE_PATCHES_HW}
    parent = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **settings)
    return Case(
        parent,
        "timm",
        None,
        replace(RAW, window_rule="timm"),
        lambda parent, images: [stage.permute(0, 3, 1, 2) for stage in parent(images)],
        size_hw=WHOLE_PATCHES_HW,
        save=save_safetensors,
    )


def hugging_face_config(name, **settings):
    transformers = pytest.importorskip("transformers")
    # Swin V2 fixes its windows and shifts for the size it is built for: one whose maps are all larger than the window.
    sizes = {
        "image_size": [200, 264],
        "embed_dim": 8,
        "depths": [2, 2, 1, 2],
        "num_heads": [1, 2, 2, 4],
        "window_size": 3,
    }
    # Its own attention takes the softmax of Swin V1 in float32, also in a model of float64.
    return getattr(transformers, name)(**{**sizes, "num_labels": 5, "attn_implementation": "sdpa", **settings})


def hugging_face_maps(parent, body, images):
    """What leaves the last block of each stage; the model itself returns merged maps."""
    kept, maps = [], []
    hooks = [
        stage.blocks[-1].register_forward_hook(lambda _, __, out: kept.append(out[0])) for stage in body.encoder.layers
    ]
    parent(images)
    for hook in hooks:
        hook.remove()
    for stage, tokens in enumerate(kept):
        size_hw = (-(-side // (4 * 2**stage)) for side in images.shape[2:])
        maps.append(tokens.transpose(1, 2).reshape(len(images), -1, *size_hw))
    return maps


def hugging_face_classifier_case(version, **settings):
    import transformers

    name = ("Swin" if version == 1 else "Swinv2") + "Config"
    options = {} if version == 1 else {"attn_implementation": "eager"}
    config = hugging_face_config(name, **options, **settings)
    parent = getattr(transformers, name.replace("Config", "ForImageClassification"))(config)

    def maps(parent, images):
        return hugging_face_maps(parent, parent.swin if version == 1 else parent.swinv2, images)

    return Case(
        parent,
        "huggingface",
        "classifier",
        replace(RAW, version=version, window_rule="classification"),
        maps,
        lambda parent, images: parent(images).logits,
        known={} if version == 1 else {"window_size": 3},
        save=save_pretrained,
    )


def hugging_face_case_with_position_embedding():
    case = hugging_face_classifier_case(
        1, use_absolute_embeddings=True, image_size=100, qkv_bias=False, mlp_ratio=3.0, patch_size=4
    )
    config = replace(case.config, absolute_pos_embed_hw=(25, 25), qkv_bias=False, mlp_ratio=3.0)
    return replace(case, config=config, size_hw=(100, 100))


def hugging_face_model_case():
    import transformers

    parent = transformers.SwinModel(hugging_face_config("SwinConfig"))
    maps = lambda parent, images: hugging_face_maps(parent, parent, images)  # noqa: E731
    return replace(hugging_face_classifier_case(1), parent=parent, head=None, maps=maps, logits=None)


def hugging_face_backbone_case(version, out_features):
    import transformers

    stages = [f"stage{STAGE_NAMES.index(name) + 1}" for name in out_features]
    options = {} if version == 1 else {"attn_implementation": "eager"}
    config = hugging_face_config("SwinConfig" if version == 1 else "Swinv2Config", out_features=stages, **options)
    parent = (transformers.SwinBackbone if version == 1 else transformers.Swinv2Backbone)(config)
    expected = (
        replace(NORMED, out_features=out_features)
        if version == 1
        else replace(RAW, version=2, window_rule="classification")
    )
    return Case(
        parent,
        "huggingface",
        None,
        expected,
        lambda parent, images: parent(images).feature_maps,
        known={} if version == 1 else {"window_size": 3},
        save=save_pretrained,
    )


def hugging_face_upernet_case():
    import transformers

    backbone = hugging_face_config("SwinConfig", out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=12, auxiliary_channels=8, auxiliary_in_channels=32, num_labels=5
    )
    return Case(
        transformers.UperNetForSemanticSegmentation(config),
        "huggingface",
        "upernet",
        NORMED,
        lambda parent, images: parent.backbone(images).feature_maps,
        lambda parent, images: parent(images).logits,
        save=save_pretrained,
    )


def hugging_face_mask_former_case(name):
    import transformers

    backbone = hugging_face_config("SwinConfig", out_features=["stage1", "stage2", "stage3", "stage4"])
    small = {"decoder_config": transformers.DetrConfig(d_model=16, decoder_layers=1, encoder_layers=1)}
    if name == "Mask2Former":
        small = {
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
        }
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **small)
    parent = getattr(
        transformers, name + ("ForInstanceSegmentation" if name == "MaskFormer" else "ForUniversalSegmentation")
    )
    return Case(
        parent(config),
        "huggingface",
        None,
        NORMED,
        lambda parent, images: parent.model.pixel_level_module.encoder(images).feature_maps,
        unused=(
            "model.pixel_level_module.decoder.",
            "model.transformer_module.",
            "class_predictor.",
            "mask_embedder.",
            "criterion.",
        ),
        save=save_pretrained,
    )


def smp_case():
    import segmentation_models_pytorch as smp

    settings = {**SIZES, "window_size": 3, "img_size": (96, 128)}
    parent = smp.UPerNet(
        "tu-swin_tiny_patch4_window7_224", encoder_weights=None, decoder_channels=12, classes=5, **settings
    )
    for norm in parent.decoder.feature_norms:
        norm.eps = 1e-5  # it has 1e-6, unlike every other family

    def maps(parent, images):
        features = parent.encoder(images)[-4:]
        return [norm(feature) for norm, feature in zip(parent.decoder.feature_norms, features, strict=True)]

    def logits(parent, images):  # before its last upsampling, which aligns corners
        return parent.segmentation_head[0](parent.decoder(parent.encoder(images)))

    return Case(parent, "smp", "upernet", replace(NORMED, window_rule="timm"), maps, logits, size_hw=(96, 128))


CASES: dict[str, Callable[[], Case]] = {
    "torchvision V1": lambda: torchvision_case(1),
    "torchvision V2": lambda: torchvision_case(2),
    "timm V1": lambda: timm_case(1),
    "timm V2": lambda: timm_case(2),
    "timm V2 from another window": timm_case_of_another_training_window,
    "timm of other sizes": timm_case_of_other_sizes,
    "timm features_only": timm_features_case,
    "Hugging Face classifier V1": lambda: hugging_face_classifier_case(1),
    "Hugging Face classifier V2": lambda: hugging_face_classifier_case(2),
    "Hugging Face position embedding": hugging_face_case_with_position_embedding,
    "Hugging Face model": hugging_face_model_case,
    "Hugging Face backbone V1": lambda: hugging_face_backbone_case(1, STAGE_NAMES),
    "Hugging Face backbone V1, two maps": lambda: hugging_face_backbone_case(1, ("c3", "c5")),
    "Hugging Face backbone V2": lambda: hugging_face_backbone_case(2, STAGE_NAMES),
    "Hugging Face UPerNet": hugging_face_upernet_case,
    "Hugging Face MaskFormer": lambda: hugging_face_mask_former_case("MaskFormer"),
    "Hugging Face Mask2Former": lambda: hugging_face_mask_former_case("Mask2Former"),
    "smp UPerNet": smp_case,
}


@cache
def built(name):
    if name.startswith("Hugging"):
        pytest.importorskip("transformers")
    with third_party():
        return CASES[name]()


@pytest.fixture(params=CASES)
def case(request, randomise):
    found = built(request.param)
    randomise(found.parent)
    return found


def own_logits(case, images):
    """Of this library's model with the parent's weights, given the images that the parent sees."""
    file, num_classes = case.parent.state_dict(), 5
    if case.head == "classifier":
        model = classifier(case.config, num_classes, output_norm=True, window_rule=case.config.window_rule)
    else:
        model = upernet(case.config, num_classes, channels=12, auxiliary_channels=8, **PLAIN)
    model = model.to(images.dtype).eval()
    load_weights(model, file)
    if case.family == "smp":
        return model.decode_head(list(model.backbone(images).values()))
    return model(images)


def differences(case, dtype):
    """The largest of each map, and of the logits."""
    parent = copy.deepcopy(case.parent).to(dtype).eval()
    channels = case.config.in_channels
    images = torch.randn(2, channels, *case.size_hw, dtype=dtype, generator=torch.Generator().manual_seed(1))
    height, width = case.seen_hw or case.size_hw
    seen = images[..., :height, :width]
    backbone = SwinTransformer(case.config).to(dtype).eval()
    report = load_weights(backbone, case.parent.state_dict())
    assert not report.missing and report.backbone_share == 1.0
    with torch.inference_mode(), third_party():
        expected, got = list(case.maps(parent, images)), list(backbone(seen).values())
        if case.logits is not None:
            expected.append(case.logits(parent, images))
            got.append(own_logits(case, seen))
    return [float((one - other).abs().max()) for one, other in zip(expected, got, strict=True)], expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_map_and_the_logits_equal_the_parents(case, dtype):
    found, expected = differences(case, dtype)
    assert len(found) == len(case.config.out_features) + (case.logits is not None)
    assert max(found) <= TOLERANCE[case.config.version, dtype]
    assert all(float(value.std()) > 0.05 for value in expected)


def test_file_is_recognised_as_what_it_is(case, tmp_path):
    path = case.save(case.parent, tmp_path)
    found = recognise_file(read_weights_file(path))
    assert (found.family, found.head, found.faults) == (case.family, case.head, ())
    assert found.fields["window_rule"] == case.config.window_rule
    assert all(name.startswith(case.unused) for name in found.unused) if case.unused else not found.unused
    for name in case.known:
        assert name not in found.fields
    if case.known:
        with pytest.raises(CheckpointError, match=r"does not tell its window size. Give it, such as window_size=8"):
            read_config(path)
    assert read_config(path, **case.known) == case.config


def test_file_and_state_dict_give_the_same_weights(case, tmp_path):
    path = case.save(case.parent, tmp_path)
    from_file, from_memory = SwinTransformer(case.config), SwinTransformer(case.config)
    assert not load_weights(from_file, path).missing
    load_weights(from_memory, case.parent.state_dict())
    states = from_file.state_dict(), from_memory.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_hugging_face_writes_other_names_than_it_has_in_memory(tmp_path):
    """What the test above rests on."""
    case = built("Hugging Face backbone V1")
    on_disk = read_weights_file(save_pretrained(case.parent, tmp_path)).tensors
    assert not on_disk.keys() & {name for name in case.parent.state_dict() if ".attention." in name}


# ---- torchvision's own Mask R-CNN around a Swin body.


class ChannelsFirst(nn.Module):
    """torchvision's Swin gives maps channels last, its pyramid takes them channels first."""

    def __init__(self, features):
        super().__init__()
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        self.body = IntermediateLayerGetter(features, {str(2 * stage + 1): str(stage) for stage in range(4)})
        self.fpn = FeaturePyramidNetwork([8, 16, 32, 64], 8, extra_blocks=LastLevelMaxPool())
        self.out_channels = 8

    def forward(self, images):
        return self.fpn({name: value.permute(0, 3, 1, 2) for name, value in self.body(images).items()})


def torchvision_mask_rcnn(randomise):
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    parent = MaskRCNN(
        ChannelsFirst(torchvision_case(1).parent.features),
        min_size=96,
        max_size=128,
        box_head=TwoMLPHead(8 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 91),
        mask_head=MaskRCNNHeads(8, [8, 8, 8, 8], 1),
        mask_predictor=MaskRCNNPredictor(8, 8, 91),
        box_score_thresh=0.02,
        image_mean=PLAIN["image_mean"],
        image_std=PLAIN["image_std"],
    )
    return randomise(parent).double().eval()


def test_torchvision_mask_rcnn_gives_the_same_detections(randomise, tmp_path):
    parent = torchvision_mask_rcnn(randomise)
    path = save_torch(parent, tmp_path)
    found = recognise_file(read_weights_file(path))
    assert (found.family, found.head, found.faults, found.unused) == ("torchvision", "mask_rcnn", (), {})
    assert read_config(path) == replace(RAW, window_rule="classification")
    settings = {**WIDTHS, **PLAIN, "box_head_channels": 16, "style": "torchvision", "score_threshold": 0.02}
    model = mask_rcnn(read_config(path), 90, **settings).double().eval()
    report = load_weights(model, path)
    assert not report.missing and not report.unused
    images = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2)]
    with torch.inference_mode():
        expected, got = parent(images), model(images)
    for one, other in zip(expected, got, strict=True):
        assert len(one["scores"]) > 3 and torch.equal(one["labels"], other["labels"] + 1)
        for name in ("boxes", "scores", "masks"):
            assert float((one[name] - other[name]).abs().max()) <= 1e-9


# ---- Families whose packages are no part of the tests: their names written out from their code.


def merged_like_unfold(value):
    """A patch merging's last axis in the order in which nn.Unfold puts the four cells of a patch."""
    channels = value.shape[-1] // 4
    patch = torch.arange(4 * channels).view(1, channels, 2, 2)
    unfolded = nn.Unfold(kernel_size=2, stride=2)(patch.double()).flatten().long()
    ours = torch.cat([patch[0, :, row, column] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))])
    return value[..., ours.argsort()[unfolded]]


def attention_buffers(config, prefix):
    """What the official code stores beside the parameters."""
    buffers = {}
    for stage, depth in enumerate(config.depths):
        window, trained = config.stage_window_size(stage), config.stage_pretrained_window_size(stage)
        offsets = torch.arange(1.0 - window, window) / (trained - 1) * 8
        offsets = offsets.sign() * (offsets.abs() + 1).log2() / 3
        for block in range(depth):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            buffers[f"{name}.attn.relative_position_index"] = relative_position_index(window)
            if config.version == 2:
                table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)
                buffers[f"{name}.attn.relative_coords_table"] = table[None]
            if block % 2 == 1:
                buffers[f"{name}.attn_mask"] = torch.zeros(4, window**2, window**2)
    return buffers


def official_classifier(state, config):
    last = f"backbone.norm{len(config.depths) - 1}."
    tensors = {name.replace(last, "norm.").removeprefix("backbone."): value for name, value in state.items()}
    if "absolute_pos_embed" in tensors:
        tensors["absolute_pos_embed"] = tensors["absolute_pos_embed"].flatten(2).transpose(1, 2)
    return {**tensors, **attention_buffers(config, "")}


def moby(state, config):
    online = {name: value for name, value in official_classifier(state, config).items() if not name.startswith("head.")}
    key = {f"encoder_k.{name}": torch.zeros_like(value) for name, value in online.items()}
    rest = {"projector.linear1.weight": torch.ones(3, 3), "queue1": torch.ones(4, 9), "queue_ptr": torch.zeros(1)}
    return {f"module.{name}": value for name, value in {**key, **prefixed("encoder.", online), **rest}.items()}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def renamed(state, table):
    """Names by the first entry that fits their start; a third part changes the values."""
    tensors = {}
    for name, value in state.items():
        start, new, *convert = next(entry for entry in table if name.startswith(entry[0]))
        tensors[new + name.removeprefix(start)] = convert[0](value) if convert else value
    return tensors


def background_last(rows):
    return torch.cat([rows[1:], rows[:1]])


OPENMMLAB_NECK = (
    *((f"fpn.pyramid.inner_blocks.{i}.0.", f"neck.lateral_convs.{i}.conv.") for i in range(4)),
    *((f"fpn.pyramid.layer_blocks.{i}.0.", f"neck.fpn_convs.{i}.conv.") for i in range(4)),
    ("rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
    ("rpn.head.cls_logits.", "rpn_head.rpn_cls."),
    ("rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
)
OPENMMLAB_MASK = (
    *OPENMMLAB_NECK,
    ("roi_heads.box_head.fc6.", "roi_head.bbox_head.shared_fcs.0."),
    ("roi_heads.box_head.fc7.", "roi_head.bbox_head.shared_fcs.1."),
    ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls.", background_last),
    ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg.", lambda rows: rows[4:]),
    *((f"roi_heads.mask_head.{i}.0.", f"roi_head.mask_head.convs.{i}.conv.") for i in range(4)),
    ("roi_heads.mask_predictor.conv5_mask.", "roi_head.mask_head.upsample."),
    ("roi_heads.mask_predictor.mask_fcn_logits.", "roi_head.mask_head.conv_logits.", lambda rows: rows[1:]),
)
OPENMMLAB_CASCADE = OPENMMLAB_NECK + tuple(
    entry
    for s in range(3)
    for entry in (
        *((f"roi_heads.box_head.{s}.{i}.0.", f"roi_head.bbox_head.{s}.shared_convs.{i}.conv.") for i in range(4)),
        *((f"roi_heads.box_head.{s}.{i}.1.", f"roi_head.bbox_head.{s}.shared_convs.{i}.bn.") for i in range(4)),
        (f"roi_heads.box_head.{s}.5.", f"roi_head.bbox_head.{s}.shared_fcs.0."),
        (f"roi_heads.box_predictor.{s}.cls_score.", f"roi_head.bbox_head.{s}.fc_cls.", background_last),
        (f"roi_heads.box_predictor.{s}.bbox_pred.", f"roi_head.bbox_head.{s}.fc_reg.", lambda rows: rows[4:]),
        *((f"roi_heads.mask_head.{s}.{i}.0.", f"roi_head.mask_head.{s}.convs.{i}.conv.") for i in range(4)),
        (f"roi_heads.mask_predictor.{s}.conv5_mask.", f"roi_head.mask_head.{s}.upsample."),
        (
            f"roi_heads.mask_predictor.{s}.mask_fcn_logits.",
            f"roi_head.mask_head.{s}.conv_logits.",
            lambda rows: rows[1:],
        ),
    )
)
DETECTRON2_MASK = (
    *((f"fpn.pyramid.inner_blocks.{i}.0.", f"backbone.fpn_lateral{i + 2}.") for i in range(4)),
    *((f"fpn.pyramid.layer_blocks.{i}.0.", f"backbone.fpn_output{i + 2}.") for i in range(4)),
    ("rpn.head.conv.0.0.", "proposal_generator.rpn_head.conv."),
    ("rpn.head.cls_logits.", "proposal_generator.rpn_head.objectness_logits."),
    ("rpn.head.bbox_pred.", "proposal_generator.rpn_head.anchor_deltas."),
    ("roi_heads.box_head.fc6.", "roi_heads.box_head.fc1."),
    ("roi_heads.box_head.fc7.", "roi_heads.box_head.fc2."),
    ("roi_heads.box_predictor.cls_score.", "roi_heads.box_predictor.cls_score.", background_last),
    ("roi_heads.box_predictor.bbox_pred.", "roi_heads.box_predictor.bbox_pred.", lambda rows: rows[4:]),
    *((f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
    ("roi_heads.mask_predictor.conv5_mask.", "roi_heads.mask_head.deconv."),
    ("roi_heads.mask_predictor.mask_fcn_logits.", "roi_heads.mask_head.predictor.", lambda rows: rows[1:]),
)
UPERNET = (("decode_head.", "decode_head."), ("auxiliary_head.", "auxiliary_head."))


def official_detector(state, config, table):
    tensors = renamed(state, (*table, ("backbone.", "backbone.")))
    indices = {k: v for k, v in attention_buffers(config, "backbone.").items() if k.endswith("_index")}
    return {**tensors, **indices}


def detectron2(state, config):
    indices = {k: v for k, v in attention_buffers(config, "backbone.bottom_up.").items() if k.endswith("_index")}
    mean = {"pixel_mean": torch.ones(3, 1, 1)}
    return {**renamed(state, (*DETECTRON2_MASK, ("backbone.", "backbone.bottom_up."))), **indices, **mean}


def openmmlab(state, config, table):
    tensors = {}
    for name, value in official_detector(state, config, table).items():
        if name.startswith("backbone."):
            value = merged_like_unfold(value) if ".downsample." in name else value
            for old, new in (
                ("patch_embed.proj.", "patch_embed.projection."),
                (".layers.", ".stages."),
                (".attn.", ".attn.w_msa."),
                (".mlp.fc1.", ".ffn.layers.0.0."),
                (".mlp.fc2.", ".ffn.layers.1."),
            ):
                name = name.replace(old, new)
        tensors[name] = value
    return tensors


LAST = replace(NORMED, out_features=("c5",))
V2 = replace(LAST, version=2, window_size=(5, 4, 4, 3), pretrained_window_sizes=(3, 3, 3, 2))
TABLES = {"mask_rcnn": OPENMMLAB_MASK, "cascade_mask_rcnn": OPENMMLAB_CASCADE, "upernet": UPERNET}
OWN_MODELS: dict[str, Callable[[SwinConfig], nn.Module]] = {
    "classifier": lambda config: classifier(config, 5),
    "mask_rcnn": lambda config: mask_rcnn(config, 3, **WIDTHS),
    "cascade_mask_rcnn": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS),
    "upernet": lambda config: upernet(config, 5, channels=8, auxiliary_channels=8),
}


# Name: (head of the model, its configuration, how the family writes it, family, head in the file, unused names).
WRITTEN_OUT: dict[str, tuple[Any, ...]] = {
    "official classifier V1": (
        "classifier",
        LAST,
        lambda *source: {"model": official_classifier(*source)},
        "official",
        "classifier",
        (),
    ),
    "official classifier V2": (
        "classifier",
        V2,
        lambda *source: {"model": official_classifier(*source)},
        "official",
        "classifier",
        (),
    ),
    "official classifier, position embedding": (
        "classifier",
        replace(LAST, absolute_pos_embed_hw=(7, 7), patch_norm=False, in_channels=5, mlp_ratio=3.0, patch_size=2),
        lambda *source: {"model": official_classifier(*source)},
        "official",
        "classifier",
        (),
    ),
    "timm before 0.9": ("classifier", LAST, official_classifier, "official", "classifier", ()),
    "MoBY": (
        "classifier",
        LAST,
        lambda *source: {"model": moby(*source)},
        "official",
        None,
        ("encoder_k.", "projector.", "queue"),
    ),
    "detectron2": (
        "mask_rcnn",
        NORMED,
        lambda *source: {"model": detectron2(*source)},
        "detectron2",
        "mask_rcnn",
        ("pixel_mean",),
    ),
    **{
        f"official {head}": (
            head,
            NORMED,
            lambda state, config, head=head: {"state_dict": official_detector(state, config, TABLES[head])},
            "official",
            head,
            (),
        )
        for head in TABLES
    },
    **{
        f"OpenMMLab {head}": (
            head,
            NORMED,
            lambda state, config, head=head: {
                "state_dict": openmmlab(state, config, TABLES[head]),
                "meta": {"epoch": 12},
            },
            "mmseg" if head == "upernet" else "mmdet",
            head,
            (),
        )
        for head in TABLES
    },
}


@pytest.fixture(params=WRITTEN_OUT)
def written_out(request, randomise):
    """A model and its weights in another family's names."""
    own_head, config, write, family, head, unused = WRITTEN_OUT[request.param]
    model = randomise(OWN_MODELS[own_head](config), seed=3)
    state = model.state_dict()
    for name, value in state.items():  # no other family has rows of background for boxes and masks
        if "bbox_pred" in name and name.startswith("roi_heads."):
            value[:4] = 0
        if "mask_fcn_logits" in name:
            value[0] = 0
    return model, OWN_MODELS[own_head](config), write(state, config), family, head, unused


def test_written_out_names_are_recognised(written_out, tmp_path):
    model, _, content, family, head, unused = written_out
    torch.save(content, tmp_path / "weights.pth")
    found = recognise_file(read_weights_file(tmp_path / "weights.pth"))
    assert (found.family, found.head, found.faults) == (family, head, ())
    assert {name for name in found.unused if not name.startswith(unused or "?")} == set()
    assert bool(found.unused) == bool(unused)
    config = model.backbone.config
    if head in ("classifier", None):  # a final norm is no output norm
        config = replace(config, output_norm=False, out_features=STAGE_NAMES)
    assert read_config(tmp_path / "weights.pth") == config


def test_written_out_weights_come_back_bit_for_bit(written_out):
    model, target, content, *_ = written_out
    report = load_weights(target, content)
    state, loaded = model.state_dict(), target.state_dict()
    absent = {name for name in state if name.startswith("head.")} if report.head is None else set()
    assert set(report.missing) == absent
    for name in state.keys() - absent:
        assert torch.equal(state[name], loaded[name]), name


# ---- Published sizes: names and shapes only.

TIMM_MODELS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
    "swin_b_w12_384": "swin_base_patch4_window12_384",
    "swin_l_w12_384": "swin_large_patch4_window12_384",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
    "swin_v2_t_w16_256": "swinv2_tiny_window16_256",
    "swin_v2_s_w16_256": "swinv2_small_window16_256",
    "swin_v2_b_w16_256": "swinv2_base_window16_256",
    "swin_v2_b_w12to16_256": "swinv2_base_window12to16_192to256",
    "swin_v2_l_w12to16_256": "swinv2_large_window12to16_192to256",
    "swin_v2_b_w12to24_384": "swinv2_base_window12to24_192to384",
    "swin_v2_l_w12to24_384": "swinv2_large_window12to24_192to384",
}
TORCHVISION_MODELS = ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")


def published(names):
    return [name if name in ("swin_t", "swin_v2_t") else pytest.param(name, marks=pytest.mark.slow) for name in names]


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def require_published(parent, variant):
    """Every tensor has its place in the variant, with its shape; written back, the parent's names and shapes again."""
    tensors = {name: value for name, value in parent.state_dict().items() if "num_batches" not in name}
    found = recognise(tensors, "published")
    config = variant_config(variant)
    with torch.device("meta"):
        wanted = shapes(classifier(config, 1000).state_dict())
    wanted = {name.replace("backbone.norm3.", "final_norm."): shape for name, shape in wanted.items()}
    assert shapes(found.tensors) == wanted and not found.unused and not found.faults
    assert all(found.fields[name] == getattr(config, name) for name in ("version", "embed_dim", "depths", "num_heads"))
    if config.version == 1:
        assert found.variant == variant
    written = in_format(found, found.family)
    computed = ("relative_position_index", "relative_coords_table")
    kept = {name: shape for name, shape in shapes(tensors).items() if not name.endswith(computed)}
    assert {name: shape for name, shape in shapes(written.tensors).items() if not name.endswith(computed)} == kept


@pytest.mark.parametrize("variant", published(TIMM_MODELS))
def test_published_timm_models_have_the_variants_names_and_shapes(variant):
    import timm

    with torch.device("meta"):
        require_published(timm.create_model(TIMM_MODELS[variant]), variant)


@pytest.mark.parametrize("variant", published(TORCHVISION_MODELS))
def test_published_torchvision_models_have_the_variants_names_and_shapes(variant):
    import torchvision

    parent = getattr(torchvision.models, variant)()
    require_published(parent, variant)
    found = recognise(parent.state_dict(), "published")
    assert found.variant == variant
    assert shapes(in_format(found, "torchvision").tensors) == shapes(parent.state_dict())


@pytest.mark.parametrize("variant", published(VARIANTS))
def test_published_hugging_face_models_have_the_variants_names_and_shapes(variant):
    pytest.importorskip("transformers")
    own = variant_config(variant)
    sizes = {
        "embed_dim": own.embed_dim,
        "depths": list(own.depths),
        "num_heads": list(own.num_heads),
        "num_labels": 1000,
    }
    name = "Swin" if own.version == 1 else "Swinv2"
    with torch.device("meta"), third_party():
        import transformers

        config = getattr(transformers, f"{name}Config")(window_size=own.stage_window_size(0), image_size=384, **sizes)
        parent = getattr(transformers, f"{name}ForImageClassification")(config)
    found = recognise(parent.state_dict(), "published")
    with torch.device("meta"):
        wanted = shapes(SwinTransformer(replace(own, output_norm=False)).state_dict())
    assert shapes(found.tensors).items() >= {f"backbone.{name}": shape for name, shape in wanted.items()}.items()
    assert not found.unused and not found.faults and found.variant == (variant if own.version == 1 else None)
