import json

import pytest
import torch

from swin_dense.tools import benchmark_data
from swin_dense.tools.benchmark_contest import OURS
from swin_dense.tools.benchmark_data import compare, one_thread, time_loaders
from swin_dense.tools.benchmark_page import read_sections, write_section
from swin_dense.tools.benchmark_tables import IMAGES_PER_S
from swin_dense.tools.main import main
from swin_dense.tools.markdown_page import markdown_table

WORDS = ["benchmark", "data", "--pictures", "2", "--repeats", "2"]


@pytest.fixture(autouse=True)
def few_objects(monkeypatch):
    monkeypatch.setattr(benchmark_data, "_OBJECTS_EACH", 3)


def loaded(shift_px=0.0, size_hw=(97, 101), side=40):
    masks = torch.zeros(2, 97, 101, dtype=torch.uint8)
    masks[0, 3 : 3 + side, 5 : 5 + side] = 1
    masks[1, 50:90, 50:90] = 1
    boxes = torch.tensor([[5.0, 3, 5 + side, 3 + side], [50, 50, 90, 90]])
    return torch.zeros(3, *size_hw, dtype=torch.uint8), boxes + shift_px, masks


def test_generated_data_agree_with_torchvision(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main([*WORDS, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["data"]
    assert figures["agreement"]["holds"] and figures["agreement"]["objects"] == 6
    own, peer = (figures["ms_per_image"][name]["all"] for name in ("swin-dense", "torchvision"))
    assert figures["ratio"]["all"] == [theirs / ours for ours, theirs in zip(own, peer, strict=True)]
    shown = capsys.readouterr().out
    assert "times as long" in shown and "Results agree" in shown and "date" in shown


def test_page_says_how_many_workers_a_rate_needs(tmp_path):
    page, file = tmp_path / "page.md", tmp_path / "figures.json"
    rows = markdown_table({OURS: {IMAGES_PER_S: "0.5"}})
    write_section(page, "Mask R-CNN swin_t, a device", ["start", "### train step, float32", rows])
    words = ["--images-per-second", "1e6", "--document", str(page), "--json", str(file)]
    assert main([*WORDS, *words]) == 0
    figures = json.loads(file.read_text())["data"]
    rate = figures["worker_images_per_s"]
    assert rate == 1000 / figures["ms_per_image"][OURS]["median"]
    needed = figures["needed_workers"]
    assert needed["Mask R-CNN swin_t, a device: train step, float32"]["workers"] == 1
    assert needed["asked for"]["workers"] * rate >= 1e6 > (needed["asked for"]["workers"] - 1) * rate
    (other, own) = read_sections(page).values()
    assert other.startswith("start\n\n### train step") and f"One worker loads {rate:.1f} images a second" in own
    assert "| Mask R-CNN swin_t, a device: train step, float32 | 0.50 | 1 |" in own
    assert "--images-per-second 1e+06 --peers torchvision --document FILE\n" in own and str(tmp_path) not in own


def test_own_annotations_are_measured(coco_tree, tmp_path, capsys):
    coco_tree.write()
    words = ["--annotations", str(coco_tree.annotation_file), "--images", str(coco_tree.image_folder), "--peers"]
    assert main([*WORDS, *words, "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())["data"]
    assert set(figures["ms_per_image"]) == {"swin-dense"} and "ratio" not in figures
    assert "torchvision needs" not in capsys.readouterr().out


def test_no_ratio_where_results_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_data, "_LEAST_IOU", 0.9999)
    assert main([*WORDS, "--json", str(tmp_path / "f.json")]) == 0
    shown = capsys.readouterr().out
    assert "No ratio, as the results differ" in shown and "times as long" not in shown
    assert "ratio" not in json.loads((tmp_path / "f.json").read_text())["data"]


def test_equal_results_agree():
    agreement = compare([(loaded(), loaded())])
    assert agreement.holds and agreement.objects == 2 and agreement.left_out == 0
    assert agreement.worst_box_px == 0 and agreement.worst_iou == 1


def test_order_and_surplus_of_the_peer_do_not_matter():
    image, boxes, masks = loaded()
    extra = torch.tensor([[1.0, 1, 1.5, 1.5]])
    peer = image, torch.cat([boxes.flip(0), extra]), torch.cat([masks.flip(0), masks[:1] * 0])
    agreement = compare([(loaded(), peer)])
    assert agreement.holds and agreement.left_out == 1


@pytest.mark.parametrize(
    ("peer", "holds"),
    [
        (loaded(shift_px=5e-4), True),
        (loaded(shift_px=5e-3), False),
        (loaded(size_hw=(97, 100)), False),
        ((*loaded()[:2], loaded(side=39)[2]), True),
        ((*loaded()[:2], loaded(side=37)[2]), False),
    ],
)
def test_differences_beyond_the_tolerance_are_seen(peer, holds):
    assert compare([(loaded(), peer)]).holds == holds


def test_every_loader_gets_every_image_each_time_and_once_before():
    calls = []
    loaders = {name: lambda index, name=name: calls.append((name, index)) for name in "ab"}
    times_ms = time_loaders(loaders, [4, 7, 9], repeats=2)
    assert {name: len(values) for name, values in times_ms.items()} == {"a": 2, "b": 2}
    assert sorted(calls) == sorted([(name, index) for name in "ab" for index in (4, 7, 9)] * 3)


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
