import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop
from torchvision.transforms import Resize as TorchvisionResize

from swin_dense.datasets.classification_transforms import (
    centre_crop,
    choose_area_crop,
    classification_inference,
    classification_training,
)
from swin_dense.errors import ConfigError

IMAGE = np.random.default_rng(0).integers(0, 256, (83, 127, 3), dtype=np.uint8)


@pytest.mark.parametrize("size_hw", [(83, 127), (127, 83), (31, 300), (60, 61), (500, 333)])
@pytest.mark.parametrize("side", [32, 97])
def test_centre_crop_is_the_published_one(size_hw, side):
    image = np.random.default_rng(2).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    published = Compose([TorchvisionResize(int(256 / 224 * side), InterpolationMode.BICUBIC), CenterCrop(side)])
    assert np.array_equal(centre_crop(image, (side, side)), np.asarray(published(Image.fromarray(image))))


@given(st.tuples(st.integers(1, 99), st.integers(1, 99)), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_centre_crop_has_the_wanted_size(size_hw, wanted_hw):
    image = np.zeros((*size_hw, 3), np.uint8)
    cropped = centre_crop(image, wanted_hw)
    assert cropped.shape == (*wanted_hw, 3)
    assert size_hw != wanted_hw or cropped is image


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32))
def test_area_crop_lies_in_the_image_and_its_ranges(height, width, seed):
    crop = choose_area_crop((height, width), (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    (rows, columns), whole = crop.size_hw, height * width
    assert crop.top >= 0 and crop.left >= 0 and rows >= 1 and columns >= 1
    assert crop.top + rows <= height and crop.left + columns <= width
    if min(height, width) >= 50 and max(height, width) <= 1.3 * min(height, width):
        assert 0.07 < rows * columns / whole <= 1 and 0.7 < columns / rows < 1.42


def test_area_crops_are_distributed_as_torchvisions():
    generator = np.random.default_rng(0)
    image = Image.fromarray(np.zeros((83, 127, 3), np.uint8))
    ranges = ((0.08, 1.0), (3 / 4, 4 / 3))
    ours = [choose_area_crop((83, 127), *ranges, generator) for _ in range(2000)]
    theirs = [RandomResizedCrop.get_params(image, *map(list, ranges)) for _ in range(2000)]
    got = np.array([(crop.top, crop.left, *crop.size_hw) for crop in ours], float)
    wanted = np.array(theirs, float)
    assert np.abs(got.mean(axis=0) - wanted.mean(axis=0)).max() < 2.5
    assert np.abs(got.std(axis=0) / wanted.std(axis=0) - 1).max() < 0.1


@pytest.mark.parametrize("options", [{}, {"padding": 4}, {"photometric": True}, {"padding": 9, "photometric": True}])
def test_classification_training_has_the_size_repeats_with_the_seed_and_differs_without(options):
    transform = classification_training((31, 44), **options)
    before = IMAGE.copy()
    first = transform(IMAGE, 5)
    assert first.shape == (31, 44, 3) and first.dtype == np.uint8
    assert np.array_equal(first, transform(IMAGE, 5)) and np.array_equal(IMAGE, before)
    assert len({transform(IMAGE, seed).tobytes() for seed in range(30)}) > 20


def test_padding_moves_the_whole_image_over_black():
    image = np.random.default_rng(3).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[top : top + 32, left : left + 32].tobytes() for top in range(9) for left in range(9)}
    transform = classification_training((32, 32), padding=4, flip_probability=0.0)
    drawn = {transform(image, seed).tobytes() for seed in range(900)}
    assert drawn == windows
    flipped = classification_training((32, 32), padding=0, flip_probability=1.0)
    assert np.array_equal(flipped(image, 0), image[:, ::-1])


def test_classification_inference_is_the_centre_for_every_seed():
    transform = classification_inference((32, 40))
    assert all(np.array_equal(transform(IMAGE, seed), centre_crop(IMAGE, (32, 40))) for seed in range(4))


def test_classification_transforms_can_be_sent_to_workers():
    transform = classification_training((31, 44), photometric=True)
    assert np.array_equal(pickle.loads(pickle.dumps(transform))(IMAGE, 5), transform(IMAGE, 5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: classification_inference((0, 3)), "crop_size_hw must be whole numbers"),
        (lambda: classification_training((3, 3), area_range=(0.5, 0.1)), r"area_range must be \(least, most\)"),
        (lambda: classification_training((3, 3), area_range=(0.5, 1.1)), r"area_range must be .* in 0\.\.1, got"),
        (lambda: classification_training((3, 3), aspect_range=(0, 1)), "aspect_range must be"),
        (lambda: classification_training((3, 3), padding=-1), "padding must be 0 or more pixels, got -1"),
        (lambda: classification_training((3, 3), flip_probability=2), r"flip_probability must lie in 0\.\.1"),
    ],
)
def test_wrong_classification_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
