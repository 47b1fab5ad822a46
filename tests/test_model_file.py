import json
import os

import pytest
import safetensors.torch
import torch

from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import mask_rcnn
from swin_dense.heads.model_file import build_model, load_model, read_about, save_model
from swin_dense.heads.upernet import upernet

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=(4, 4, 3, 2))
ABOUT = {"labels": {"names": ["a", "b"], "raw_ids": [1, 7]}, "recipe": {"seed": 3}, "note": "ä"}


def detector(seed=0, **changes):
    torch.manual_seed(seed)
    widths = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8}
    return mask_rcnn(TINY, 2, **{**widths, "score_threshold": 0.01, "max_detections": 7, **changes}).eval()


def segmenter(seed=0, **changes):
    torch.manual_seed(seed)
    model = upernet(TINY, 5, channels=8, auxiliary_channels=6, **changes)
    model.train()(torch.rand(2, 3, 41, 67))  # running statistics of its own
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"window_rule": "dense"}, {"out_features": ("c3", "c4")}])
def test_a_saved_classifier_comes_back_bit_for_bit(tmp_path, changes):
    model = classifier(TINY, 5, **changes).eval()
    save_model(tmp_path / "model.safetensors", model, ABOUT)
    loaded, about = load_model(tmp_path / "model.safetensors")
    assert about["architecture"] == loaded.architecture == model.architecture
    assert loaded.backbone.config == model.backbone.config
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES[0][None]), model(IMAGES[0][None]))


IMAGES = [torch.rand(3, 41, 67), torch.rand(3, 64, 33)]


@pytest.mark.parametrize(
    "changes", [{}, {"style": "torchvision"}, {"anchor_scale": 4.0, "image_mean": [0.1, 0.2, 0.3]}]
)
def test_a_saved_detector_comes_back_bit_for_bit(tmp_path, changes):
    model = detector(**changes)
    save_model(tmp_path / "model.safetensors", model, ABOUT)
    loaded, about = load_model(tmp_path / "model.safetensors")
    assert {name: about[name] for name in ABOUT} == ABOUT
    assert loaded.architecture == model.architecture and loaded.backbone.config == TINY
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        for wanted, got in zip(model(IMAGES), loaded(IMAGES), strict=True):
            assert len(wanted["boxes"]) > 0
            assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("changes", [{}, {"image_std": [0.1, 0.2, 0.3], "dropout": 0.3}])
def test_a_saved_segmenter_comes_back_bit_for_bit(tmp_path, changes):
    model = segmenter(**changes)
    save_model(tmp_path / "model.safetensors", model, ABOUT)
    loaded, about = load_model(str(tmp_path / "model.safetensors"))
    assert about["architecture"] == model.architecture
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES[0][None]), model(IMAGES[0][None]))


def test_architecture_rebuilds_a_model_of_the_same_shape():
    for model in (detector(), segmenter(), classifier(TINY, 5), cascade_mask_rcnn(TINY, 2)):
        rebuilt = build_model(json.loads(json.dumps(model.architecture)))
        shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, rebuilt)]
        assert type(rebuilt) is type(model) and shapes[0] == shapes[1]


def test_what_was_read_can_be_written_with_another_model(tmp_path):
    save_model(tmp_path / "one.safetensors", segmenter(), ABOUT)
    about = read_about(tmp_path / "one.safetensors")
    save_model(tmp_path / "two.safetensors", detector(), about)
    loaded, _ = load_model(tmp_path / "two.safetensors")
    assert loaded.architecture["head"] == "mask_rcnn"


def test_saving_changes_neither_the_model_nor_leaves_other_files(tmp_path):
    model = segmenter().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        save_model(tmp_path / "model.safetensors", model, ABOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saving_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_model(path, segmenter(), ABOUT)
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="no space left"):
            save_model(path, segmenter(seed=1), ABOUT)
    assert path.read_bytes() == before
    save_model(path, segmenter(seed=1), ABOUT)
    assert path.read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def saved(tmp_path):
    save_model(tmp_path / "good.safetensors", segmenter(), ABOUT)
    return (tmp_path / "good.safetensors").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:5],
        lambda good: good[:200],
        lambda good: good[:-1],
        lambda good: b"hello" * 99,
    ],
    ids=["empty", "cut in the length", "cut in the header", "cut in the tensors", "text"],
)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(saved(tmp_path)))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: not a whole safetensors file \("):
        load_model(path)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such model file"):
            load_model(path)


def test_foreign_weights_are_refused_with_a_way_out(tmp_path):
    path = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"holds weights but not what model they belong to;.*load_weights"):
            load_model(path)


def write_with(path, text, tensors=None):
    safetensors.torch.save_file(tensors or {"weight": torch.zeros(2)}, path, metadata={"swin_dense": text})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "architecture": {}}', "format 2; this version reads format 1"),
        ('{"architecture": {}}', "format None; this version reads format 1"),
        ('{"format": 1}', r"bad\.safetensors: .*architecture"),
        ("{broken", r"bad\.safetensors: "),
        ("[1]", r"bad\.safetensors: "),
        (
            '{"format": 1, "architecture": {"head": "fcos"}}',
            "there is no head 'fcos'; known are mask_rcnn, ",
        ),
    ],
)
def test_text_that_this_version_cannot_read_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.safetensors"
    write_with(path, text)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_weights_that_do_not_fit_their_architecture_are_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    model = segmenter()
    write_with(path, json.dumps({"format": 1, "architecture": model.architecture}))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: the weights do not fit the architecture"):
        load_model(path)


def test_build_model_refuses_unknown_heads_and_settings():
    with pytest.raises(ConfigError, match="there is no head None; known are mask_rcnn, "):
        build_model({"backbone": TINY.to_dict()})
    with pytest.raises(ConfigError, match="SwinConfig: unknown key 'window'"):
        build_model({"head": "upernet", "num_classes": 2, "backbone": {"window": 7}})
    with pytest.raises(ConfigError, match="architecture of a upernet needs a backbone"):
        build_model({"head": "upernet", "num_classes": 2})
    with pytest.raises(ConfigError, match="upernet has no setting 'depth'; the file may come from a newer version"):
        build_model({"head": "upernet", "num_classes": 2, "depth": 3, "backbone": TINY.to_dict()})


def test_read_about_needs_no_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, detector(), ABOUT)
    about = read_about(path)
    assert about["format"] == 1 and about["architecture"]["num_classes"] == 2 and about["note"] == "ä"
