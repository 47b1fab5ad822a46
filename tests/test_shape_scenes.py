import numpy as np
import pytest

from swin_dense.datasets.shape_scenes import (
    BACKGROUND_NAMES,
    MIN_VISIBLE_PIXELS,
    SHAPE_NAMES,
    draw_scene,
)

SIZES_HW = [(48, 48), (53, 97), (131, 61), (160, 101)]


def scenes(count):
    for number in range(count):
        yield draw_scene(np.random.default_rng(number), SIZES_HW[number % len(SIZES_HW)])


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_scene_has_the_wanted_size_and_types(size_hw):
    scene = draw_scene(np.random.default_rng(7), size_hw)
    assert scene.image.shape == (*size_hw, 3) and scene.image.dtype == np.uint8
    assert scene.label.shape == size_hw and scene.label.dtype == np.uint8
    assert all(each.mask.shape == size_hw and each.mask.dtype == np.bool_ for each in scene.objects)


def test_scene_is_a_function_of_the_seed():
    first, again = (draw_scene(np.random.default_rng(11), (67, 89)) for _ in range(2))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.objects, again.objects, strict=True))
    assert not np.array_equal(first.image, draw_scene(np.random.default_rng(12), (67, 89)).image)


def test_visible_masks_never_share_a_pixel():
    for scene in scenes(40):
        assert sum((each.mask.astype(int) for each in scene.objects), np.zeros(scene.label.shape, int)).max() <= 1


def test_every_object_shows_enough_pixels():
    assert all(each.mask.sum() >= MIN_VISIBLE_PIXELS for scene in scenes(40) for each in scene.objects)


def test_label_picture_agrees_with_the_objects():
    for scene in scenes(60):
        seen = np.zeros(scene.label.shape, dtype=bool)
        for each in scene.objects:
            value = 0 if each.is_crowd else len(BACKGROUND_NAMES) + each.shape + 1
            assert set(np.unique(scene.label[each.mask])) <= {0, value}
            assert (scene.label[each.mask] == value).mean() > 0.4
            seen |= each.mask
        assert scene.label[~seen].max() <= len(BACKGROUND_NAMES)


def test_object_differs_from_the_ground_around_it():
    far = [
        abs(scene.image[each.mask].astype(float).mean(axis=0) - scene.image[scene.label == ground].mean(axis=0)).max()
        for scene in scenes(40)
        for each in scene.objects
        if not each.is_crowd
        for ground in range(1, len(BACKGROUND_NAMES) + 1)
        if (scene.label == ground).sum() > 200
    ]
    assert np.percentile(far, 2) > 20


def test_all_classes_crowds_and_empty_pictures_occur():
    drawn = list(scenes(150))
    objects = [each for scene in drawn for each in scene.objects]
    assert {each.shape for each in objects if not each.is_crowd} == set(range(len(SHAPE_NAMES)))
    assert 3 <= sum(each.is_crowd for each in objects) <= 40
    assert 1 <= sum(not scene.objects for scene in drawn) <= 20
    assert set(np.unique(np.concatenate([scene.label.ravel() for scene in drawn]))) == set(range(11))
