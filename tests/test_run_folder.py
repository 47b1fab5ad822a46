import json

import pytest
from PIL import Image

from swin_dense.errors import ConfigError
from swin_dense.heads.model_file import read_about
from swin_dense.tools import run_folder
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.training.checkpoint import read_state
from swin_dense.training.metrics_file import MetricsFile, read_metrics


def test_run_leaves_everything_that_is_promised(tiny_run):
    names = {path.name for path in tiny_run.folder.iterdir()}
    wanted = {"recipe.yaml", "metrics.csv", "curves.png", "best.safetensors", "last.safetensors", "scores.json"}
    assert names == wanted | {"pictures", "last.pt", "previous.pt", "report.html", "environment.json"}
    assert all(name in (run_folder.__doc__ or "") for name in names)


def test_run_recipe_reads_back(tiny_run):
    recipe = read_recipe(str(tiny_run.folder / "recipe.yaml"))
    assert recipe == read_recipe(tiny_run.words[0], tiny_run.words[1:])
    assert recipe.schedule.steps == 4


@pytest.mark.parametrize("name", ["best", "last"])
def test_run_models_know_their_classes_and_recipe(name, tiny_run):
    about = read_about(tiny_run.folder / f"{name}.safetensors")
    names = about["labels"]["names"]
    assert len(names) == {"instance": 6, "semantic": 10}[tiny_run.task] and "triangle" in names
    assert about["recipe"] == read_recipe(tiny_run.words[0], tiny_run.words[1:]).to_dict()
    assert about["step"] == 4 or name == "best"
    assert list(about["score"]) == [{"instance": "mask AP", "semantic": "mIoU"}[tiny_run.task]]


def test_run_best_model_has_the_best_score(tiny_run):
    column = {"instance": "val_mask_AP", "semantic": "val_mIoU"}[tiny_run.task]
    rows = {row["step"]: row[column] for row in read_metrics(tiny_run.folder / "metrics.csv") if column in row}
    about = read_about(tiny_run.folder / "best.safetensors")
    best = max(rows.values())
    assert list(about["score"].values()) == [best]
    assert rows[about["step"]] == best and about["step"] == min(step for step, score in rows.items() if score == best)
    assert read_state(tiny_run.folder / "last.pt").step == 4


def test_run_metrics_hold_losses_and_scores(tiny_run):
    rows = read_metrics(tiny_run.folder / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        parts = [value for name, value in row.items() if name.startswith("loss_")]
        assert row["loss"] == pytest.approx(sum(parts)) and len(parts) >= 2
        assert any(name.startswith("val_") for name in row) == (row["step"] % 2 == 0)


def test_run_scores_are_those_of_the_last_step(tiny_run):
    scores = json.loads((tiny_run.folder / "scores.json").read_text())
    assert scores["step"] == 4
    last = read_metrics(tiny_run.folder / "metrics.csv")[-1]
    if tiny_run.task == "instance":
        assert last["val_mask_AP50"] == scores["mask"]["AP50"] and last["val_box_AP"] == scores["box"]["AP"]
    else:
        assert last["val_mIoU"] == scores["mIoU"]
    assert "triangle" in scores["per_class"]
    assert {name: last[f"val_{name}"] for name in scores["losses"]} == scores["losses"]
    assert last["val_loss"] == sum(scores["losses"].values())
    assert {name for name in last if name.startswith("loss_")} == set(scores["losses"])


def test_run_pictures_are_validation_images_side_by_side(tiny_run):
    pictures = sorted((tiny_run.folder / "pictures").glob("*.png"))
    assert [picture.name for picture in pictures] == ["00000_shapes_100001.png", "00003_shapes_100004.png"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.mode == "RGB" and image.width > 2 * 64


def test_folder_is_startable_when_missing_or_empty(tmp_path):
    RunFolder(tmp_path / "new").require_startable(resume=False)
    RunFolder(tmp_path).require_startable(resume=False)
    assert not (tmp_path / "new").exists()


def test_taken_folder_is_refused_unless_resumed(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match=r"is not empty: continue that run with --resume, or choose another --out"):
        RunFolder(tmp_path).require_startable(resume=False)
    with pytest.raises(ConfigError, match="no training state to resume; start without --resume"):
        RunFolder(tmp_path).require_startable(resume=True)
    (tmp_path / "last.pt").touch()
    RunFolder(tmp_path).require_startable(resume=True)
    assert RunFolder(tmp_path).has_state()


def test_run_that_was_killed_early_is_startable(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "recipe.yaml.tmp").touch()
    folder.require_startable(resume=False)
    folder.write_recipe(read_recipe("shapes_semantic"))
    with pytest.raises(ConfigError, match="is not empty"):
        folder.require_startable(resume=False)
    folder.require_startable(resume=True)
    assert not folder.has_state() and [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    (tmp_path / "recipe.yaml").rename(tmp_path / "torchrun.txt")
    folder.require_startable(resume=True)


def test_folder_belongs_to_the_call_of_torchrun_that_wrote_last(tmp_path, monkeypatch):
    folder, recipe = RunFolder(tmp_path), read_recipe("shapes_semantic")
    for call in ("one", "two"):
        assert not folder.belongs_to(call)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", call)
        folder.write_recipe(recipe)
        assert folder.belongs_to(call) and not folder.belongs_to(None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    folder.write_recipe(recipe)
    assert not folder.belongs_to("two") and not folder.belongs_to(None)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_folder_writes_read_back(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    recipe = read_recipe("shapes_semantic")
    folder.write_recipe(recipe)
    assert read_recipe(str(folder.path / "recipe.yaml")) == recipe
    folder.write_scores({"mIoU": None, "aAcc": 0.5}, {"mIoU": None}, 7)
    assert json.loads(folder.scores.read_text()) == {"step": 7, "table": {"mIoU": None}, "mIoU": None, "aAcc": 0.5}
    folder.write_environment({"command": "train"})
    assert json.loads(folder.environment.read_text()) == {"command": "train"}
    MetricsFile(folder.metrics).append(1, {"loss": 2.0})
    folder.draw_curves()
    assert folder.curves.is_file()
