from dataclasses import replace
from typing import Any

import pytest
import torch

from swin_dense.classification import Classifier, classifier
from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.heads import MaskRCNN, UPerNet, cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.heads.foreign_files import build_recognised
from swin_dense.swin import SwinTransformer
from swin_dense.weights import load_weights
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import in_format

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3)
WIDTHS: dict[str, Any] = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 12}
MODELS = {
    "backbone": SwinTransformer,
    "some maps": lambda config: SwinTransformer(replace(config, out_features=("c3", "c5"))),
    "classifier": lambda config: classifier(config, 5),
    "mask_rcnn": lambda config: mask_rcnn(config, 3, **WIDTHS),
    "cascade_mask_rcnn": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS),
    "cascade with shared boxes": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS, shared_regression=True),
    "upernet": lambda config: upernet(config, 7, channels=12, auxiliary_channels=8),
}


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_of_a_file_has_the_shapes_and_weights_in_it(kind, version, randomise):
    config = replace(CONFIG, version=version)
    model = randomise(MODELS[kind](config))
    for name in ("mmdet", "torchvision", "huggingface"):
        written = in_format(recognise(model.state_dict(), "own"), name).tensors
        found = recognise(written, "file")
        known = {} if version == 1 else {"window_size": 3}
        built = build_recognised(found, **known)
        assert type(built) is type(model) and shapes(built) == shapes(model)
        report = load_weights(built, written)
        assert report.share == 1.0 and not report.unused and not report.missing
        state = built.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_kind_of_model_is_the_files():
    built = {kind: build_recognised(recognise(MODELS[kind](CONFIG).state_dict(), "own")) for kind in MODELS}
    assert isinstance(built["backbone"], SwinTransformer) and isinstance(built["classifier"], Classifier)
    assert isinstance(built["mask_rcnn"], MaskRCNN) and isinstance(built["upernet"], UPerNet)
    assert built["mask_rcnn"].architecture["style"] == "published"
    shared = [
        built[kind].architecture["shared_regression"] for kind in ("cascade_mask_rcnn", "cascade with shared boxes")
    ]
    assert shared == [False, True]
    assert built["some maps"].config.out_features == ("c3", "c5")


def test_a_file_of_torchvision_gives_torchvisions_network():
    found = recognise(
        in_format(recognise(MODELS["mask_rcnn"](CONFIG).state_dict(), "own"), "torchvision").tensors, "file"
    )
    assert build_recognised(found).architecture["style"] == "torchvision"


def test_what_the_file_cannot_tell_is_given():
    found = recognise(SwinTransformer(replace(CONFIG, version=2)).state_dict(), "own")
    assert "window_size" not in found.fields
    assert build_recognised(found, window_size=[5, 4, 4, 3]).config.window_size == (5, 4, 4, 3)
    with pytest.raises(ConfigError, match=r"SwinConfig.window_size must be one number or 4"):
        build_recognised(found, window_size=[5, 4])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mask_rcnn", "roi_heads.mask_head.0.0.weight"),
        ("mask_rcnn", "roi_heads.box_predictor.cls_score.weight"),
        ("cascade_mask_rcnn", "roi_heads.box_head.0.5.weight"),
        ("upernet", "decode_head.bottleneck.conv.weight"),
    ],
)
def test_a_head_in_part_is_one_message(kind, name):
    found = recognise(MODELS[kind](CONFIG).state_dict(), "some.pth")
    less = replace(found, tensors={key: value for key, value in found.tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"^some.pth: the {kind} in it is not whole: {name} is missing\.$"):
        build_recognised(less)


def test_a_segmenter_without_auxiliary_head_is_built():
    found = recognise(MODELS["upernet"](CONFIG).state_dict(), "own")
    less = {key: value for key, value in found.tensors.items() if not key.startswith("auxiliary_head.")}
    built = build_recognised(replace(found, tensors=less))
    assert built.num_classes == 7 and load_weights(built, less).missing
