import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from swin_dense.heads.losses import LABEL_SMOOTHING
from swin_dense.tools.recipe import RECIPE_FOLDER, Recipe, find_recipe, read_recipe, recipe_names
from swin_dense.tools.step_settings import build_schedule, split_batch
from swin_dense.tools.tasks import task_of
from swin_dense.training.optimizer import build_optimizer
from swin_dense.weights.published import find_published

# Millions of parameters, counted from the official code with 80 (COCO) and 150 (ADE20K) classes, and published scores.
# A window of 12 adds (23² - 13²) rows to each head's position biases.
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
    "upernet_swin_b_22k_160k": (121.28, {"mIoU": 50.13}),
    "upernet_swin_b_w12_160k": (121.42, {"mIoU": 48.35}),
    "upernet_swin_b_w12_22k_160k": (121.42, {"mIoU": 50.76}),
    "upernet_swin_l_22k_160k": (233.76, {"mIoU": 51.17}),
    "upernet_swin_l_w12_22k_160k": (233.96, {"mIoU": 52.25}),
    "upernet_swin_b_22k_640_160k": (121.28, {"mIoU": 50.04}),
    "upernet_swin_l_22k_640_160k": (233.76, {"mIoU": 52.05}),
    "classifier_swin_t_imagenet": (28.29, {"top-1": 81.2}),
}

# No dense model with a Swin V2 of these sizes is published: the recipes, and those of Swin whose numbers they take.
V2 = {
    "mask_rcnn_swin_v2_t_3x": "mask_rcnn_swin_t_3x",
    "mask_rcnn_swin_v2_s_3x": "mask_rcnn_swin_s_3x",
    "cascade_mask_rcnn_swin_v2_t_3x": "cascade_mask_rcnn_swin_t_3x",
    "cascade_mask_rcnn_swin_v2_s_3x": "cascade_mask_rcnn_swin_s_3x",
    "cascade_mask_rcnn_swin_v2_b_3x": "cascade_mask_rcnn_swin_b_3x",
    "upernet_swin_v2_t_160k": "upernet_swin_t_160k",
    "upernet_swin_v2_s_160k": "upernet_swin_s_160k",
    "upernet_swin_v2_b_160k": "upernet_swin_b_160k",
    "upernet_swin_v2_l_22k_160k": "upernet_swin_l_22k_160k",
}
LSJ = (
    "mask_rcnn_swin_t_lsj",
    "mask_rcnn_swin_t_lsj_100ep",
    "cascade_mask_rcnn_swin_b_22k_lsj",
    "cascade_mask_rcnn_swin_l_22k_lsj",
)
# Nobody has published a score for these, so they quote none.
OURS = ("shapes_instance", "shapes_semantic", "classifier_cifar10", "upernet_swin_t_ema_160k", *LSJ, *V2)

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


@cache
def build(name):
    recipe = read_recipe(name)
    with torch.device("meta"):
        return task_of(recipe).build_model({"instance": 80, "semantic": 150, "classification": 1000}[recipe.task])


def comment_of(name):
    lines = find_recipe(name).read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def length_of(recipe):
    """In the unit of the milestones, and in steps."""
    images = {"instance": 118_287, "classification": 1_281_167}.get(recipe.task, 0)
    schedule, epoch = recipe.schedule, images // recipe.optimizer.batch_size
    return (schedule.epochs, schedule.epochs * epoch) if schedule.epochs else (schedule.steps, schedule.steps)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_round_trips_and_builds_its_model(name):
    recipe = read_recipe(name)
    assert Recipe(**vars(recipe)) == recipe
    assert recipe.data is None
    model = build(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_builds_its_schedule_and_transforms(name):
    recipe = read_recipe(name)
    task = task_of(recipe)
    settings = recipe.optimizer
    optimizer = build_optimizer(
        build(name),
        learning_rate=settings.scaled_learning_rate(),
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    assert optimizer.param_groups[0]["lr"] == settings.learning_rate
    assert build_schedule(optimizer, recipe.schedule, 7330, recipe.schedule.steps or 7330 * recipe.schedule.epochs)
    assert split_batch(recipe, 1) == (recipe.optimizer.batch_size, 1)
    assert task.main_score in ("mask AP", "mIoU", "top-1")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_warms_up_and_drops_within_its_length(name):
    schedule = read_recipe(name).schedule
    length, steps = length_of(read_recipe(name))
    assert schedule.warmup_steps <= 0.12 * steps
    assert (schedule.milestones != ()) == (schedule.decay == "step")
    assert list(schedule.milestones) == sorted(set(schedule.milestones))
    assert max(schedule.milestones, default=0) < length


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_states_its_learning_rate_for_its_own_batch(name):
    optimizer = read_recipe(name).optimizer
    wanted = (None,) if name.startswith("shapes") or name == "classifier_cifar10" else (optimizer.batch_size,)
    assert optimizer.reference_batch_size in wanted


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("mask", "cascade", "upernet"))])
def test_weights_to_start_from_are_published_for_the_variant(name):
    (weights,) = re.findall(r"model\.weights=(\w+)", comment_of(name))
    assert weights == ("imagenet22k" if "_22k" in name else "imagenet1k")
    assert find_published(weights, read_recipe(name).model.variant, None)


def test_every_recipe_is_known_here():
    assert set(recipe_names()) == {*PUBLISHED, *OURS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_has_the_published_size(name):
    millions, _ = PUBLISHED[name]
    count = sum(parameter.numel() for parameter in build(name).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_quotes_the_published_scores(name):
    head, data, schedule = name.split("_")[0], "COCO val2017", name.rsplit("_", 1)[1]
    comment = comment_of(name)
    if head == "upernet":
        data = "ADE20K val"
    if head == "classifier":
        data, schedule = "ImageNet-1K val", "300 epochs"
    quoted = {score: float(value) for score, value in re.findall(r"(box AP|mask AP|mIoU|top-1) (\d+\.\d+)", comment)}
    assert quoted == PUBLISHED[name][1]
    assert data in comment and schedule in comment
    assert ("ImageNet-22K weights" in comment) == ("_22k" in name)
    size = re.search(r"Swin-([TSBL])", comment)
    wide = "_w12_384" if "windows of 12" in comment else ""
    assert size is not None and f"swin_{size[1].lower()}{wide}" == read_recipe(name).model.variant


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
    side = 640 if "_640_" in name else 512
    assert f"{side} x {side}" in comment_of(name)
    assert recipe.augmentation.crop_size_hw == (side, side) and recipe.augmentation.ratio_range == (0.5, 2.0)
    assert recipe.augmentation.photometric and recipe.augmentation.max_category_ratio == 0.75
    assert recipe.inference.scale == recipe.augmentation.scale == (4 * side, side)
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


@pytest.mark.parametrize("name", V2)
def test_recipe_of_swin_v2_is_that_of_swin_but_for_the_variant(name):
    recipe, swin = read_recipe(name), read_recipe(V2[name])
    variant = recipe.model.variant
    assert variant.startswith(swin.model.variant.replace("swin_", "swin_v2_"))
    assert replace(recipe, model=replace(recipe.model, variant=swin.model.variant)) == swin
    assert V2[name] in comment_of(name) and "Ours" in comment_of(name)


@pytest.mark.parametrize("name", LSJ)
def test_large_scale_jitter_has_the_published_numbers(name):
    recipe = read_recipe(name)
    augmentation, inference, schedule = recipe.augmentation, recipe.inference, recipe.schedule
    assert (augmentation.jitter_size, augmentation.jitter_range) == (1024, (0.1, 2.0))
    assert augmentation.flip_probability == 0.5
    assert (inference.short_edge, inference.max_long_edge) == (1024, 1024)
    # detectron2 drops the rate at 163889 and 177546 of 184375 steps.
    assert schedule.milestones == tuple(round(schedule.epochs * step / 184_375) for step in (163_889, 177_546))


@pytest.mark.parametrize("size", "bl")
def test_cascade_with_large_scale_jitter_has_the_numbers_of_detectron2(size):
    recipe = read_recipe(f"cascade_mask_rcnn_swin_{size}_22k_lsj")
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.batch_size) == (4e-5, 0.05, 64)
    assert recipe.model.backbone == {"drop_path_rate": 0.4} and recipe.augmentation.copy_paste_probability == 0.0
    assert (schedule.epochs, schedule.warmup_start) == (50, 0.001)
    _, steps = length_of(recipe)
    assert schedule.warmup_steps == round(steps * 250 / 184_375)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("mask_rcnn_swin_t_lsj_100ep", "mask_rcnn_swin_t_3x"), ("upernet_swin_t_ema_160k", "upernet_swin_t_160k")],
)
def test_recipe_beyond_the_published_one_adds_an_average_and_layer_decay(name, plain):
    recipe, plain_recipe = read_recipe(name), read_recipe(plain)
    assert recipe.model == plain_recipe.model
    assert recipe.optimizer.average_decay == 0.9998 and 0.9 < recipe.optimizer.layer_decay < 1.0
    assert plain_recipe.optimizer.average_decay is None and plain_recipe.optimizer.layer_decay == 1.0
    assert plain in comment_of(name)


def test_every_file_of_the_folder_is_a_recipe():
    assert {path.suffix for path in RECIPE_FOLDER.iterdir()} == {".yaml"}
