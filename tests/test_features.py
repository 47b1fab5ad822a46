import numpy as np
import pytest
import torch
from PIL import Image

from swin_dense.config import SwinConfig, variant_config
from swin_dense.heads.backbones import Normalize
from swin_dense.heads.model_file import load_model
from swin_dense.swin import SwinTransformer
from swin_dense.tools.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
SIZES_HW = ((61, 97), (64, 33))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size_hw in enumerate(SIZES_HW):
        pixels = np.random.default_rng(index).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def tiny_variant(monkeypatch):
    monkeypatch.setattr("swin_dense.config.VARIANTS", {"swin_tiny": TINY, "swin_t": variant_config("swin_t")})


def features(model, pictures, out, *words):
    return main(["features", str(model), str(pictures), "--out", str(out), "--device", "cpu", *map(str, words)])


def expected(backbone, path):
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    with torch.inference_mode():
        maps = backbone.eval()(Normalize(3)(pixels)[None])
    return {name: value[0].numpy() for name, value in maps.items()}


def test_features_of_a_trained_model_equal_its_backbones(tiny_run, pictures, tmp_path, capsys):
    assert features(tiny_run.last_model, pictures, tmp_path / "out") == 0
    assert "2 pictures, features in" in capsys.readouterr().out
    backbone = load_model(tiny_run.last_model)[0].backbone
    for index, (height, width) in enumerate(SIZES_HW):
        wanted = expected(backbone, pictures / f"{index}.png")
        with np.load(tmp_path / "out" / f"{index}.npz") as saved:
            assert set(saved) == {"c2", "c3", "c4", "c5", "input_size_hw", "image_size_hw"}
            assert saved["input_size_hw"].tolist() == saved["image_size_hw"].tolist() == [height, width]
            for level, name in enumerate(("c2", "c3", "c4", "c5")):
                stride = 4 * 2**level
                assert saved[name].shape == (8 * 2**level, -(-height // stride), -(-width // stride))
                assert saved[name].dtype == np.float32 and np.array_equal(saved[name], wanted[name])


def test_random_weights_are_announced(tiny_variant, pictures, tmp_path, capsys):
    assert features("swin_tiny", pictures, tmp_path / "out") == 0
    assert "features of random weights: name a file with --weights" in capsys.readouterr().err


def test_weights_of_a_file_are_used(tiny_variant, pictures, tmp_path, capsys):
    torch.manual_seed(5)
    backbone = SwinTransformer(TINY)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    assert features("swin_tiny", pictures, tmp_path / "out", "--weights", tmp_path / "weights.pth") == 0
    assert "random" not in capsys.readouterr().err
    wanted = expected(backbone, pictures / "0.png")
    with np.load(tmp_path / "out" / "0.npz") as saved:
        assert all(np.array_equal(saved[name], wanted[name]) for name in wanted)


def test_short_edge_resizes(tiny_run, pictures, tmp_path, capsys):
    assert features(tiny_run.last_model, pictures, tmp_path / "out", "--short-edge", 40) == 0
    with np.load(tmp_path / "out" / "0.npz") as saved:
        assert saved["input_size_hw"].tolist() == [40, 64] and saved["image_size_hw"].tolist() == [61, 97]
        assert saved["c2"].shape == (8, 10, 16)


@pytest.mark.parametrize(
    ("model", "words", "code", "shown"),
    [
        ("swin_tt", [], 2, "there is no Swin variant 'swin_tt'; did you mean 'swin_t'?"),
        ("nowhere.safetensors", [], 4, "nowhere.safetensors: there is no such weights file"),
        (
            "swin_t",
            ["--weights", "nowhere.pth"],
            4,
            "there is no file nowhere.pth, and there are no published weights of that name",
        ),
        ("swin_t", ["--short-edge", "-3"], 2, "short_edge must be whole numbers of pixels"),
    ],
)
def test_mistakes_are_explained(model, words, code, shown, tiny_variant, pictures, tmp_path, capsys):
    assert features(model, pictures, tmp_path / "out", *words) == code
    message = capsys.readouterr().err
    assert shown in message and "Traceback" not in message


def test_trained_model_takes_no_other_weights(tiny_run, pictures, tmp_path, capsys):
    assert features(tiny_run.last_model, pictures, tmp_path / "out", "--weights", "other.pth") == 2
    assert "has weights of its own: leave out --weights other.pth" in capsys.readouterr().err


def test_a_file_of_another_family_gives_what_its_family_computes(pictures, tmp_path):
    from timm.models.swin_transformer import SwinTransformer as TimmSwin

    torch.manual_seed(0)
    parent = TimmSwin(img_size=(64, 100), embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4).eval()
    torch.save(parent.state_dict(), tmp_path / "timm.pth")
    assert features(tmp_path / "timm.pth", pictures, tmp_path / "out") == 0
    pixels = torch.from_numpy(np.array(Image.open(pictures / "0.png"))).permute(2, 0, 1).float() / 255
    pixels = torch.nn.functional.pad(Normalize(3)(pixels), (0, 3, 0, 3))[None]  # timm wants whole patches
    with torch.inference_mode(), np.load(tmp_path / "out" / "0.npz") as saved:
        maps = parent.forward_intermediates(pixels)[1]
        assert np.abs(maps[0][0].numpy() - saved["c2"]).max() < 5e-5
        assert np.abs(maps[1][0].numpy() - saved["c3"]).max() < 5e-5
