import cv2
import numpy as np
import pytest

from swin_dense.datasets.photometric import PhotometricDistortion, draw_photometric

IMAGE = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
NOTHING = PhotometricDistortion(0.0, 1.0, None, None, True)


def published(image, distortion):
    """The definition, pixel by pixel in float32, values cut to 0..255 and rounded down after each step."""

    def convert(values, factor=1.0, offset=0.0):
        return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

    image = convert(image, offset=distortion.brightness)
    if distortion.contrast_first:
        image = convert(image, distortion.contrast)
    if distortion.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], distortion.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if distortion.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + distortion.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if distortion.contrast_first else convert(image, distortion.contrast)


@pytest.mark.parametrize("seed", range(40))
def test_distortion_equals_its_definition_and_leaves_the_input_alone(seed):
    before = IMAGE.copy()
    distortion = draw_photometric(np.random.default_rng(seed))
    assert np.array_equal(distortion(IMAGE), published(IMAGE, distortion))
    assert np.array_equal(IMAGE, before)


def test_nothing_drawn_changes_nothing():
    assert np.array_equal(NOTHING(IMAGE), IMAGE)


def test_order_of_contrast_matters():
    first = PhotometricDistortion(30.0, 1.5, 0.5, 9, True)
    last = PhotometricDistortion(30.0, 1.5, 0.5, 9, False)
    assert not np.array_equal(first(IMAGE), last(IMAGE))


def test_draws_stay_in_their_ranges_and_each_step_comes_half_the_time():
    generator = np.random.default_rng(0)
    draws = [draw_photometric(generator) for _ in range(4000)]
    used = [
        [d.brightness != 0 for d in draws],
        [d.contrast != 1 for d in draws],
        [d.saturation is not None for d in draws],
        [d.hue is not None for d in draws],
        [d.contrast_first for d in draws],
    ]
    assert all(0.46 < np.mean(each) < 0.54 for each in used)
    assert all(abs(d.brightness) <= 32 and 0.5 <= d.contrast <= 1.5 for d in draws)
    assert all(0.5 <= d.saturation <= 1.5 for d in draws if d.saturation is not None)
    hues = {d.hue for d in draws if d.hue is not None}
    assert hues == set(range(-18, 18))
