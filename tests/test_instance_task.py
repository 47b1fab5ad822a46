import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from swin_dense.box_masks import BoxMasks
from swin_dense.config import SwinConfig
from swin_dense.datasets.coco import CocoDataset
from swin_dense.datasets.transforms import instance_inference
from swin_dense.errors import AnnotationError, ConfigError, DataError
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import mask_rcnn
from swin_dense.tools.evaluation import evaluate
from swin_dense.tools.instance_task import InstanceBatch
from swin_dense.tools.predictors import InstancePrediction
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.tasks import task_of
from swin_dense.training.atomic_file import write_checked
from swin_dense.training.distributed import Process
from swin_dense.training.loss_terms import means
from swin_dense.training.micro_batches import add_gradient, add_gradient_in_parts

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def task(tiny_words):
    name, *overrides = tiny_words("instance")
    return task_of(read_recipe(name, overrides))


class Perfect:
    """Predicts what is annotated."""

    def __init__(self, dataset):
        self.dataset = dataset

    def predict_files(self, paths, sizes_hw, workers):
        from pycocotools import mask as coco_mask

        indices = [[self.dataset.image_path(index) for index in range(len(self.dataset))].index(path) for path in paths]
        for position, index in enumerate(indices):
            _, instances = self.dataset.raw(index)
            instances, box_masks = instances.select(np.flatnonzero(~instances.is_crowd)).with_masks()
            codes = [coco_mask.encode(np.asfortranarray(mask)) for mask in box_masks.full().numpy()]
            masks = [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]
            scores = np.full(len(instances), 0.9, np.float32)
            yield position, InstancePrediction(instances.boxes_xyxy, instances.labels, scores, masks)


def test_training_data_is_augmented_and_reproducible(task):
    data = task.training_data()
    assert len(data) == 6 and len(data.label_map) == 6
    sample = data[(0, 1)]
    assert sample.image.dtype == torch.uint8 and min(sample.image.shape[1:]) == 64
    assert torch.equal(sample.image, data[(0, 1)].image)


def test_groups_part_wide_from_tall(task):
    data = task.training_data()
    groups = task.batch_groups(data)
    assert [group == 1 for group in groups] == [width > height for height, width in data.sizes_hw.tolist()]


def test_jittered_and_pasted_images_are_squares_to_train_on(tiny_words):
    pasting = ("augmentation.jitter_size=96", "augmentation.copy_paste_probability=1")
    name, *overrides = tiny_words("instance", *pasting)
    task = task_of(read_recipe(name, overrides))
    data = task.training_data()
    samples = [data[(0, index)] for index in range(4)]
    assert all(sample.image.shape == (3, 96, 96) for sample in samples) and task.batch_groups(data) is None
    name, *overrides = tiny_words("instance", pasting[0])
    plain = task_of(read_recipe(name, overrides)).training_data()
    assert not all(torch.equal(sample.image, plain[(0, index)].image) for index, sample in enumerate(samples))
    torch.manual_seed(0)
    losses = means(task.losses(task.build_model(6).train(), task.collate(samples[:2]), CPU))
    assert all(loss.isfinite() for loss in losses.values())


def test_wrong_jitter_is_refused(tiny_words):
    for override, message in (
        ("augmentation.jitter_size=0", "jitter_size must be whole numbers of pixels"),
        ("augmentation.jitter_range=[2, 1]", r"jitter_range must be \(least, most\), both positive"),
    ):
        name, *overrides = tiny_words("instance", "augmentation.jitter_size=96", override)
        with pytest.raises(ConfigError, match=message):
            task_of(read_recipe(name, overrides)).training_data()


def test_batch_gives_every_loss_and_describes_itself(task):
    data = task.training_data()
    batch = task.collate([data[(0, 0)], data[(0, 3)]])
    sizes = [f"{image.shape[1]} x {image.shape[2]}" for image in batch.images]
    assert batch.ids == [data.image_ids[0], data.image_ids[3]]
    assert batch.describe() == f"images {batch.ids[0]} ({sizes[0]}), {batch.ids[1]} ({sizes[1]})"
    torch.manual_seed(0)
    losses = means(task.losses(task.build_model(6).train(), batch, CPU))
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())


def test_batch_splits_into_parts_that_are_padded_as_the_whole(task):
    data = task.training_data()
    batch = task.collate([data[(0, index)] for index in range(5)])
    largest_hw = tuple(max(image.shape[axis] for image in batch.images) for axis in (1, 2))
    parts = batch.split(2)
    assert [len(part.ids) for part in parts] == [2, 3]
    assert {piece.least_size_hw for part in parts for piece in (part, *part.split(9))} == {largest_hw}
    assert [piece.ids for part in parts for piece in part.split(9)] == [[image_id] for image_id in batch.ids]
    assert [image for part in parts for image in part.images] == batch.images
    assert [target for part in parts for target in part.targets] == batch.targets


def test_batch_can_be_saved_and_read_back(task, tmp_path):
    data = task.training_data()
    batch = task.collate([data[(0, 0)], data[(0, 3)]])
    write_checked(tmp_path / "batch.pt", batch.plain())
    read = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert read["image_ids"] == batch.image_ids and torch.equal(read["images"][1], batch.images[1])
    masks = BoxMasks(**read["targets"][1]["masks"])
    assert torch.equal(masks.full(), batch.targets[1]["masks"].full())


def detector_without_chance(build, **changes):
    """In float64; nothing is sampled or dropped, and BatchNorm takes its running statistics."""
    size = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
    config = SwinConfig(**size, drop_path_rate=0.0, checkpoint_stages=(1,))
    widths = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8, "samples_per_image": 10**6}
    torch.manual_seed(0)
    model = build(config, 3, **widths, **changes).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    return model


def batch_of_unequal_images():
    generator = torch.Generator().manual_seed(1)
    sizes_hw, counts = [(64, 41), (37, 90), (53, 67)], [7, 0, 1]
    images, targets = [], []
    for (height, width), count in zip(sizes_hw, counts, strict=True):
        images.append(torch.rand(3, height, width, generator=generator, dtype=torch.float64))
        corners = torch.rand(count, 2, generator=generator) * 15
        boxes = torch.cat([corners, corners + 6 + torch.rand(count, 2, generator=generator) * 15], dim=1)
        masks = torch.ones(count, height, width, dtype=torch.uint8)
        targets.append({"boxes": boxes.double(), "labels": torch.arange(count) % 3, "masks": masks})
    return InstanceBatch(images, targets, [11, 22, 33])


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    ("build", "changes", "tolerance"),
    [
        (mask_rcnn, {}, 1e-12),
        (mask_rcnn, {"style": "torchvision"}, 1e-6),  # computes its objectness loss in float32
        (cascade_mask_rcnn, {}, 1e-12),
    ],
)
def test_parts_of_a_batch_add_up_to_its_gradient(build, changes, tolerance, parts):
    model, batch = detector_without_chance(build, **changes), batch_of_unequal_images()

    def forward(part):
        return model.loss_terms(part.images, part.targets, part.least_size_hw)

    whole = add_gradient(forward, batch, 2)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    in_parts = add_gradient_in_parts(forward, batch.split(parts), 2, lambda: None)
    assert list(in_parts) == list(whole)
    for name, loss in whole.items():
        assert float(in_parts[name]) == pytest.approx(float(loss), abs=tolerance), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=tolerance)
    assert gradients["backbone.patch_embed.proj.weight"].abs().max() > 1e-4


def test_a_cascade_trains_where_the_recipe_names_it(tiny_words):
    name, *overrides = tiny_words("instance", "model.detector=cascade_mask_rcnn", "model.head.shared_regression=true")
    task = task_of(read_recipe(name, overrides))
    data = task.training_data()
    torch.manual_seed(0)
    model = task.build_model(len(data.label_map)).train()
    assert model.architecture["head"] == "cascade_mask_rcnn" and model.architecture["shared_regression"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        losses = means(task.losses(model, task.collate([data[(0, 2 * step)], data[(0, 2 * step + 1)]]), CPU))
        assert len(losses) == 2 + 3 * 3 and all(loss.isfinite() for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()


def test_a_setting_of_the_cascade_is_refused_for_another_detector(tiny_words):
    name, *overrides = tiny_words("instance", "model.head.shared_regression=true")
    with pytest.raises(ConfigError, match=r"unknown key 'model\.head\.shared_regression'"):
        task_of(read_recipe(name, overrides)).build_model(6)


def test_perfect_prediction_scores_one(task, tmp_path):
    validation = task.validation_data(task.training_data().label_map)
    out = tmp_path / "new" / "results.json"
    scores = evaluate(Perfect(validation.dataset), validation, Process(0, 0, 1, CPU), predictions=out)
    table = task.table(scores)
    # A class without ground truth takes no part; with one object a precision of 1 is not reached only by rounding.
    assert all(value is None or math.isclose(value, 1.0) for value in table.values())
    assert table[task.main_score] == pytest.approx(1.0)
    results = json.loads(out.read_text())
    assert {result["category_id"] for result in results} <= set(validation.dataset.label_map.raw_ids)
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_shares_of_processes_merge_to_the_whole(task):
    validation = task.validation_data(task.training_data().label_map)
    predictions = dict(Perfect(validation.dataset).predict_files(validation.paths, validation.sizes_hw, 0))
    whole = validation.evaluator()
    parts = [validation.evaluator(), validation.evaluator()]
    for index, prediction in predictions.items():
        whole.add(index, prediction)
        parts[index % 2].add(index, prediction)
    travelled = pickle.loads(pickle.dumps(parts[1]))
    parts[0].merge(travelled)
    assert parts[0].finish() == whole.finish()


def test_picture_puts_truth_beside_prediction(task, instance_run):
    from swin_dense.tools.predictors import load_predictor

    predictor = load_predictor(instance_run.last_model, overrides=["inference.drawn_score=0"])
    validation = task.validation_data(predictor.label_map)
    for index in range(2):
        image, _ = validation.dataset.raw(index)
        picture = validation.picture(index, predictor, predictor(image))
        assert picture.dtype == np.uint8 and picture.ndim == 3
        assert picture.shape[0] >= image.shape[0] and picture.shape[1] >= 2 * image.shape[1]


def test_validation_targets_are_those_of_resized_samples(task):
    validation = task.validation_data(task.training_data().label_map)
    annotations, images = task._files("val")
    samples = CocoDataset(annotations, images, instance_inference(97, 131))
    for index in range(len(samples)):
        wanted = samples[index]
        found = validation.target(index, tuple(wanted.image.shape[1:]))
        assert found.keys() == wanted.target.keys()
        assert torch.equal(found["masks"].full(), wanted.target["masks"].full())
        assert all(torch.equal(found[name], wanted.target[name]) for name in ("boxes", "labels", "iscrowd"))


def test_own_files_replace_the_usual_places(coco_tree, tiny_words):
    name, *overrides = tiny_words("instance", f"data={coco_tree.image_folder.parent}")
    for split in ("train", "val"):
        overrides += [
            f"dataset.{split}_annotations=annotations/instances_val2017.json",
            f"dataset.{split}_images=val2017",
        ]
    task = task_of(read_recipe(name, overrides))
    data = task.training_data()
    assert data.label_map.names == ("dog", "cat", "cup")
    assert len(data) == 2  # the others hold no object, or a crowd only
    assert len(task.validation_data(data.label_map).paths) == 4


def test_other_classes_in_the_validation_set_are_refused(coco_tree, task, tiny_words):
    name, *overrides = tiny_words("instance", f"data={coco_tree.image_folder.parent}")
    other = task_of(read_recipe(name, overrides))
    with pytest.raises(DataError, match="classes differ from the expected ones"):
        other.validation_data(task.training_data().label_map)


def test_faulty_annotations_are_refused(coco_tree, tiny_words):
    coco_tree.content["annotations"][0]["image_id"] = 999
    coco_tree.write()
    name, *overrides = tiny_words("instance", f"data={coco_tree.image_folder.parent}")
    with pytest.raises(AnnotationError, match="999"):
        task_of(read_recipe(name, overrides)).validation_data(None)
