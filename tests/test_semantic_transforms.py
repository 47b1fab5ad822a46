import pickle

import numpy as np
import pytest

from swin_dense.datasets.semantic_transforms import choose_crop, semantic_inference, semantic_training
from swin_dense.datasets.transforms import PAD_RGB
from swin_dense.errors import ConfigError

SIZE_HW = (83, 127)
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
LABEL = np.random.default_rng(1).choice([0, 2, 5, 255], SIZE_HW).astype(np.uint8)


@pytest.mark.parametrize("crop_hw", [(64, 64), (200, 31), (301, 299)])
def test_semantic_training_gives_the_crop_size_and_no_new_label(crop_hw):
    transform = semantic_training((160, 90), crop_size_hw=crop_hw)
    for seed in range(12):
        image, label = transform(IMAGE, LABEL, seed)
        assert image.shape == (*crop_hw, 3) and label.shape == crop_hw
        assert image.dtype == np.uint8 and label.dtype == np.uint8
        assert set(np.unique(label)) <= {0, 2, 5, 255}


def test_semantic_padding_is_the_mean_colour_and_ignored():
    image, label = semantic_training((127, 83), (1.0, 1.0), crop_size_hw=(90, 150))(IMAGE, LABEL, 3)
    assert (image[83:] == PAD_RGB).all() and (image[:, 127:] == PAD_RGB).all()
    assert (label[83:] == 255).all() and (label[:, 127:] == 255).all()


def test_semantic_training_repeats_with_the_seed_and_differs_without():
    transform = semantic_training((160, 90), crop_size_hw=(64, 64))
    assert np.array_equal(transform(IMAGE, LABEL, 9)[0], transform(IMAGE, LABEL, 9)[0])
    assert len({transform(IMAGE, LABEL, seed)[0].tobytes() for seed in range(20)}) == 20


def test_semantic_inference_resizes_the_image_and_keeps_the_label():
    image, label = semantic_inference((254, 100))(IMAGE, LABEL, 0)
    assert image.shape == (100, 153, 3) and np.array_equal(label, LABEL)


def test_choose_crop_avoids_one_class_and_does_not_count_ignored():
    label = np.zeros((40, 80), np.uint8)
    label[:, 60:] = np.arange(40)[:, None] % 2 + 1
    label[:, 20:40] = 255

    def share(crop):
        counts = np.bincount(crop.label(label).ravel(), minlength=256)[:255]
        return counts.max() / max(1, counts.sum())

    def mixed(ratio):
        crops = [choose_crop(label, (20, 20), ratio, np.random.default_rng(seed)) for seed in range(200)]
        return np.mean([share(crop) < 0.75 for crop in crops])

    assert mixed(0.75) > 0.9 > 0.6 > mixed(1.0)


def test_semantic_training_on_tiles_cuts_both_alike():
    image = np.random.default_rng(0).integers(0, 5, (101, 97), dtype=np.uint8)
    transform = semantic_training(
        (32, 32), (1.0, 1.0), crop_size_hw=(32, 32), photometric=False, flip_probability=0.0, tile_size=32
    )
    for seed in range(5):
        pixels, label = transform(image[:, :, None].repeat(3, axis=2), image, seed)
        assert pixels.shape == (32, 32, 3) and np.array_equal(pixels[:, :, 0], label)
        places = np.lib.stride_tricks.sliding_window_view(image, (32, 32))
        assert (places == label).all(axis=(2, 3)).sum() == 1


def colour_of(number):
    return np.array([number * factor % 211 + 40 for factor in (37, 101, 163)])


def painted():
    """A picture of nine rectangles, each of a class with a colour of its own, and its label map."""
    image, label = np.zeros((127, 113, 3), np.uint8), np.full((127, 113), 255, np.uint8)
    for number in range(9):
        top, left = number // 3 * 42 + 2, number % 3 * 37 + 2
        place = np.s_[top : top + 31 + number % 2, left : left + 28]
        image[place], label[place] = colour_of(number), number
    return image, label


SEMANTIC_TRANSFORMS = {
    "published": semantic_training((151, 83), crop_size_hw=(89, 97), photometric=False),
    "tiles": semantic_training((71, 71), (0.7, 1.4), crop_size_hw=(61, 61), photometric=False, tile_size=71),
    "no crop of one class": semantic_training((151, 83), crop_size_hw=(31, 37), photometric=False),
    "filled up": semantic_training((61, 61), (0.5, 1.0), crop_size_hw=(101, 73), photometric=False),
}


@pytest.mark.parametrize("name", SEMANTIC_TRANSFORMS)
def test_semantic_labels_and_pixels_never_come_apart(name):
    image, label = painted()
    before = image.copy(), label.copy()
    results, looked_at = set(), 0
    for seed in range(15):
        changed, changed_label = SEMANTIC_TRANSFORMS[name](image, label, seed)
        assert changed.shape[:2] == changed_label.shape
        for number in set(np.unique(changed_label).tolist()) - {255}:
            mask = changed_label == number
            if mask.sum() >= 60 and min(np.ptp(axis) for axis in np.nonzero(mask)) >= 6:
                assert np.array_equal(np.median(changed[mask], axis=0).round(), colour_of(number))
                looked_at += 1
        filled = (changed == PAD_RGB).all(axis=2)
        assert (changed_label[filled] == 255).all()
        assert np.array_equal(changed, SEMANTIC_TRANSFORMS[name](image, label, seed)[0])
        results.add(changed.tobytes())
    assert looked_at > 30 and len(results) > 12
    assert np.array_equal(image, before[0]) and np.array_equal(label, before[1])


def test_semantic_transforms_can_be_sent_to_workers():
    transform = semantic_training(crop_size_hw=(64, 64), tile_size=53)
    sent = pickle.loads(pickle.dumps(transform))
    assert all(np.array_equal(*pair) for pair in zip(sent(IMAGE, LABEL, 5), transform(IMAGE, LABEL, 5), strict=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: semantic_training(crop_size_hw=(0, 64)), "crop_size_hw must be whole numbers"),
        (lambda: semantic_training(crop_size_hw=(64, 64), tile_size=0), "tile_size must be whole numbers"),
        (lambda: semantic_training(ratio_range=(0, 2), crop_size_hw=(64, 64)), "ratio_range must be"),
    ],
)
def test_wrong_semantic_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
