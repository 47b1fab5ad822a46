import dataclasses
import math
import os
import pickle

import pytest
import safetensors.torch
import torch

from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError
from swin_dense.heads.mask_rcnn import mask_rcnn
from swin_dense.heads.upernet import upernet
from swin_dense.swin import SwinTransformer
from swin_dense.weights import WeightsReport, load_weights, read_tensors

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4)


def backbone(seed=0, **changes):
    torch.manual_seed(seed)
    model = SwinTransformer(dataclasses.replace(TINY, **changes))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    return model


def detector(seed=0):
    torch.manual_seed(seed)
    return mask_rcnn(backbone(seed), 2, fpn_channels=8, box_head_channels=8, mask_head_channels=8)


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def same_backbone(one, other):
    states = [
        model.backbone.state_dict() if hasattr(model, "backbone") else model.state_dict() for model in (one, other)
    ]
    return unchanged_pair(*states)


def unchanged_pair(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- What is loaded and what is said about it.


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", None])
def test_weights_come_back_bit_for_bit_from_every_kind_of_source(tmp_path, suffix):
    wanted, model = backbone(1), backbone(2)
    source = wanted.state_dict()
    if suffix is not None:
        path = tmp_path / f"weights{suffix}"
        safetensors.torch.save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
        source = path
    report = load_weights(model, source)
    assert same_backbone(model, wanted)
    assert report == WeightsReport(
        source="state dict" if suffix is None else str(source),
        loaded=tuple(wanted.state_dict()),
        missing=(),
        unused=(),
        reshaped=(),
        backbone_share=1.0,
    )


def test_report_names_every_tensor_once():
    state = backbone(1).state_dict()
    state["head.weight"] = torch.zeros(10, 64)
    state["norm3.weight"] = torch.zeros(7)
    del state["norm0.bias"]
    model = backbone(2)
    before = copy_of(model.state_dict())
    report = load_weights(model, state)
    assert report.missing == ("norm0.bias",)
    assert report.unused == ("head.weight",)
    assert report.reshaped == ("norm3.weight: (7,), (64,)",)
    assert set(report.loaded) == set(before) - {"norm0.bias", "norm3.weight"}
    total = sum(value.numel() for value in before.values())
    assert report.backbone_share == pytest.approx(1 - (8 + 64) / total)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] if name in report.loaded else before[name])


def test_report_reads_as_a_receipt():
    report = WeightsReport("a.pth", ("w",), ("m",), ("u1", "u2", "u3", "u4"), (), 0.987)
    assert str(report).splitlines() == [
        "weights: a.pth: 98.7% of the backbone, 1 tensors loaded",
        "  missing: 1 (m)",
        "  unused: 4 (u1, u2, u3, …)",
    ]


def test_too_small_a_share_is_refused_and_changes_nothing():
    state = {name: value for name, value in backbone(1).state_dict().items() if not name.startswith("layers.3")}
    model = backbone(2)
    before = copy_of(model.state_dict())
    with pytest.raises(CheckpointError, match=r"(?s)state dict: \d+\.\d% of the backbone.*less than 95%"):
        load_weights(model, state)
    assert unchanged(model, before)
    report = load_weights(model, state, allow_partial=True)
    assert 0 < report.backbone_share < 0.95
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    assert torch.equal(model.state_dict()["layers.3.blocks.0.norm1.bias"], before["layers.3.blocks.0.norm1.bias"])


@pytest.mark.parametrize("wrong", [{}, {"model": 3}, {"w": torch.zeros(2)}])
def test_foreign_state_dicts_are_refused(wrong):
    with pytest.raises(CheckpointError, match=r"0\.0% of the backbone, 0 tensors loaded"):
        load_weights(backbone(), wrong)


def test_another_variant_is_refused():
    with pytest.raises(CheckpointError, match="check that file and model are of the same variant"):
        load_weights(backbone(), SwinTransformer(dataclasses.replace(TINY, embed_dim=16)).state_dict())


# ---- Between backbones and detectors.


def test_a_backbone_takes_its_share_of_a_detectors_file(tmp_path):
    wanted, model = detector(1), backbone(2)
    torch.save({"state_dict": wanted.state_dict(), "meta": {"epoch": 3}}, tmp_path / "detector.pth")
    report = load_weights(model, tmp_path / "detector.pth")
    assert same_backbone(model, wanted)
    assert report.backbone_share == 1.0 and not report.missing
    assert any(name.startswith("roi_heads.") for name in report.unused)


@pytest.mark.parametrize("build", [detector, lambda seed: upernet(backbone(seed), 5, channels=8)])
def test_a_model_takes_a_backbones_file_into_its_backbone(build):
    wanted, model = backbone(1), build(2)
    before = copy_of(model.state_dict())
    report = load_weights(model, wanted.state_dict())
    assert same_backbone(model, wanted)
    assert report.backbone_share == 1.0 and not report.unused
    assert report.missing and not any(name.startswith("backbone.") for name in report.missing)
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())


def test_a_detector_takes_a_detectors_file_whole():
    wanted, model = detector(1), detector(2)
    report = load_weights(model, wanted.state_dict())
    assert not report.missing and not report.unused
    assert unchanged_pair(model.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "module.backbone.", "backbone."])
def test_prefixes_of_parallel_training_are_taken_off(prefix):
    wanted, model = backbone(1), backbone(2)
    load_weights(model, {prefix + name: value for name, value in wanted.state_dict().items()})
    assert same_backbone(model, wanted)
    whole = detector(3)
    load_weights(whole, {prefix + name: value for name, value in wanted.state_dict().items()})
    assert same_backbone(whole, wanted)


def test_an_official_file_with_its_wrapper_and_buffers_loads(tmp_path):
    wanted, model = backbone(1), backbone(2)
    state = dict(wanted.state_dict())
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    for stage, depth in enumerate(TINY.depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}.attn.relative_position_index"
            state[name] = torch.zeros(49, 49, dtype=torch.int64)  # even of another window
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 299, "max_accuracy": 81.2}, tmp_path / "swin.pth")
    report = load_weights(model, tmp_path / "swin.pth")
    assert same_backbone(model, wanted)
    assert not report.unused and not report.reshaped and not report.missing


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
    assert all(torch.equal(value, before[name]) for name, value in state.items())


# ---- Damaged and dangerous files.


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such weights file"):
            read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused_and_change_nothing(tmp_path, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    state = backbone(1).state_dict()
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    model = backbone(2)
    before = copy_of(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"cut\{suffix}: not a whole"):
        load_weights(model, path)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"<html>404</html>",
        b"\x00" * 99,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x80\x02}",
        b"(lp0",
        b"c",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"other\{suffix}: not a whole"):
        read_tensors(path)


def test_any_byte_soup_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "soup.pth"
    generator = torch.Generator().manual_seed(0)
    start = pickle.dumps({"a": [1, 2.5, "b"], "c": {"d": (None, True)}}, protocol=2)
    for _ in range(300):
        content = torch.tensor(list(start), dtype=torch.uint8)
        rows = torch.randint(0, len(content), (4,), generator=generator)
        content[rows] = torch.randint(0, 256, (4,), generator=generator, dtype=torch.uint8)
        path.write_bytes(bytes(content.tolist()))
        with pytest.raises(CheckpointError):
            read_tensors(path)


class RunsOnLoad:
    """A pickle that would make a folder where it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path, legacy):
    path, target = tmp_path / "bad.pth", tmp_path / "made"
    content = {"model": backbone(1).state_dict(), "extra": RunsOnLoad(str(target))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"bad\.pth: not a whole file of plain tensors"):
        load_weights(backbone(), path)
    path.write_bytes(pickle.dumps(RunsOnLoad(str(target)), protocol=2))
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load_weights(backbone(), path)
    assert not target.exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"epoch": 3}, {"model": {}}, {}])
def test_files_without_named_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty\.pth: holds no tensors by name; expected a state dict"):
        read_tensors(tmp_path / "empty.pth")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value):
    state = copy_of(backbone(1).state_dict())
    state["layers.1.blocks.0.mlp.fc1.weight"][3, 2] = value
    model = backbone(2)
    before = copy_of(model.state_dict())
    with pytest.raises(CheckpointError, match=r"not finite in 1 tensors, .* layers\.1\.blocks\.0\.mlp\.fc1\.weight"):
        load_weights(model, state)
    assert unchanged(model, before)
