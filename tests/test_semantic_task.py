import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from swin_dense.config import SwinConfig
from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.ade20k import ADE20K_LABELS
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError, DataError
from swin_dense.heads.upernet import upernet
from swin_dense.tools.evaluation import evaluate
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.semantic_task import SemanticBatch, write_label
from swin_dense.tools.tasks import task_of
from swin_dense.training.atomic_file import write_checked
from swin_dense.training.distributed import Process
from swin_dense.training.loss_terms import means
from swin_dense.training.micro_batches import add_gradient, add_gradient_in_parts

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def make_task(tiny_words):
    def make(*changes):
        name, *overrides = tiny_words("semantic", *changes)
        return task_of(read_recipe(name, overrides))

    return make


class Perfect:
    """Predicts what is labelled, class 0 where nothing is."""

    def __init__(self, dataset):
        self.dataset = dataset

    def predict_files(self, paths, sizes_hw, workers):
        for position, path in enumerate(paths):
            label = self.dataset.label(self.dataset.names.index(path.stem))
            yield position, np.where(label == 255, 0, label).astype(np.uint8)


def test_training_data_are_crops_of_one_size(make_task):
    task = make_task()
    data = task.training_data()
    assert len(data) == 6 and len(data.label_map) == 10
    assert task.batch_groups(data) is None
    batch = task.collate([data[(0, 0)], data[(0, 3)]])
    assert batch.images.shape == (2, 3, 64, 64) and batch.labels.shape == (2, 64, 64)
    assert batch.ids == [data.names[0], data.names[3]]
    assert batch.describe() == f"images {data.names[0]}, {data.names[3]} (64 x 64)"
    torch.manual_seed(0)
    losses = means(task.losses(task.build_model(10).train(), batch, CPU))
    assert set(losses) == {"loss_segmentation", "loss_auxiliary"}
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())


def test_batch_splits_and_can_be_saved(make_task, tmp_path):
    task = make_task()
    data = task.training_data()
    batch = task.collate([data[(0, index)] for index in range(3)])
    parts = batch.split(2)
    assert [part.ids for part in parts] == [batch.ids[:1], batch.ids[1:]]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    write_checked(tmp_path / "batch.pt", batch.plain())
    read = SemanticBatch(**torch.load(tmp_path / "batch.pt", weights_only=True))
    assert read.names == batch.names and torch.equal(read.images, batch.images)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_add_up_to_its_gradient(parts):
    config = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0)
    torch.manual_seed(0)
    model = upernet(config, 5, channels=8, auxiliary_channels=8, dropout=0.0).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    labels = torch.randint(5, (3, 41, 37))
    labels[0, :30] = labels[1] = IGNORED_LABEL
    batch = SemanticBatch(torch.rand(3, 3, 41, 37, dtype=torch.float64), labels, ["a", "b", "c"])

    def forward(part):
        return model.loss_terms(part.images, part.labels)

    whole = add_gradient(forward, batch, 3)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    in_parts = add_gradient_in_parts(forward, batch.split(parts), 3, lambda: None)
    assert {name: float(loss) for name, loss in in_parts.items()} == pytest.approx(
        {name: float(loss) for name, loss in whole.items()}, abs=1e-12
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-12)


def test_classes_from_a_file_a_list_and_a_preset(make_task):
    names = make_task().label_map().names
    listed = make_task(f"dataset.classes=[{', '.join(names)}]")
    assert listed.label_map() == make_task().label_map()
    assert listed.label_map().raw_ids == tuple(range(1, 11)) and listed.label_map().ignored_values == (0,)
    assert make_task("dataset.classes=ade20k").label_map() is ADE20K_LABELS
    assert make_task("dataset.classes=[a, b]", "dataset.first_value=5").label_map().raw_ids == (5, 6)
    counted = make_task("dataset.classes=2", "dataset.first_value=5", "dataset.ignored_values=[7]").label_map()
    assert (counted.names, counted.raw_ids, counted.ignored_values) == (("class 0", "class 1"), (5, 6), (7,))


def test_values_of_ade20k_cannot_be_changed(make_task):
    with pytest.raises(ConfigError, match="classes ade20k: the values 1 to 150 are its classes"):
        make_task("dataset.classes=ade20k", "dataset.ignored_values=[11]").label_map()


def test_missing_classes_say_what_to_set(make_task):
    with pytest.raises(ConfigError, match=r"set dataset\.classes to ade20k, to a text file"):
        make_task("dataset.classes=null").training_data()
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        make_task("dataset.classes=nowhere.txt").training_data()
    with pytest.raises(ConfigError, match="stands for two classes"):
        make_task("dataset.classes=[a, a]").training_data()


def test_value_out_of_range_names_file_and_value(make_task):
    data = make_task("dataset.classes=[a, b, c]").training_data()
    with pytest.raises(DataError, match=r"shapes_\d+\.png.*value"):
        for index in range(len(data)):
            data[(0, index)]


def test_perfect_prediction_scores_one_and_is_saved_in_the_files_values(make_task, tmp_path):
    task = make_task()
    validation = task.validation_data(task.label_map())
    scores = evaluate(Perfect(validation.dataset), validation, Process(0, 0, 1, CPU), predictions=tmp_path / "new")
    assert task.table(scores) == dict.fromkeys(("mIoU", "mAcc", "aAcc", "image_mIoU", "boundary_mIoU"), 1.0)
    assert scores["worst_images"] == [] and not scores["explanations"]
    for index, name in enumerate(validation.dataset.names):
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            saved = np.asarray(image)
        with Image.open(validation.dataset.paths(index)[1]) as image:
            given = np.asarray(image)
        assert np.array_equal(saved[given != 0], given[given != 0])


def test_shares_of_processes_merge_to_the_whole(make_task):
    task = make_task()
    validation = task.validation_data(task.label_map())
    whole, parts = validation.evaluator(), [validation.evaluator(), validation.evaluator()]
    generator = np.random.default_rng(0)
    for index in range(len(validation.paths)):
        prediction = generator.integers(0, 10, validation.dataset.label(index).shape, dtype=np.uint8)
        whole.add(index, prediction)
        parts[index % 2].add(index, prediction)
    parts[0].merge(parts[1])
    assert parts[0].finish() == whole.finish()


def test_values_to_ignore_are_the_data_sets_own(make_task):
    task = make_task()
    names = task.label_map().names
    changed = make_task("dataset.ignored_values=[0, 77]")
    validation = changed.validation_data(task.label_map())
    assert validation.dataset.label_map.ignored_values == (0, 77)
    with pytest.raises(DataError, match=r"the recipe's dataset\.classes: its classes differ"):
        make_task(f"dataset.classes=[{', '.join(reversed(names))}]").validation_data(task.label_map())


def test_own_folders_replace_the_usual_places(semantic_tree, make_task):
    changes = [f"data={semantic_tree.root}", "dataset.classes=[a, b, c, d, e]", "dataset.first_value=0"]
    changes += ["dataset.ignored_values=[]"]
    for split in ("train", "val"):
        changes += [f"dataset.{split}_images=images/training", f"dataset.{split}_annotations=annotations/training"]
    task = make_task(*changes)
    assert len(task.training_data()) == 4
    validation = task.validation_data(task.label_map())
    assert [path.name for path in validation.paths] == [f"scene_{number}.png" for number in range(4)]
    assert validation.sizes_hw == [validation.dataset.label(index).shape for index in range(4)]


def test_validation_targets_are_label_maps_of_the_size_of_the_image(make_task):
    task = make_task()
    validation = task.validation_data(task.label_map())
    label = validation.dataset.label(1)
    found = validation.target(1, (37, 53))
    assert found.dtype == torch.uint8 and found.shape == (37, 53) and set(found.unique().tolist()) <= set(label.flat)
    assert np.array_equal(validation.target(1, label.shape).numpy(), label)


def test_picture_puts_truth_beside_prediction(make_task, semantic_run):
    from swin_dense.tools.predictors import load_predictor

    task = make_task()
    predictor = load_predictor(semantic_run.last_model)
    validation = task.validation_data(predictor.label_map)
    image, _ = validation.dataset.raw(0)
    picture = validation.picture(0, predictor, predictor(image))
    assert picture.dtype == np.uint8 and picture.shape[1] >= 2 * image.shape[1]


@pytest.mark.parametrize(("raw_ids", "mode"), [((3, 255), "L"), ((3, 256), "I;16")])
def test_write_label_has_room_for_every_value(raw_ids, mode, tmp_path):
    prediction = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    write_label(tmp_path / "x.png", prediction, LabelMap(("a", "b"), raw_ids))
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), np.array(raw_ids)[prediction])
