import re

import pytest
import torch

from swin_dense.tools.classification_task import LABEL_SMOOTHING
from swin_dense.tools.recipe import RECIPE_FOLDER, Recipe, find_recipe, read_recipe, recipe_names
from swin_dense.tools.tasks import task_of
from swin_dense.tools.training_run import build_schedule, split_batch
from swin_dense.training.optimizer import build_optimizer

# Millions of parameters, counted from the official code with 80 (COCO) and 150 (ADE20K) classes, and published scores.
PUBLISHED = {
    "mask_rcnn_swin_t_1x": (47.80, {"box AP": 43.7, "mask AP": 39.8}),
    "mask_rcnn_swin_t_3x": (47.80, {"box AP": 46.0, "mask AP": 41.6}),
    "mask_rcnn_swin_s_3x": (69.12, {"box AP": 48.5, "mask AP": 43.3}),
    "cascade_mask_rcnn_swin_t_1x": (85.64, {"box AP": 48.1, "mask AP": 41.7}),
    "cascade_mask_rcnn_swin_t_3x": (85.64, {"box AP": 50.4, "mask AP": 43.7}),
    "cascade_mask_rcnn_swin_s_3x": (106.96, {"box AP": 51.9, "mask AP": 45.0}),
    "cascade_mask_rcnn_swin_b_3x": (144.99, {"box AP": 51.9, "mask AP": 45.0}),
    "upernet_swin_t_160k": (59.94, {"mIoU": 44.51}),
    "upernet_swin_s_160k": (81.26, {"mIoU": 47.64}),
    "upernet_swin_b_160k": (121.28, {"mIoU": 48.13}),
    "classifier_swin_t_imagenet": (28.29, {"top-1": 81.2}),
}


# Nobody has published a score for these, so they quote none.
OURS = ("shapes_instance", "shapes_semantic", "classifier_cifar10", "mask_rcnn_swin_t_lsj")

# Of the official configurations.
DROP_PATH = {
    "mask_rcnn_swin_t_1x": 0.1,
    "mask_rcnn_swin_t_3x": 0.2,
    "mask_rcnn_swin_s_3x": 0.2,
    "cascade_mask_rcnn_swin_t_1x": 0.0,
    "cascade_mask_rcnn_swin_t_3x": 0.2,
    "cascade_mask_rcnn_swin_s_3x": 0.2,
    "cascade_mask_rcnn_swin_b_3x": 0.3,
}


def build(recipe):
    with torch.device("meta"):
        return task_of(recipe).build_model({"instance": 80, "semantic": 150, "classification": 1000}[recipe.task])


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_round_trips_and_builds_its_model(name):
    recipe = read_recipe(name)
    assert Recipe(**vars(recipe)) == recipe
    assert recipe.data is None
    model = build(recipe)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_builds_its_schedule_and_transforms(name):
    recipe = read_recipe(name)
    task = task_of(recipe)
    optimizer = build_optimizer(
        torch.nn.Linear(2, 2),
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
    )
    assert build_schedule(optimizer, recipe.schedule, 7330, recipe.schedule.steps or 7330 * recipe.schedule.epochs)
    assert split_batch(recipe, 1) == (recipe.optimizer.batch_size, 1)
    assert task.main_score in ("mask AP", "mIoU", "top-1")


def test_every_published_recipe_is_known_here():
    assert set(recipe_names()) == {*PUBLISHED, *OURS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_has_the_published_size(name):
    millions, _ = PUBLISHED[name]
    count = sum(parameter.numel() for parameter in build(read_recipe(name)).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_quotes_the_published_scores(name):
    head, data, schedule = name.split("_")[0], "COCO val2017", name.rsplit("_", 1)[1]
    if head == "upernet":
        data = "ADE20K val"
    if head == "classifier":
        data, schedule = "ImageNet-1K val", "300 epochs"
    comment = " ".join(
        line.removeprefix("#").strip() for line in find_recipe(name).read_text().splitlines() if line.startswith("#")
    )
    quoted = {score: float(value) for score, value in re.findall(r"(box AP|mask AP|mIoU|top-1) (\d+\.\d+)", comment)}
    assert quoted == PUBLISHED[name][1]
    assert data in comment and schedule in comment
    variant = re.search(r"Swin-([TSB])", comment)
    assert variant is not None and f"swin_{variant[1].lower()}" == read_recipe(name).model.variant


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "mask_rcnn" in name])
def test_published_detection_settings(name):
    recipe = read_recipe(name)
    epochs, milestones = (12, (8, 11)) if name.endswith("1x") else (36, (27, 33))
    assert (recipe.schedule.epochs, recipe.schedule.milestones) == (epochs, milestones)
    assert (recipe.schedule.warmup_steps, recipe.schedule.warmup_start) == (500, 0.001)
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.batch_size) == (1e-4, 0.05, 16)
    assert optimizer.max_gradient_norm is None
    augmentation = recipe.augmentation
    assert augmentation.short_edges == tuple(range(480, 801, 32)) and augmentation.max_long_edge == 1333
    assert augmentation.crop_branch and augmentation.flip_probability == 0.5
    assert (recipe.inference.short_edge, recipe.inference.max_long_edge) == (800, 1333)
    assert recipe.model.backbone == {"drop_path_rate": DROP_PATH[name]}
    assert recipe.model.detector == name.partition("_swin")[0]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("upernet")])
def test_published_segmentation_settings(name):
    recipe = read_recipe(name)
    schedule = recipe.schedule
    assert (schedule.steps, schedule.decay, schedule.power, schedule.minimum_factor) == (160_000, "poly", 1.0, 0.0)
    assert (schedule.warmup_steps, schedule.warmup_start) == (1500, 1e-6)
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.batch_size) == (6e-5, 0.01, 16)
    assert recipe.augmentation.crop_size_hw == (512, 512) and recipe.augmentation.ratio_range == (0.5, 2.0)
    assert recipe.augmentation.photometric and recipe.augmentation.max_category_ratio == 0.75
    assert recipe.inference.scale == recipe.augmentation.scale == (2048, 512)
    assert recipe.model.backbone == {"drop_path_rate": 0.3}
    assert recipe.dataset.classes == "ade20k"


def test_published_classification_settings():
    recipe = read_recipe("classifier_swin_t_imagenet")
    schedule, optimizer, augmentation = recipe.schedule, recipe.optimizer, recipe.augmentation
    assert (schedule.epochs, schedule.decay, schedule.minimum_factor, schedule.warmup_start) == (
        300,
        "cosine",
        0.01,
        0.001,
    )
    assert schedule.warmup_steps == 20 * -(-1_281_167 // 1024)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.batch_size) == (1e-3, 0.05, 1024)
    assert optimizer.max_gradient_norm == 5.0
    assert (augmentation.mixup_alpha, augmentation.cutmix_alpha) == (0.8, 1.0)
    assert augmentation.area_range == (0.08, 1.0) and augmentation.aspect_range == pytest.approx((3 / 4, 4 / 3))
    assert augmentation.crop_size_hw == recipe.inference.crop_size_hw == (224, 224)
    assert recipe.model.backbone == {"drop_path_rate": 0.2} and LABEL_SMOOTHING == 0.1


@pytest.mark.parametrize("name", OURS)
def test_recipes_of_ours_quote_no_score(name):
    assert not re.search(r"(AP|mIoU|top-1) \d", find_recipe(name).read_text())


def test_large_scale_jitter_has_the_published_numbers():
    augmentation = read_recipe("mask_rcnn_swin_t_lsj").augmentation
    assert (augmentation.jitter_size, augmentation.jitter_range) == (1024, (0.1, 2.0))
    assert augmentation.flip_probability == 0.5 and augmentation.copy_paste_probability == 0.0
    inference = read_recipe("mask_rcnn_swin_t_lsj").inference
    assert (inference.short_edge, inference.max_long_edge) == (1024, 1024)


def test_every_file_of_the_folder_is_a_recipe():
    assert {path.suffix for path in RECIPE_FOLDER.iterdir()} == {".yaml"}
