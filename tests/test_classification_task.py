import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from swin_dense.conventions import IMAGENET_MEAN, IMAGENET_STD
from swin_dense.datasets.classification_dataset import ClassificationDataset, ClassifiedImages, MemoryImage
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.mixing import Mix
from swin_dense.errors import ConfigError, DataError
from swin_dense.tools import classification_task
from swin_dense.tools.classification_task import ClassificationEvaluator, as_result
from swin_dense.tools.evaluation import evaluate
from swin_dense.tools.main import main
from swin_dense.tools.predictors import load_predictor
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.tasks import task_of
from swin_dense.training.distributed import Process
from swin_dense.training.loss_terms import means
from swin_dense.training.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def make_task(classification_words):
    def make(*changes):
        name, *overrides = classification_words(*changes)
        return task_of(read_recipe(name, overrides))

    return make


def normalised(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


class Perfect:
    """Gives the true class the highest score; its name is the picture's folder."""

    def __init__(self, names):
        self.names = names

    def predict_files(self, paths, sizes_hw, workers):
        for position, path in enumerate(paths):
            yield position, np.eye(len(self.names), dtype=np.float32)[self.names.index(path.parent.name)]


def test_training_data_are_crops_of_one_size(make_task):
    task = make_task()
    data = task.training_data()
    assert len(data) == 24 and data.label_map == LabelMap(("blue", "green", "red"), (0, 1, 2))
    assert task.batch_groups(data) is None
    batch = task.collate([data[(0, 0)], data[(0, 23)]])
    assert batch.images.shape == (2, 3, 16, 16) and batch.labels.tolist() == [0, 2]
    assert batch.describe() == "images blue/0.png, red/7.png (16 x 16)"
    parts = batch.split(5)
    assert [part.ids for part in parts] == [["blue/0.png"], ["red/7.png"]]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert [part.labels.tolist() for part in parts] == [[0], [2]]
    assert sorted(batch.plain()) == ["images", "labels", "names"]


def test_loss_is_smoothed_cross_entropy_of_normalised_images(make_task):
    task = make_task()
    data = task.training_data()
    batch = task.collate([data[(0, index)] for index in (0, 9, 20)])
    model = task.build_model(3).eval()
    (loss,) = means(task.losses(model, batch, CPU)).values()
    log_shares = model(normalised(batch.images)).log_softmax(dim=1)
    true = log_shares[torch.arange(3), batch.labels]
    assert torch.allclose(loss, -(0.9 * true + 0.1 * log_shares.mean(dim=1)).mean(), rtol=1e-5)


def test_mixed_batches_have_the_shares_of_both_classes(make_task, monkeypatch):
    mix = Mix(0.7, (2, 3, 9, 14))
    asked, seen = [], []
    monkeypatch.setattr(classification_task, "draw_mix", lambda *arguments: asked.append(arguments) or mix)
    task = make_task("augmentation.mixup_alpha=0.8", "augmentation.cutmix_alpha=1.0")
    data, model = task.training_data(), task.build_model(3).eval()
    batch = task.collate([data[(0, 0)], data[(0, 20)]])
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    (loss,) = means(task.losses(model, batch, CPU)).values()
    assert asked == [((16, 16), 0.8, 1.0)]
    assert torch.allclose(seen[0], mix.images(normalised(batch.images)))
    targets = torch.tensor([[0.7, 0, 0.3], [0.3, 0, 0.7]])
    wanted = functional.cross_entropy(model(seen[0]), targets, label_smoothing=0.1)
    assert torch.allclose(loss, wanted, rtol=1e-6)


def test_training_learns_the_classes(classification_words, tmp_path, capsys):
    changes = [
        "schedule.steps=40",
        "optimizer.batch_size=12",
        "run.evaluate_every_steps=null",
        "run.log_every_steps=40",
    ]
    changes += ["schedule.decay=cosine", "optimizer.learning_rate=3e-3", "run.checkpoint_every_steps=40"]
    assert main(["train", *classification_words(*changes), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert last["val_top-1"] >= 0.8  # chance is 1/3


def test_resumed_run_equals_the_uninterrupted_one(classification_words, tmp_path, capsys):
    mixing = ["augmentation.mixup_alpha=0.8", "augmentation.cutmix_alpha=1.0", "model.backbone.drop_path_rate=0.3"]
    words = classification_words(*mixing)
    weights = []
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for number, steps in enumerate(lengths):
            options = [f"schedule.steps={steps}", "--out", str(tmp_path / name)]
            assert main(["train", *words, *options, "--device", "cpu", *(["--resume"] if number else [])]) == 0
        weights.append(load_file(tmp_path / name / "last.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_perfect_prediction_scores_one(make_task, tmp_path):
    task = make_task()
    validation = task.validation_data(task.training_data().label_map)
    perfect = Perfect(validation.dataset.label_map.names)
    scores = evaluate(perfect, validation, Process(0, 0, 1, CPU), predictions=tmp_path / "p.json")
    assert task.table(scores) == {"top-1": 1.0} and scores["absent"] == []
    assert (tmp_path / "p.json").is_file()


def test_shares_of_processes_merge_to_the_whole(tmp_path):
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 6, 13), generator.random((13, 6), np.float32)
    names = LabelMap(tuple("abcdef"), tuple(range(6)))
    pictures = [MemoryImage(f"p{index}", np.zeros((2, 2, 3), np.uint8)) for index in range(13)]
    dataset = ClassificationDataset(ClassifiedImages(pictures, labels, names))
    files = [tmp_path / "whole.json", tmp_path / "parts.json"]
    whole, *parts = (ClassificationEvaluator(dataset, file) for file in (files[0], files[1], files[1]))
    for index, row in enumerate(scores):
        whole.add(index, row)
        parts[index % 2].add(index, row)
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].finish() == whole.finish()
    assert files[0].read_text() == files[1].read_text()


def test_result_names_the_classes_by_falling_score():
    result = as_result("x.png", np.array([0.25, 0.5, 0.25], np.float32), LabelMap(("a", "b", "c"), (0, 1, 2)))
    assert result == {"file_name": "x.png", "category": "b", "score": 0.5, "scores": {"b": 0.5, "a": 0.25, "c": 0.25}}
    assert list(result["scores"]) == ["b", "a", "c"]
    many = LabelMap(tuple(f"c{index}" for index in range(30)), tuple(range(30)))
    assert list(as_result("x.png", np.linspace(0, 1, 30), many)["scores"]) == [
        f"c{index}" for index in range(29, 19, -1)
    ]


def test_classes_must_be_those_of_the_model_and_of_both_splits(make_task, class_folders, tmp_path):
    copy = shutil.copytree(class_folders, tmp_path / "copy")
    (copy / "val" / "red").rename(copy / "val" / "crimson")
    task = make_task(f"data={copy}")
    with pytest.raises(DataError, match=r"the validation data: its classes differ .*2 red; got 3: 0 blue, 1 crimson"):
        task.validation_data(task.training_data().label_map)


def test_own_folders_replace_the_usual_places(make_task, class_folders):
    task = make_task("dataset.train_images=val", f"dataset.val_images={class_folders / 'train'}")
    data = task.training_data()
    assert len(data) == 9 and len(task.validation_data(data.label_map).paths) == 24


def test_cifar10_is_asked_for_by_its_files(make_task):
    with pytest.raises(DataError, match=r"wanted CIFAR-10, .* Get the python version at"):
        make_task("dataset.format=cifar10").training_data()


def test_pictures_without_files_are_trained_on_and_scored(classification_words, monkeypatch, tmp_path, capsys):
    generator = np.random.default_rng(0)
    pictures = [MemoryImage(f"p{index}", generator.integers(0, 256, (16, 16, 3), np.uint8)) for index in range(5)]
    images = ClassifiedImages(pictures, np.array([0, 1, 0, 1, 1]), LabelMap(("a", "b"), (0, 1)))
    monkeypatch.setattr(classification_task, "read_cifar10", lambda root, split: images)
    words = classification_words("dataset.format=cifar10", "schedule.steps=1", "augmentation.padding=4")
    assert main(["train", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert {path.name for path in (tmp_path / "run" / "pictures").glob("*.png")} == {"00000_p0.png", "00004_p4.png"}
    model, out = str(tmp_path / "run" / "best.safetensors"), tmp_path / "p.json"
    assert main(["evaluate", model, "--predictions", str(out), "--device", "cpu"]) == 0
    found = json.loads(out.read_text())["classifications"]
    assert [result["file_name"] for result in found] == [f"p{index}" for index in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.head.dropout=0.1", r"model\.head: a classifier has no settings there, got dropout"),
        ("model.variant=swin_tt", "did you mean 'swin_t'"),
        ("model.backbone.depth=[1]", "did you mean 'depths'"),
    ],
)
def test_wrong_models_are_explained(make_task, change, message):
    with pytest.raises(ConfigError, match=message):
        make_task(change).build_model(3)


def test_picture_marks_the_true_class(make_task, classification_run):
    predictor = load_predictor(classification_run.last_model)
    validation = make_task().validation_data(predictor.label_map)
    image = validation.dataset.raw(0)
    prediction = predictor(image)
    picture = validation.picture(0, predictor, prediction)
    assert picture.shape == predictor.picture(image, prediction).shape
    assert not np.array_equal(picture, predictor.picture(image, prediction))


def test_run_folder_holds_scores_and_pictures(classification_run):
    names = {path.name for path in classification_run.folder.iterdir()}
    assert {"best.safetensors", "last.safetensors", "scores.json", "metrics.csv", "curves.png", "recipe.yaml"} < names
    assert [path.name for path in sorted((classification_run.folder / "pictures").glob("*.png"))] == [
        "00000_0.png",
        "00008_2.png",
    ]
