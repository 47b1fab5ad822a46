import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from pycocotools import mask as coco_mask
from safetensors.torch import load_file

from swin_dense.datasets import shapes
from swin_dense.datasets.coco import CocoDataset
from swin_dense.datasets.coco_results import as_detections
from swin_dense.datasets.instance_scores import InstanceScores
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import Interrupted
from swin_dense.tools import recipe
from swin_dense.tools.benchmark_ignored import (
    SCORES,
    SETTINGS,
    document,
    ignore_share,
    recall_and_precision,
    recipes,
    summarise,
)
from swin_dense.tools.machine import describe_machine
from swin_dense.tools.main import main
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.train import train
from swin_dense.tools.training_run import TrainingRun
from swin_dense.training.distributed import process_from_environment

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch, tiny_words):
    """The data set and the recipe, small enough for seconds; every detection is drawn."""
    whole_recipe = recipe.read_recipe
    _, _, *changes = tiny_words(
        "instance", "inference.drawn_score=0.0", "model.head.max_detections=17", "run.checkpoint_every_steps=9"
    )

    def read_small(name, overrides=()):
        return whole_recipe(name, [*changes, *overrides])

    few = partial(shapes.write_shapes, num_training=4, num_validation=2, image_side_range=(64, 80))
    monkeypatch.setattr(shapes, "write_shapes", few)
    monkeypatch.setattr(recipe, "read_recipe", read_small)


def benchmark(folder, *words):
    files = ["--json", str(folder / "figures.json"), "--document", str(folder / "docs" / "page.md")]
    assert main(["benchmark", "ignored", *words, *files]) == 0
    return json.loads((folder / "figures.json").read_text())["ignored"], (folder / "docs" / "page.md").read_text()


def test_figures_and_document_say_the_same(small, tmp_path, monkeypatch, capsys):
    trained = []

    def noted(recipe, *arguments, **options):
        trained.append((recipe.run.seed, recipe.model.head["ignore_overlap"]))
        train(recipe, *arguments, **options)

    monkeypatch.setattr("swin_dense.tools.train.train", noted)
    figures, page = benchmark(tmp_path, "--seeds", "2", "2", "--steps", "1", "--share", "0.4")
    assert trained == [(2, 0.5), (2, None)]
    assert list(figures["by_seed"]) == ["2"]
    for seed, measured in figures["by_seed"].items():
        assert measured["ignored_objects"] == round(0.4 * measured["objects"])
        assert f"{measured['ignored_objects']} of {measured['objects']}" in page
        for setting, scores in measured["scores"].items():
            cells = " | ".join(f"{scores[name]:.3f}" for name in SCORES)
            assert f"| seed {seed}, {setting} | {cells} |" in page
    assert "swin-dense benchmark ignored --seeds 2 --steps 1 --share 0.4 --document FILE" in page
    for words in (describe_machine()["device"], "| ignored | background | difference |", *SETTINGS.values()):
        assert words in " ".join(page.split())
    assert str(tmp_path) not in page
    shown = capsys.readouterr().out
    assert "seed 2, ignored" in shown and "median over the seeds" in shown


def test_without_ignored_regions_both_settings_are_one(small, tmp_path):
    figures, _ = benchmark(tmp_path, "--seeds", "0", "--steps", "1", "--share", "0", "--runs", str(tmp_path / "runs"))
    measured = figures["by_seed"]["0"]
    assert measured["crowds"] == measured["ignored_objects"] == 0 < measured["objects"]
    assert measured["scores"]["ignored"] == measured["scores"]["background"]
    (folder,) = (tmp_path / "runs").iterdir()
    first, second = (load_file(folder / setting / "last.safetensors") for setting in SETTINGS)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_both_runs_start_from_the_same_weights_and_differ_in_one_setting(small, tmp_path):
    paths = shapes.write_shapes(tmp_path / "data", seed=1)
    both = recipes(paths.root, paths.training.annotation_file, 5, 2)
    runs = [TrainingRun(each, RunFolder(tmp_path), process_from_environment("cpu")) for each in both.values()]
    first, second = (run.model.state_dict() for run in runs)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    ignored, background = (each.to_dict() for each in both.values())
    assert ignored["model"]["head"].pop("ignore_overlap") == runs[0].model.rpn.ignore_overlap == 0.5
    assert background["model"]["head"].pop("ignore_overlap") is runs[1].model.rpn.ignore_overlap is None
    assert ignored == background


@pytest.fixture(scope="module")
def content(shapes_root):
    return json.loads(shapes.shapes_paths(shapes_root).training.annotation_file.read_text())


def mask_of(annotation, size_hw):
    outline = annotation["segmentation"]
    if isinstance(outline, list):
        outline = coco_mask.merge(coco_mask.frPyObjects(outline, *size_hw))
    elif isinstance(outline["counts"], list):
        outline = coco_mask.frPyObjects(outline, *size_hw)
    return coco_mask.decode(outline)


@settings(max_examples=25)
@given(share=some.floats(0, 1), seed=some.integers(0, 99))
def test_ignored_objects_are_the_stated_share_and_nothing_else_changes(content, share, seed):
    before = copy.deepcopy(content)
    changed = ignore_share(content, share, seed)
    assert content == before and changed == ignore_share(content, share, seed)
    sizes_hw = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    num_objects, num_new = 0, 0
    for old, new in zip(content["annotations"], changed["annotations"], strict=True):
        num_objects += not old["iscrowd"]
        if new == old:
            continue
        num_new += 1
        assert (old["iscrowd"], new["iscrowd"]) == (0, 1) and isinstance(new["segmentation"], dict)
        kept = old.keys() - {"iscrowd", "segmentation"}
        assert all(new[name] == old[name] for name in kept)
        size_hw = sizes_hw[old["image_id"]]
        assert np.array_equal(mask_of(old, size_hw), mask_of(new, size_hw))
    assert num_new == round(share * num_objects)


def test_another_seed_ignores_other_objects(content):
    assert ignore_share(content, 0.5, 0) != ignore_share(content, 0.5, 1)


def detection(box, score=0.9, category_id=1, image_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, "segmentation": "unused"}


def truth(*annotations):
    entries = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for number, (box, crowd) in enumerate(annotations, 1)
    ]
    images = [{"id": number, "height": 97, "width": 89} for number in (1, 2)]
    return {"images": images, "annotations": entries, "categories": [{"id": 1}, {"id": 3}]}


def errors_of(ground_truth, detections):
    """COCO results, sorted into right ones and errors."""
    raw_ids = [category["id"] for category in ground_truth["categories"]]
    label_map = LabelMap(tuple(f"class {raw_id}" for raw_id in raw_ids), tuple(raw_ids))
    scores = InstanceScores(ground_truth, label_map, kinds=("box",))
    for image in ground_truth["images"]:
        own = [each for each in detections if each["image_id"] == image["id"]]
        size_hw = image["height"], image["width"]
        scores.add(image["id"], as_detections(own, label_map, size_hw, ("box",)))
    return scores.errors


A, B, CROWD = [3, 5, 20, 11], [40, 50, 13, 17], [10, 60, 23, 29]


@pytest.mark.parametrize(
    ("detections", "recall", "precision"),
    [
        ([detection(A), detection(B)], 1, 1),
        ([detection(A)], 1 / 2, 1),
        ([detection(A), detection(B, category_id=3)], 1 / 2, 1 / 2),
        ([detection(A), detection(B, image_id=2)], 1 / 2, 1 / 2),
        ([detection(A), detection(A, 0.8), detection(A, 0.7)], 1 / 2, 1 / 3),
        ([detection(A), detection(B, 0.49)], 1 / 2, 1),
        ([detection(A), detection([15, 65, 7, 7])], 1 / 2, 1),
        ([detection([15, 65, 7, 7])], 0, None),
        ([detection([3, 5, 20, 6])], 1 / 2, 1),  # IoU 6/11
        ([detection([3, 5, 20, 5])], 0, 0),  # IoU 5/11
        ([], 0, None),
    ],
)
def test_recall_and_precision_count_as_coco_does(detections, recall, precision):
    errors = errors_of(truth((A, 0), (B, 0), (CROWD, 1)), detections)
    assert recall_and_precision(errors, 0.5) == (recall, precision)


def test_recall_needs_objects_and_precision_detections():
    assert recall_and_precision(errors_of(truth((CROWD, 1)), []), 0.5) == (None, None)
    assert recall_and_precision(errors_of(truth((CROWD, 1)), [detection(A)]), 0.5) == (None, 0)


def test_perfect_detections_have_recall_and_precision_one(shapes_root):
    split = shapes.shapes_paths(shapes_root).validation
    ground_truth = CocoDataset(split.annotation_file, split.image_folder).ground_truth
    assert any(each["iscrowd"] for each in ground_truth["annotations"])
    perfect = [{**each, "score": 0.5 + each["id"] / 1000} for each in ground_truth["annotations"]]
    assert recall_and_precision(errors_of(ground_truth, perfect), 0.5) == (1, 1)
    assert recall_and_precision(errors_of(ground_truth, perfect[:-1]), 0.5)[0] < 1
    moved = [{**each, "bbox": [side + 200 for side in each["bbox"]]} for each in perfect]
    assert recall_and_precision(errors_of(ground_truth, moved), 0.5) == (0, 0)


def test_differences_are_taken_within_a_seed():
    def scores(ignored, background):
        return {"ignored": dict.fromkeys(SCORES, ignored), "background": dict.fromkeys(SCORES, background)}

    summary = summarise([scores(0.5, 0.25), scores(0.125, 0.25), scores(None, 0.75), scores(0.75, 0.25)])["recall"]
    assert summary["difference"]["all"] == [0.25, -0.125, 0.5] and (summary["more"], summary["fewer"]) == (2, 1)
    assert summary["ignored"]["all"] == [0.5, 0.125, 0.75] and summary["background"]["median"] == 0.25
    assert summarise([scores(None, 0.5)])["recall"]["difference"] is None


def figures_of(scores):
    """As `measure_ignored` gives them, {seed: {setting: {score: value}}}."""
    measured = {"pictures": 7, "objects": 13, "ignored_objects": 4, "crowds": 1, "step_time_s": {"ignored": 2.0}}
    by_seed = {seed: {**measured, "scores": each} for seed, each in scores.items()}
    summary = summarise(list(scores.values()))
    return {"command": "swin-dense", "share": 0.3, "steps": 11, "by_seed": by_seed, "summary": summary}


def test_document_shows_every_score_of_every_seed_and_setting():
    unknown = {setting: dict.fromkeys(SCORES) for setting in SETTINGS}
    lines = document(figures_of({"3": unknown, "5": unknown}), {"device": "cpu"}).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        *("", "---", *SCORES),
        *("", "---", *(f"seed {seed}, {setting}" for seed in (3, 5) for setting in SETTINGS)),
    ]
    assert sum(row.count("n/a") for row in rows) == 3 * len(SCORES) + 4 * len(SCORES)
    assert {row.count("|") for row in rows} == {len(SCORES) + 2}


def test_document_names_what_all_seeds_agree_on():
    same = dict.fromkeys(SCORES, 0.5)
    first, second = (
        {"ignored": {**same, "recall": recall, "precision": precision}, "background": same}
        for recall, precision in ((0.75, 0.25), (0.625, 0.75))
    )
    page = " ".join(document(figures_of({"0": first, "1": second}), {"device": "cpu"}).split())
    assert "Number of seeds: 2." in page and "regions are ignored: recall. Lower in each: nothing." in page
    assert "Neither: box AP, box AP50, mask AP, precision." in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0", "-1"], "--seeds must be 0 or more each, got [0, -1]"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--share", "1"], "--share must be at least 0 and below 1, got 1.0"),
        (["--share", "nan"], "--share must be at least 0 and below 1, got nan"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
    assert main(["benchmark", "ignored", *words]) == 2
    assert message in capsys.readouterr().err


def stop_training(monkeypatch, after):
    """A signal comes once so many trainings are done."""
    trained = []

    def stopped(recipe, *arguments, **options):
        if len(trained) == after:
            raise Interrupted(15)
        trained.append(recipe)
        train(recipe, *arguments, **options)

    monkeypatch.setattr("swin_dense.tools.train.train", stopped)


def test_stopped_benchmark_goes_on_with_the_runs_that_were_kept(small, tmp_path, monkeypatch, capsys):
    words = ["--seeds", "0", "--steps", "1", "--runs", str(tmp_path / "runs")]
    stop_training(monkeypatch, after=1)
    assert main(["benchmark", "ignored", *words, "--document", str(tmp_path / "page.md")]) == 143
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "page.md").exists()
    stop_training(monkeypatch, after=2)
    (model,) = tmp_path.glob("runs/*/ignored/last.safetensors")
    before = load_file(model)
    figures, _ = benchmark(tmp_path, *words)
    assert "the run goes on after step 1" in capsys.readouterr().err
    after = load_file(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(figures["by_seed"]["0"]["scores"]) == list(SETTINGS)


def test_stopped_benchmark_says_that_it_starts_again(small, tmp_path, monkeypatch, capsys):
    stop_training(monkeypatch, after=0)
    assert main(["benchmark", "ignored", "--document", str(tmp_path / "page.md")]) == 143
    assert "start again" in capsys.readouterr().err and not (tmp_path / "page.md").exists()
