"""The command `swin-dense weights`, whose code is tools/weights.py."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.heads import cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.heads.model_file import save_model
from swin_dense.swin import SwinTransformer
from swin_dense.tools.main import main
from swin_dense.weights import load_weights, read_config
from swin_dense.weights.files import read_weights_file
from swin_dense.weights.loading import recognise_file
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import FORMATS, in_format, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

V1 = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3)
V2 = replace(V1, version=2)
WIDTHS: dict[str, Any] = {"fpn_channels": 8, "box_head_channels": 8, "mask_head_channels": 8}
MODELS = {
    "backbone": SwinTransformer,
    "classifier": lambda config: classifier(config, 5),
    "mask_rcnn": lambda config: mask_rcnn(config, 3, **WIDTHS),
    "cascade_mask_rcnn": lambda config: cascade_mask_rcnn(config, 3, **WIDTHS),
    "upernet": lambda config: upernet(config, 3, channels=8, auxiliary_channels=8),
}


@pytest.fixture
def written(randomise, tmp_path):
    def write(kind, name, config=V1, suffix=".pth"):
        """A file of a family."""
        found = recognise(randomise(MODELS[kind](config)).state_dict(), "own")
        path = tmp_path / f"{kind}_{name}{suffix}"
        write_weights(path, in_format(found, name), name, found.head, ["dog", "cat", "cup"])
        return path

    return write


def weights(*words):
    return main(["weights", *map(str, words)])


def tensors_of(path):
    return recognise_file(read_weights_file(path)).tensors


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def message(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.startswith("swin-dense weights: ")
    return error


# ---- The receipt.


def test_receipt_names_the_family_the_groups_and_every_change(written, capsys):
    path = written("mask_rcnn", "mmdet")
    assert weights(path) == 0
    shown = capsys.readouterr().out
    assert f"{path} (mmdet format, mask_rcnn): 100.0% of the backbone, 100.0% of the model's" in shown
    assert "patch merging from channel-major to cell-major order" in shown and "class rows: background first" in shown
    assert "embed_dim 8, depths (1, 2, 1, 1)" in shown and "window_size 3, window_rule dense" in shown
    for group in ("stage 1", "stage 4", "output norms", "pyramid", "proposals", "box head", "mask head"):
        line = next(
            line for line in shown.splitlines() if group in line and "100.0%" in line and "weights:" not in line
        )
        assert "0.0%" in line
    assert "missing: " not in shown and "unused: " not in shown


@pytest.mark.parametrize("kind", MODELS)
def test_every_head_is_told(kind, written, capsys):
    assert weights(written(kind, "official")) == 0
    shown = capsys.readouterr().out
    assert ("(official format)" if kind == "backbone" else f"(official format, {kind})") in shown
    assert "100.0% of the backbone, 100.0% of the model's" in shown


def test_what_is_no_part_of_a_swin_is_named(written, tmp_path, capsys):
    content = torch.load(written("classifier", "official"), weights_only=True)["model"]
    torch.save({"model": {**content, "projector.weight": torch.ones(3, 5)}}, tmp_path / "moby.pth")
    assert weights(tmp_path / "moby.pth", "--to", "timm", "--out", tmp_path / "timm.pth") == 0
    shown = capsys.readouterr().out
    assert "unused: 15" in shown and "no part of a Swin model here" in shown
    assert "left out, no part of a Swin model here: 1 (projector.weight)" in shown
    assert "projector.weight" not in torch.load(tmp_path / "timm.pth", weights_only=True)


def test_json_holds_the_receipt(written, tmp_path):
    path = written("upernet", "huggingface")
    assert weights(path, "--json", tmp_path / "new" / "receipt.json") == 0
    told = json.loads((tmp_path / "new" / "receipt.json").read_text())
    report = load_weights(MODELS["upernet"](V1), path)
    assert (told["source"], told["family"], told["head"]) == (str(path), "huggingface", "upernet")
    assert told["loaded"] == list(report.loaded) and len(told["fates"]) == len(report.fates)
    assert told["backbone"]["depths"] == [1, 2, 1, 1] and told["backbone"]["window_size"] == 3


def test_a_model_file_of_this_library_is_read_too(tmp_path, capsys):
    save_model(tmp_path / "best.safetensors", MODELS["mask_rcnn"](replace(V2, window_size=(5, 4, 4, 3))), {})
    assert weights(tmp_path / "best.safetensors", "--to", "mmdet", "--out", tmp_path / "mmdet.pth") == 0
    shown = capsys.readouterr().out
    assert "(swin_dense format, mask_rcnn)" in shown and "100.0% of the model's" in shown
    assert same(tensors_of(tmp_path / "best.safetensors"), tensors_of(tmp_path / "mmdet.pth"))
    assert read_config(tmp_path / "mmdet.pth").window_size == (5, 4, 4, 3)


def test_a_sharded_file_is_read_by_its_index(written, tmp_path, capsys):
    tensors = read_weights_file(written("classifier", "huggingface")).tensors
    names, folder = list(tensors), tmp_path / "sharded"
    folder.mkdir()
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights(folder / "model.safetensors.index.json", "--to", "timm", "--out", tmp_path / "timm.pth") == 0
    assert "(huggingface format, classifier)" in capsys.readouterr().out
    assert same(tensors_of(tmp_path / "timm.pth"), recognise(tensors, "parts").tensors)


# ---- Conversion.


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_written_in_every_format(name, written, tmp_path, capsys):
    source = written("mask_rcnn", "mmdet")
    before = source.read_bytes()
    for suffix in (".pth", ".safetensors"):
        out = tmp_path / f"out{suffix}"
        assert weights(source, "--to", name, "--out", out) == 0
        assert same(tensors_of(source), tensors_of(out))
        assert f"tensors in {name} format to {out}" in capsys.readouterr().out
    assert source.read_bytes() == before
    names = read_weights_file(tmp_path / "out.pth").class_names
    assert names == (("dog", "cat", "cup") if name in ("official", "mmdet", "mmseg") else None)


def test_names_without_a_place_and_other_rules_are_announced(written, tmp_path, capsys):
    assert weights(written("mask_rcnn", "mmdet"), "--to", "timm", "--out", tmp_path / "out.pth") == 0
    shown = capsys.readouterr().out
    assert "names of this library for what timm has none for: 50 (" in shown
    assert "by the rule 'timm'" in shown and "by 'dense': there the outputs will differ" in shown
    assert weights(written("mask_rcnn", "mmdet"), "--to", "detectron2", "--out", tmp_path / "out.pth") == 0
    shown = capsys.readouterr().out
    assert "names of this library" not in shown and "differ" not in shown


def test_the_window_of_a_v2_is_given_where_the_file_does_not_tell_it(written, tmp_path, capsys):
    source, out = written("classifier", "timm", V2), tmp_path / "out.pth"
    assert weights(source, "--to", "official", "--out", out) == 0
    assert "its window size is not told by such a file; give it with --window-size" in capsys.readouterr().out
    assert not any(name.endswith("_index") for name in read_weights_file(out).tensors)
    assert weights(source, "--to", "official", "--out", out, "--window-size", 5, 4, 4, 3) == 0
    assert read_config(out).window_size == (5, 4, 4, 3) and read_config(out).pretrained_window_sizes is None
    assert weights(source, "--to", "official", "--out", out, "--window-size", 6, "--pretrained-window-size", 4) == 0
    assert read_config(out).window_size == 6 and read_config(out).pretrained_window_sizes == (4, 4, 4, 4)
    assert same(tensors_of(source), tensors_of(out))


# ---- Wrong use.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "timm"], "--to FORMAT and --out FILE belong together"),
        (["--out", "{folder}/out.pth"], "--to FORMAT and --out FILE belong together"),
        (["--to", "timm", "--out", "{file}"], "is the file that is read; name another one"),
        (["--to", "timm", "--out", "{folder}/../{name}/classifier_official.pth"], "is the file that is read"),
        (["--json", "{file}"], "is the file that is read; name another one"),
        (["--to", "timm", "--out", "{folder}/o.pth", "--json", "{folder}/o.pth"], "--out and --json are both"),
        (
            ["--to", "timm", "--out", "{folder}/out.ckpt"],
            "weights are written to .safetensors, .pth, .pt or .bin files",
        ),
        (["--to", "timm", "--out", "{folder}/none/out.pth"], "No such file or directory"),
        (["--window-size", "8"], "tells its window size, 3; leave --window-size out"),
        (["--pretrained-window-size", "8"], "--pretrained-window-size belongs to --window-size"),
    ],
)
def test_wrong_use_is_one_message_and_writes_nothing(words, told, written, tmp_path, capsys):
    path = written("classifier", "official")
    before = path.read_bytes()
    filled = [word.format(file=path, folder=tmp_path, name=tmp_path.name) for word in words]
    assert weights(path, *filled) == 2
    assert told in message(capsys)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_window_that_fits_no_model_is_one_message(written, capsys):
    assert weights(written("backbone", "timm", V2), "--window-size", 4, 4) == 2
    assert "SwinConfig.window_size must be one number or 4" in message(capsys)


def test_an_unknown_format_is_refused(written, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        weights(written("backbone", "timm"), "--to", "keras", "--out", tmp_path / "out.pth")
    assert stopped.value.code == 2 and "invalid choice: 'keras'" in capsys.readouterr().err


def test_formats_of_the_command_are_those_that_can_be_written():
    from swin_dense.tools.weights import _FORMATS

    assert _FORMATS == FORMATS


# ---- Damaged files.


def cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


def without_a_norm(path):
    content = torch.load(path, weights_only=True)
    del content["model"]["layers.1.blocks.0.norm1.weight"]
    torch.save(content, path)


def without_swin(path):
    torch.save({"model": {"conv1.weight": torch.ones(3, 3), "fc.bias": torch.ones(3)}}, path)


def with_a_nan(path):
    content = torch.load(path, weights_only=True)
    content["model"]["layers.0.blocks.0.norm1.weight"][3] = float("nan")
    torch.save(content, path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "classifier_official.pth: "),
        (without_a_norm, "the backbone in it is not whole (official format): layers.1.blocks.0.norm1.weight is"),
        (without_swin, "no Swin backbone of a known format in it; its tensors are 2 (conv1.weight, fc.bias)"),
        (with_a_nan, "values that are not finite in 1 tensors"),
        (lambda path: path.unlink(), "there is no such weights file"),
        (lambda path: path.write_bytes(b""), "is empty"),
    ],
)
def test_a_damaged_file_ends_in_one_message_and_leaves_what_was_there(damage, told, written, tmp_path, capsys):
    path, out = written("classifier", "official"), tmp_path / "out.pth"
    out.write_bytes(b"old")
    damage(path)
    assert weights(path, "--to", "timm", "--out", out, "--json", tmp_path / "receipt.json") == 4
    assert told in message(capsys)
    assert out.read_bytes() == b"old" and {file.name for file in tmp_path.iterdir()} <= {path.name, "out.pth"}


def test_a_detector_without_masks_is_one_message(written, tmp_path, capsys):
    content = torch.load(written("mask_rcnn", "mmdet"), weights_only=True)
    tensors = {name: value for name, value in content["state_dict"].items() if "mask_head" not in name}
    torch.save({"state_dict": tensors}, tmp_path / "faster_rcnn.pth")
    assert weights(tmp_path / "faster_rcnn.pth") == 4
    assert "the mask_rcnn in it is not whole: roi_heads.mask_head.0.0.weight is missing" in message(capsys)
