import os

import numpy as np
import pytest

from swin_dense.tools import benchmark_dense
from swin_dense.tools.benchmark_dense import dense_parts, load_ours, load_torchvision, measure_dense, measure_image
from swin_dense.tools.main import parse

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc/PID/status")


def load_block(annotation_file, image_folder):
    assert annotation_file.is_file() and len(list(image_folder.iterdir())) == 1
    kept = []

    def work():
        np.ones(2**26, np.uint8)  # forgotten, but the peak remembers it
        kept.append(np.ones(2**24, np.uint8))

    return work


@pytest.mark.slow
def test_peak_counts_what_was_held_only_for_a_while():
    (figures,) = measure_image({"block": load_block}, 3, (211, 307)).values()
    assert 60 < figures["above_start"] < 100 and figures["peak"] > figures["above_start"]


@pytest.mark.parametrize("load", [load_ours, load_torchvision])
def test_the_work_is_done_on_every_object(load, tmp_path):
    from swin_dense.tools.benchmark_scenes import write_scenes

    load(*write_scenes(tmp_path, 1, 5, size_hw=(211, 307)))()


def test_figures_are_printed_by_library_and_the_peer_may_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(
        benchmark_dense,
        "measure_image",
        lambda loaders, *size: {name: {"peak": 1000.0, "above_start": 200.0} for name in loaders},
    )
    figures = measure_dense(parse(["benchmark", "data", "--dense"]))
    assert list(figures) == ["swin-dense", "torchvision"] and "300 objects" in capsys.readouterr().out
    assert list(measure_dense(parse(["benchmark", "data", "--dense", "--peers"]))) == ["swin-dense"]
    sentence, table = dense_parts(figures)
    assert "300 objects" in sentence and "| torchvision | 1,000 | 200 |" in table
