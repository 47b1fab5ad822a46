import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.images import read_image
from swin_dense.datasets.labels import LabelMap
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.main import main
from swin_dense.tools.predict import as_results
from swin_dense.tools.predictors import load_predictor

pytestmark = pytest.mark.usefixtures("one_thread")


def predict(run, *words):
    return main(["predict", str(run.last_model), *map(str, words), "--device", "cpu"])


@pytest.fixture
def pictures(shapes_root):
    return sorted((shapes_root / "images" / "validation").iterdir())


def test_every_picture_is_drawn_and_predicted(tiny_run, pictures, tmp_path, capsys):
    assert predict(tiny_run, pictures[0].parent, "--out", tmp_path / "out") == 0
    stems = [path.stem for path in pictures]
    drawn = sorted((tmp_path / "out" / "pictures").iterdir())
    assert [path.stem for path in drawn] == stems
    assert f"4 pictures predicted; look at {tmp_path / 'out' / 'pictures'}" in capsys.readouterr().out
    if tiny_run.task == "instance":
        found = json.loads((tmp_path / "out" / "results.json").read_text())["detections"]
        assert {entry["file_name"] for entry in found} == {str(path) for path in pictures}
        assert {entry["category_id"] for entry in found} <= {1, 3, 7, 12, 20, 90}
        return
    labels = sorted((tmp_path / "out" / "labels").iterdir())
    assert [path.stem for path in labels] == stems
    for label, picture in zip(labels, pictures, strict=True):
        with Image.open(label) as first, Image.open(picture) as second:
            assert first.size == second.size


def test_tiles_are_asked_for_on_the_command_line(tiny_run, pictures, tmp_path, capsys):
    words = (pictures[0], "--tile-size", "60", "--tile-overlap", "24", "--out", tmp_path / "out")
    assert predict(tiny_run, *words) == 0
    overrides = ["inference.tile_size=60", "inference.tile_overlap=24"]
    wanted = load_predictor(tiny_run.last_model, overrides=overrides)(read_image(pictures[0]))
    if tiny_run.task == "instance":
        found = json.loads((tmp_path / "out" / "results.json").read_text())["detections"]
        assert [entry["segmentation"] for entry in found] == wanted.masks_rle
        return
    with Image.open(tmp_path / "out" / "labels" / f"{pictures[0].stem}.png") as labels:
        assert np.array_equal(np.asarray(labels), wanted + 1)


def test_several_views_are_asked_for_on_the_command_line(semantic_run, pictures, tmp_path, capsys):
    assert predict(semantic_run, pictures[0], "--augmented", "--out", tmp_path / "out") == 0
    wanted = load_predictor(semantic_run.last_model, overrides=["inference.augmented=true"])(read_image(pictures[0]))
    with Image.open(tmp_path / "out" / "labels" / f"{pictures[0].stem}.png") as labels:
        assert np.array_equal(np.asarray(labels), wanted + 1)


def test_classifier_asked_for_several_views_is_2(classification_run, pictures, tmp_path, capsys):
    assert predict(classification_run, pictures[0], "--augmented", "--out", tmp_path / "out") == 2
    assert "a classifier sees an image once and whole" in capsys.readouterr().err


def test_pictures_over_the_limit_need_a_word(semantic_run, pictures, tmp_path, capsys):
    assert predict(semantic_run, pictures[0], "--max-pixels", "1000", "--out", tmp_path / "out") == 3
    assert "allow more with --max-pixels" in capsys.readouterr().err
    assert predict(semantic_run, pictures[0], "--max-pixels", "100000", "--out", tmp_path / "out") == 0


def test_tiles_no_larger_than_their_overlap_are_2(semantic_run, pictures, tmp_path, capsys):
    assert predict(semantic_run, pictures[0], "--tile-size", "64", "--out", tmp_path / "out") == 2
    assert (
        "tile_overlap must be 0 or more pixels and less than the side of a tile, got 128 for tiles of 64 x 64"
        in capsys.readouterr().err
    )


def test_prediction_of_a_picture_is_that_of_it_alone(semantic_run, pictures, tmp_path, capsys):
    assert predict(semantic_run, *pictures[:2], "--out", tmp_path / "both") == 0
    assert predict(semantic_run, pictures[1], "--out", tmp_path / "one") == 0
    name = f"labels/{pictures[1].stem}.png"
    assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_pictures_of_one_name_stay_apart(semantic_run, pictures, tmp_path, capsys):
    for folder, source in (("a", pictures[0]), ("b", pictures[1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(source.read_bytes())
    assert predict(semantic_run, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out" / "labels").iterdir()} == {"x.png", "x_2.png"}


@pytest.mark.parametrize("score", ["0", "1", "1e-3"])
def test_score_decides_what_is_drawn_not_what_is_written(score, instance_run, pictures, tmp_path, capsys):
    assert predict(instance_run, pictures[0], "--out", tmp_path / "half") == 0
    assert predict(instance_run, pictures[0], "--out", tmp_path / "other", "--score", score) == 0
    first, second = (tmp_path / name / "results.json" for name in ("half", "other"))
    assert first.read_text() == second.read_text()
    drawn = [(tmp_path / name / "pictures" / f"{pictures[0].stem}.png").read_bytes() for name in ("half", "other")]
    assert (drawn[0] == drawn[1]) == (score == "1")  # a model of four steps is never sure


@pytest.mark.parametrize(
    ("name", "content", "code", "shown"),
    [
        ("missing.jpg", None, 3, "missing.jpg: there is no such picture or folder"),
        ("text.jpg", b"no picture", 3, "text.jpg"),
        ("empty.png", b"", 3, "empty.png"),
    ],
)
def test_picture_that_cannot_be_read_is_3(name, content, code, shown, semantic_run, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert predict(semantic_run, tmp_path / name, "--out", tmp_path / "out") == code
    message = capsys.readouterr().err
    assert shown in message and "Traceback" not in message


def test_folder_without_pictures_is_3(semantic_run, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert predict(semantic_run, tmp_path / "none", "--out", tmp_path / "out") == 3
    assert "no pictures found" in capsys.readouterr().err


def test_out_that_is_a_file_is_2(semantic_run, pictures, tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert predict(semantic_run, pictures[0], "--out", tmp_path / "taken") == 2
    assert "taken" in capsys.readouterr().err


def test_missing_model_is_4(pictures, tmp_path, capsys):
    words = ["predict", str(tmp_path / "no.safetensors"), str(pictures[0]), "--out", str(tmp_path / "out")]
    assert main(words) == 4
    assert "there is no such model file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_hold_the_data_sets_ids_and_corner_with_size():
    masks = [{"size": [5, 7], "counts": "x"}]
    prediction = InstancePrediction(
        np.array([[1, 2, 4, 7]], np.float32), np.array([1]), np.array([0.5], np.float32), masks
    )
    (result,) = as_results(Path("a/b.jpg"), prediction, LabelMap(("cat", "dog"), (17, 90)))
    assert result == {
        "file_name": "a/b.jpg",
        "category_id": 90,
        "category": "dog",
        "score": 0.5,
        "bbox": [1.0, 2.0, 3.0, 5.0],
        "segmentation": masks[0],
    }
    assert prediction.boxes_xyxy.tolist() == [[1, 2, 4, 7]]


def test_pictures_are_classified_with_every_class_by_falling_score(classification_run, class_folders, tmp_path, capsys):
    assert predict(classification_run, class_folders / "val" / "red", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["classifications"]
    paths = sorted((class_folders / "val" / "red").iterdir())
    assert [result["file_name"] for result in found] == [str(path) for path in paths]
    for result in found:
        scores = result["scores"]
        assert set(scores) == {"blue", "green", "red"} and sum(scores.values()) == pytest.approx(1)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert (result["category"], result["score"]) == next(iter(scores.items()))
    assert [path.stem for path in sorted((tmp_path / "out" / "pictures").iterdir())] == ["0", "1", "2"]
