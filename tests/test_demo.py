import json
import signal
from functools import partial

import pytest

from swin_dense.datasets import shapes
from swin_dense.errors import Interrupted
from swin_dense.tools import recipe
from swin_dense.tools.main import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch, tiny_words):
    """The demo's data set and recipes, small enough for seconds."""
    whole_recipe = recipe.read_recipe
    asked = {}

    def read_small(name, overrides=()):
        asked[name] = list(overrides)
        _, _, *changes = tiny_words(name.removeprefix("shapes_"), "schedule.steps=1", "run.pictures=1")
        return whole_recipe(name, [*changes, *overrides])

    few = partial(shapes.write_shapes, num_training=4, num_validation=2, image_side_range=(64, 80))
    monkeypatch.setattr(shapes, "write_shapes", few)
    monkeypatch.setattr(recipe, "read_recipe", read_small)
    return asked


def is_score(value):
    return value is None or 0 <= value <= 1


def test_demo_runs_the_whole_path(small, tmp_path, capsys):
    out, file = tmp_path / "demo", tmp_path / "scores.json"
    assert main(["demo", "--out", str(out), "--json", str(file), "--seed", "7", "--device", "cpu"]) == 0
    scores = json.loads(file.read_text())
    assert all(is_score(scores["instance"][kind][name]) for kind in ("box", "mask") for name in ("AP", "AP50", "AP75"))
    assert is_score(scores["semantic"]["mIoU"]) and is_score(scores["semantic"]["aAcc"])
    assert scores["seconds"] > 0 and scores["out"] == str(out)

    shown = capsys.readouterr().out
    for words in ("instance: mask AP50", "instance: box AP", "semantic: mIoU", "scores on held-back images"):
        assert words in shown
    assert str(out / "data") in shown
    for task in ("instance", "semantic"):
        assert small[f"shapes_{task}"] == [f"data={out / 'data'}", "run.seed=7"]
        for name in ("best.safetensors", "pictures", "report.html"):
            assert str(out / task / name) in shown and (out / task / name).exists()
    assert json.loads((out / "data" / "shapes.json").read_text())["settings"]["seed"] == 7

    assert main(["demo", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_demo_stops_where_training_stops(small, tmp_path, monkeypatch, capsys):
    def terminated(*arguments, **options):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("swin_dense.tools.train.train", terminated)
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json", str(tmp_path / "s.json")]) == 143
    assert not (tmp_path / "s.json").exists()
    assert f"stopped; delete {tmp_path / 'demo'} and start again" in capsys.readouterr().err


def test_demo_leaves_foreign_folders_alone(small, tmp_path, capsys):
    (tmp_path / "demo" / "data").mkdir(parents=True)
    (tmp_path / "demo" / "data" / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 3
    assert "is not empty and holds no shapes" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "demo" / "data").iterdir()] == ["mine.txt"]
