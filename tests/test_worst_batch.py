import numpy as np
import pytest
import torch
from torch import nn

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.geometry import Flip
from swin_dense.datasets.transforms import instance_training
from swin_dense.heads.mask_rcnn import pad_to_batch
from swin_dense.tools.recipe import AugmentationSettings, read_recipe
from swin_dense.tools.tasks import task_of
from swin_dense.tools.worst_batch import STRIDE, largest_size_hw, most_objects, sampled_objects, worst_batch

pytestmark = pytest.mark.usefixtures("one_thread")
AUGMENTATIONS = {
    "published": ("augmentation.short_edges=[40, 53, 71]", "augmentation.max_long_edge=101"),
    "crop": ("augmentation.short_edges=[40, 71]", "augmentation.max_long_edge=97", "augmentation.crop_branch=true"),
    "tile": ("augmentation.short_edges=[71]", "augmentation.max_long_edge=151", "augmentation.tile_size=47"),
    "jitter": ("augmentation.jitter_size=67", "augmentation.copy_paste_probability=1.0"),
}


@pytest.fixture
def coco_task(coco_tree):
    """A task on five pictures: tall and wide ones, one of them with a crowd."""
    for picture in (23, 33):
        for annotation in (1, 2):
            entry = {**coco_tree.content["annotations"][0], "id": picture + annotation, "image_id": picture}
            coco_tree.content["annotations"].append(entry)
    coco_tree.write()

    def make(*changes):
        paths = [
            f"dataset.train_annotations={coco_tree.annotation_file}",
            f"dataset.train_images={coco_tree.image_folder}",
        ]
        return task_of(read_recipe("shapes_instance", [*paths, *changes]))

    return make


class NoDetector(nn.Module):
    """Says how many boxes it would be trained on."""

    def __init__(self, samples_per_image):
        super().__init__()
        self.architecture = {"samples_per_image": samples_per_image}


def size_and_objects(images, targets):
    return pad_to_batch([image.float() for image in images], STRIDE).tensors.shape[-2:].numel(), max(
        len(target["boxes"]) for target in targets
    )


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_batch_of_three_epochs_is_larger(name, images, coco_task):
    task = coco_task(*AUGMENTATIONS[name])
    data = task.training_data()
    groups = task.batch_groups(data)
    worst = worst_batch(task.recipe.augmentation, data, groups, NoDetector(4), images)
    batch = task.collate([worst.sample] * worst.images)
    assert batch.images[0].shape[1:] == worst.size_hw and len(batch.images) == images
    largest = size_and_objects(batch.images, batch.targets)
    assert largest[1] == worst.objects
    per_epoch = TrainingBatches(len(data), images, seed=0, groups=groups).per_epoch
    for keys in TrainingBatches(len(data), images, seed=0, groups=groups, num_batches=3 * per_epoch):
        drawn = task.collate([data[key] for key in keys])
        found = size_and_objects(drawn.images, drawn.targets)
        assert found[0] <= largest[0] and found[1] <= largest[1]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("crop_branch", [False, True])
@pytest.mark.parametrize("tile_size", [None, 300])
def test_no_draw_is_larger_whatever_the_image(images, crop_branch, tile_size):
    generator = np.random.default_rng(images)
    for long_edge in (97, 150, 400):
        settings = AugmentationSettings(
            short_edges=(31, 64, 89), max_long_edge=long_edge, crop_branch=crop_branch, tile_size=tile_size
        )
        transform = instance_training(
            settings.short_edges, long_edge, 0.5, crop_branch, tile_size=tile_size, tile_least_share=0.5
        )
        for _ in range(8):
            sizes_hw = np.exp(generator.uniform(np.log(20), np.log(2000), (images, 2))).astype(np.int64)
            largest = padded_pixels(largest_size_hw(settings, sizes_hw, None, images))
            for seed in range(60):
                drawn = [drawn_size_hw(transform, size, 7 * seed + row) for row, size in enumerate(sizes_hw.tolist())]
                assert padded_pixels(np.max(drawn, axis=0)) <= largest


def drawn_size_hw(transform, size_hw, seed):
    *_, last = (step for step in transform.operations(tuple(size_hw), seed) if not isinstance(step, Flip))
    return last.size_hw


def padded_pixels(size_hw):
    height, width = (-(-int(side) // STRIDE) * STRIDE for side in size_hw)
    return height * width


def test_published_bounds():
    wide = np.array([[480, 640], [300, 1200]])
    published = AugmentationSettings()
    assert largest_size_hw(published, wide, None, 1) == (800, 1067)
    assert largest_size_hw(published, wide, None, 2) == (800, 1333)
    assert largest_size_hw(published, np.array([[640, 480], [480, 640]]), [0, 1], 2) in ((1067, 800), (800, 1067))
    cropped = AugmentationSettings(crop_branch=True)
    assert largest_size_hw(cropped, wide[:1], None, 1) == (1250, 800)
    assert largest_size_hw(cropped, wide, None, 2) == (1250, 1333)
    assert largest_size_hw(AugmentationSettings(jitter_size=1024), wide, None, 2) == (1024, 1024)


def test_most_objects_are_those_of_the_file(coco_task):
    data = coco_task().training_data()
    index, most = most_objects(data)
    assert most == max(len(data.raw(other)[1]) for other in range(len(data))) == len(data.raw(index)[1])
    assert data.image_ids[index] == 3


@pytest.mark.parametrize(("samples", "paste", "expected"), [(4, 0.0, 3), (4, 0.5, 6), (80, 0.5, 20)])
def test_objects_fill_what_is_sampled_and_crowds_are_not_copied(samples, paste, expected, coco_task):
    task = coco_task("augmentation.jitter_size=97", f"augmentation.copy_paste_probability={paste}")
    worst = worst_batch(task.recipe.augmentation, task.training_data(), None, NoDetector(samples), 2)
    target = worst.sample.target
    assert worst.objects == expected == len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
    assert int(target["iscrowd"].sum()) == 1
    assert target["masks"].image_size_hw == worst.size_hw == (97, 97)


def test_sampled_objects_are_a_quarter():
    with torch.device("meta"):
        model = task_of(read_recipe("shapes_instance", ["model.head.samples_per_image=64"])).build_model(3)
    assert sampled_objects(model) == 16


def test_crops_of_one_size_are_all_alike(tiny_words, classification_words):
    for words, size_hw in ((tiny_words("semantic"), (64, 64)), (classification_words(), (16, 16))):
        name, *overrides = words
        task = task_of(read_recipe(name, overrides))
        worst = worst_batch(task.recipe.augmentation, task.training_data(), None, nn.Identity(), 3)
        assert worst.objects is None and worst.size_hw == size_hw
        batch = task.collate([worst.sample] * worst.images)
        assert batch.images.shape == (3, 3, *size_hw)
