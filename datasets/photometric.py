"""PhotoMetricDistortion, the colour augmentation of the published segmentation models, drawn apart from applied.

Brightness, contrast, saturation and hue, each with probability one half, contrast before or after the colours
(SSD, Liu et al. 2016; the ranges are mmsegmentation's).
"""

from dataclasses import dataclass

import numpy as np

BRIGHTNESS_DELTA = 32.0
CONTRAST_RANGE = (0.5, 1.5)
SATURATION_RANGE = (0.5, 1.5)
HUE_DELTA = 18


@dataclass(frozen=True)
class PhotometricDistortion:
    """One drawn distortion.

    Attributes:
        brightness: added to every channel, in grey levels; 0 leaves it.
        contrast: factor on every channel; 1 leaves it.
        saturation: factor on the saturation; None leaves the colours untouched by this step.
        hue: added to the hue, in cv2's units of 2 degrees; None leaves the colours untouched by this step.
        contrast_first: contrast comes before the colour steps, otherwise after them.
    """

    brightness: float
    contrast: float
    saturation: float | None
    hue: int | None
    contrast_first: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Returns the distorted (H, W, 3) uint8 RGB image; values are rounded down after each step, as published."""
        import cv2

        image = _scale(image, 1.0, self.brightness)
        if self.contrast_first:
            image = _scale(image, self.contrast)
        if self.saturation is not None:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = _scale(hsv[..., 1], self.saturation)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.hue is not None:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = _look_up(hsv[..., 0], (np.arange(256) + self.hue) % 180)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if not self.contrast_first:
            image = _scale(image, self.contrast)
        return image


def draw_photometric(generator: np.random.Generator) -> PhotometricDistortion:
    """Draws a distortion; every call takes the same number of random numbers."""
    used = generator.random(4) < 0.5
    brightness = generator.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)
    contrast = generator.uniform(*CONTRAST_RANGE)
    saturation = generator.uniform(*SATURATION_RANGE)
    # The upper end is left out, as in the published code.
    hue = int(generator.integers(-HUE_DELTA, HUE_DELTA))
    return PhotometricDistortion(
        brightness=brightness if used[0] else 0.0,
        contrast=contrast if used[1] else 1.0,
        saturation=saturation if used[2] else None,
        hue=hue if used[3] else None,
        contrast_first=bool(generator.random() < 0.5),
    )


def _scale(values: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
    if factor == 1.0 and offset == 0.0:
        return values
    return _look_up(values, (np.arange(256, dtype=np.float32) * factor + offset).clip(0, 255))


def _look_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    import cv2

    # 256 results computed once: the same numbers as on every pixel, several times faster.
    return cv2.LUT(np.ascontiguousarray(values), table.astype(np.uint8))
