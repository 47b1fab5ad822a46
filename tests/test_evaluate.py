import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import ones

from swin_dense.tools.main import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluate_repeats_the_scores_of_the_run(tiny_run, tmp_path, capsys):
    assert main(["evaluate", str(tiny_run.last_model), "--json", str(tmp_path / "s.json"), "--device", "cpu"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    of_run = json.loads((tiny_run.folder / "scores.json").read_text())
    assert scores.pop("model") == str(tiny_run.last_model) and of_run.pop("step") == 4
    of_run.pop("table")
    assert scores.pop("inference")["augmented"] is False
    assert scores == of_run
    shown = capsys.readouterr().out
    assert f"{tiny_run.last_model} on 4 images" in shown
    assert {"instance": "mask AP50", "semantic": "mIoU"}[tiny_run.task] in shown and "triangle" in shown
    losses = {"loss": sum(scores["losses"].values()), **scores["losses"]}
    assert all(re.search(rf"{name} +│ +{value:.3f} ", shown) for name, value in losses.items()) and len(losses) > 2


def test_losses_are_left_out_where_the_recipe_says_so(tiny_run, tmp_path, capsys):
    words = ["run.validation_losses=false", "--json", str(tmp_path / "s.json"), "--device", "cpu"]
    assert main(["evaluate", str(tiny_run.last_model), *words]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    of_run = json.loads((tiny_run.folder / "scores.json").read_text())
    assert "losses" in of_run and set(of_run) - set(scores) == {"step", "table", "losses"}
    assert all(scores[name] == of_run[name] for name in set(of_run) - {"step", "table", "losses"})
    assert "loss" not in capsys.readouterr().out


def test_several_views_are_one_word_and_saved_with_the_scores(tiny_run, tmp_path, capsys):
    words = ["inference.augmented_short_edges=[47,80]", "inference.augmented_ratios=[0.7,1.3]", "--augmented"]
    out = tmp_path / "s.json"
    assert main(["evaluate", str(tiny_run.last_model), *words, "--json", str(out), "--device", "cpu"]) == 0
    scores = json.loads(out.read_text())
    of_run = json.loads((tiny_run.folder / "scores.json").read_text())
    settings = scores["inference"]
    assert settings["augmented"] and settings["augmented_flip"] and settings["augmented_max_long_edge"] == 4000
    assert settings["augmented_short_edges"] == [47, 80] and settings["augmented_ratios"] == [0.7, 1.3]
    assert set(scores) - {"model", "inference"} == set(of_run) - {"step", "table", "losses"}


def test_several_views_of_tiles_are_2(tiny_run, capsys):
    code, shown = refusal([tiny_run.last_model, "--augmented", "--tile-size", "200"], capsys)
    assert code == 2 and "inference.augmented is for whole images" in shown


WHOLE_OR_TILES = pytest.mark.parametrize("tiles", [[], ["--tile-size", "64", "--tile-overlap", "24"]])


@WHOLE_OR_TILES
def test_evaluate_and_predict_agree_bit_for_bit_on_objects(tiles, instance_run, shapes_root, tmp_path, capsys):
    out, model = tmp_path / "results.json", str(instance_run.last_model)
    assert main(["evaluate", model, "--predictions", str(out), "--device", "cpu", *tiles]) == 0
    images = shapes_root / "images" / "validation"
    assert main(["predict", model, str(images), "--out", str(tmp_path / "p"), "--device", "cpu", *tiles]) == 0
    evaluated = json.loads(out.read_text())
    predicted = json.loads((tmp_path / "p" / "results.json").read_text())["detections"]
    ids = {f"shapes_{100000 + number}.jpg": 100000 + number for number in range(1, 5)}
    as_evaluated = [
        {
            "image_id": ids[found["file_name"].rsplit("/", 1)[1]],
            **{key: found[key] for key in ("category_id", "bbox", "score", "segmentation")},
        }
        for found in predicted
    ]
    assert len(evaluated) > 40
    assert as_evaluated == evaluated


@WHOLE_OR_TILES
def test_evaluate_and_predict_agree_bit_for_bit_on_labels(tiles, semantic_run, shapes_root, tmp_path, capsys):
    model = str(semantic_run.last_model)
    assert main(["evaluate", model, "--predictions", str(tmp_path / "e"), "--device", "cpu", *tiles]) == 0
    images = shapes_root / "images" / "validation"
    assert main(["predict", model, str(images), "--out", str(tmp_path / "p"), "--device", "cpu", *tiles]) == 0
    evaluated = sorted((tmp_path / "e").iterdir())
    assert [path.name for path in evaluated] == [f"shapes_10000{number}.png" for number in range(1, 5)]
    values = set()
    for path in evaluated:
        with Image.open(path) as first, Image.open(tmp_path / "p" / "labels" / path.name) as second:
            assert np.array_equal(np.asarray(first), np.asarray(second))
            values |= set(np.unique(np.asarray(first)))
    assert len(values) > 1 and values <= set(range(1, 11))  # the files' values, not class indices


def test_pictures_over_the_limit_need_a_word(semantic_run, tmp_path, capsys):
    words = ["evaluate", str(semantic_run.last_model), "--device", "cpu", "--max-pixels"]
    assert main([*words, "1000"]) == 3
    assert "allow more with --max-pixels" in capsys.readouterr().err
    assert main([*words, "100000"]) == 0


def refusal(words, capsys):
    code = main(["evaluate", *map(str, words)])
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith("swin-dense evaluate: ") and captured.err.count("swin-dense evaluate: ") == 1
    return code, captured.err


def test_missing_model_is_4(tmp_path, capsys):
    code, shown = refusal([tmp_path / "no.safetensors"], capsys)
    assert code == 4 and "no.safetensors: there is no such model file" in shown


def test_file_that_is_no_model_is_4(tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("not a model at all, but long enough to hold a header")
    code, shown = refusal([text], capsys)
    assert code == 4 and "notes.txt: not a whole safetensors file" in shown
    bare = tmp_path / "bare.safetensors"
    save_file({"a": ones(1)}, bare)
    code, shown = refusal([bare], capsys)
    assert code == 4 and "not what model they belong to" in shown


def test_training_state_is_no_model(tiny_run, capsys):
    code, shown = refusal([tiny_run.folder / "last.pt"], capsys)
    assert code == 4 and "last.pt: not a whole safetensors file" in shown


def test_cut_model_is_4(tiny_run, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_run.last_model.read_bytes()[:-100])
    code, shown = refusal([cut], capsys)
    assert code == 4 and "cut.safetensors: not a whole safetensors file" in shown


def test_missing_data_is_3(tiny_run, tmp_path, capsys):
    code, shown = refusal([tiny_run.last_model, f"data={tmp_path / 'nowhere'}"], capsys)
    assert code == 3 and "nowhere" in shown


def test_wrong_override_is_2(tiny_run, capsys):
    code, shown = refusal([tiny_run.last_model, "short_edge=3"], capsys)
    assert code == 2 and "unknown key 'short_edge'; did you mean 'inference.short_edge'?" in shown


def test_device_that_is_not_there_is_2(tiny_run, capsys):
    code, shown = refusal([tiny_run.last_model, "--device", "cuda:99"], capsys)
    assert code == 2 and "cuda:99" in shown


def test_other_data_set_with_the_same_classes(semantic_run, shapes_root, tmp_path, capsys):
    # Scores on the training pictures: every part of the recipe may be changed for an evaluation.
    words = [
        f"dataset.val_images={shapes_root / 'images' / 'training'}",
        f"dataset.val_annotations={shapes_root / 'annotations' / 'training'}",
    ]
    assert main(["evaluate", str(semantic_run.last_model), *words, "--device", "cpu"]) == 0
    assert "on 6 images" in capsys.readouterr().out


def test_evaluate_and_predict_agree_on_classes(classification_run, class_folders, tmp_path, capsys):
    out, scores = tmp_path / "results.json", tmp_path / "s.json"
    words = ["--predictions", str(out), "--json", str(scores), "--device", "cpu"]
    assert main(["evaluate", str(classification_run.last_model), *words]) == 0
    shown = capsys.readouterr().out
    assert f"{classification_run.last_model} on 9 images" in shown and "top-1" in shown and "green" in shown
    of_run = json.loads((classification_run.folder / "scores.json").read_text())
    assert of_run.pop("table") == {"top-1": of_run["top-1"]}
    evaluated = json.loads(scores.read_text())
    assert evaluated.pop("inference")["crop_size_hw"] == [16, 16]
    assert {**evaluated, "step": 4} == {**of_run, "model": str(classification_run.last_model)}
    words = ["predict", str(classification_run.last_model), str(class_folders / "val"), "--out", str(tmp_path / "p")]
    assert main([*words, "--device", "cpu"]) == 0
    evaluated = json.loads(out.read_text())["classifications"]
    predicted = json.loads((tmp_path / "p" / "results.json").read_text())["classifications"]
    assert [found["file_name"] for found in evaluated][:4] == ["blue/0.png", "blue/1.png", "blue/2.png", "green/0.png"]
    for found in evaluated:
        found["file_name"] = str(class_folders / "val" / found["file_name"])
    assert predicted == evaluated


def test_files_are_scored_as_the_model_was(instance_run, shapes_root, tmp_path, capsys):
    results, of_model, of_files = (tmp_path / name for name in ("results.json", "model.json", "files.json"))
    model = str(instance_run.last_model)
    assert main(["evaluate", model, "--predictions", str(results), "--json", str(of_model), "--device", "cpu"]) == 0
    capsys.readouterr()
    annotations = next((shapes_root / "annotations").glob("*val*.json"))
    words = ["--predictions", str(results), "--annotations", str(annotations), "--json", str(of_files)]
    assert main(["evaluate", *words]) == 0
    shown = capsys.readouterr().out
    assert f"{results} on 4 images" in shown and "bbox AP50" in shown and "by class" in shown
    scored, expected = json.loads(of_files.read_text()), json.loads(of_model.read_text())
    assert scored["bbox"] == expected["box"]
    # With boxes in the file, pycocotools takes the sizes of masks from them.
    for name in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100"):
        assert scored["segm"][name] == expected["mask"][name]


def test_label_folders_are_scored_as_the_model_was(semantic_run, shapes_root, tmp_path, capsys):
    folder, of_model, of_files = (tmp_path / name for name in ("labels", "model.json", "files.json"))
    model = str(semantic_run.last_model)
    assert main(["evaluate", model, "--predictions", str(folder), "--json", str(of_model), "--device", "cpu"]) == 0
    names = str(shapes_root / "classes.txt")
    annotations = str(shapes_root / "annotations" / "validation")
    words = ["--predictions", str(folder), "--annotations", annotations, "--classes", names, "--first-value", "1"]
    assert main(["evaluate", *words, "--ignored-values", "0", "--json", str(of_files)]) == 0
    scored, expected = json.loads(of_files.read_text()), json.loads(of_model.read_text())
    for name in ("mIoU", "mAcc", "aAcc", "image_mIoU", "boundary_mIoU", "per_class", "absent"):
        assert scored[name] == expected[name]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "name a MODEL, or files to score"),
        (["--predictions", "a.json"], 2, "name a MODEL, or files to score"),
        (["m.safetensors", "--annotations", "a.json"], 2, "are for predictions in files"),
        (["--predictions", "no.json", "--annotations", "no.json"], 3, "no.json: there is no such file or folder"),
        (["--predictions", ".", "--annotations", __file__], 2, "are both files (COCO) or both folders"),
        (["m.safetensors", "--json", "."], 2, ".: cannot be written"),
    ],
)
def test_wrong_words_are_refused_before_any_work(words, code, message, capsys):
    got, shown = refusal(words, capsys)
    assert got == code and message in shown
