"""Augmentation and test-time crop of images with one class, all random numbers drawn from the sample's seed."""

import math

import numpy as np
from PIL import Image

from swin_dense.datasets.geometry import Crop, Flip, draw_crop
from swin_dense.datasets.photometric import draw_photometric
from swin_dense.datasets.transforms import require_lengths, require_positive_range, require_probability
from swin_dense.errors import ConfigError

_CROP_TRIES = 10


class ClassificationTransform:
    """Transforms an image; build it with `classification_training` or `classification_inference`.

    Args:
        size_hw: (height, width) of the result.
        area_range: a share of the image's area drawn from this range is cut out and resized; None takes the middle of
            the image, see `centre_crop`.
        aspect_range: width over height of what is cut out, drawn from this range on a logarithmic scale.
        padding: without `area_range`, the middle is cut out of again at random, this many black pixels around it.
        flip_probability: probability of mirroring.
        photometric: also distort the colours.
    """

    def __init__(
        self,
        size_hw: tuple[int, int],
        area_range: tuple[float, float] | None = None,
        aspect_range: tuple[float, float] = (1.0, 1.0),
        padding: int = 0,
        flip_probability: float = 0.0,
        photometric: bool = False,
    ) -> None:
        require_lengths("crop_size_hw", size_hw)
        require_probability("flip_probability", flip_probability)
        if area_range is not None and not 0 < area_range[0] <= area_range[1] <= 1:
            raise ConfigError(f"augmentation: area_range must be (least, most), both in 0..1, got {area_range}")
        require_positive_range("aspect_range", aspect_range)
        if padding < 0:
            raise ConfigError(f"augmentation: padding must be 0 or more pixels, got {padding}")
        self._size_hw = size_hw
        self._area_range = area_range
        self._aspect_range = aspect_range
        self._padding = padding
        self._flip_probability = flip_probability
        self._photometric = photometric

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Transforms one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            seed: as `sample_seed` gives it.

        Returns:
            new image of `size_hw`.
        """
        generator = np.random.default_rng(seed)
        if self._area_range is not None:
            full_hw = (image.shape[0], image.shape[1])
            crop = choose_area_crop(full_hw, self._area_range, self._aspect_range, generator)
            image = resize_bicubic(crop.image(image), self._size_hw)
        else:
            image = centre_crop(image, self._size_hw)
            if self._padding:
                border = (self._padding, self._padding)
                image = np.pad(image, (border, border, (0, 0)))
                image = draw_crop((image.shape[0], image.shape[1]), self._size_hw, generator).image(image)
        if generator.random() < self._flip_probability:
            image = Flip().image(image)
        return draw_photometric(generator)(image) if self._photometric else image


def classification_training(
    crop_size_hw: tuple[int, int],
    *,
    area_range: tuple[float, float] = (0.08, 1.0),
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3),
    padding: int | None = None,
    flip_probability: float = 0.5,
    photometric: bool = False,
) -> ClassificationTransform:
    """Builds the crops of the published classifiers, with flip and colours: a random share of the image, resized.

    Args:
        crop_size_hw: size of the result in pixels.
        area_range: see `ClassificationTransform`; published: 0.08 to 1.
        aspect_range: likewise; published: 3/4 to 4/3.
        padding: for images of the result's own size, as CIFAR-10's are: instead of a share, the whole image is moved by
            up to this many pixels, black at the border. Published for images up to 32 pixels: 4.
        flip_probability: probability of mirroring.
        photometric: also distort the colours.

    Raises:
        ConfigError: a length, range or probability is out of range.
    """
    if padding is not None:
        return ClassificationTransform(
            crop_size_hw, padding=padding, flip_probability=flip_probability, photometric=photometric
        )
    return ClassificationTransform(
        crop_size_hw, area_range, aspect_range, flip_probability=flip_probability, photometric=photometric
    )


def classification_inference(crop_size_hw: tuple[int, int]) -> ClassificationTransform:
    """Builds the test-time crop of the published classifiers, see `centre_crop`.

    Raises:
        ConfigError: a length is not positive.
    """
    return ClassificationTransform(crop_size_hw)


def centre_crop(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes an image to 256/224 of a size, ratio kept, and cuts that size out of the middle, as published.

    Args:
        image: (H, W, 3) uint8 RGB; one of the wanted size is returned as it is.
        size_hw: (height, width) wanted.
    """
    height, width = full_hw = (image.shape[0], image.shape[1])
    if full_hw == size_hw:
        return image
    least_height, least_width = (side * 256 // 224 for side in size_hw)
    # Whole numbers, so that the side that fits is met exactly and the other is rounded down, as published.
    if least_height * width >= least_width * height:
        resized_hw = (least_height, least_height * width // height)
    else:
        resized_hw = (least_width * height // width, least_width)
    top, left = (round((side - wanted) / 2) for side, wanted in zip(resized_hw, size_hw, strict=True))
    return Crop(top, left, size_hw).image(resize_bicubic(image, resized_hw))


def choose_area_crop(
    size_hw: tuple[int, int],
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
    generator: np.random.Generator,
) -> Crop:
    """Draws a rectangle of a share of the image's area, as the published classifiers were trained on.

    Args:
        size_hw: (height, width) of the image.
        area_range: its area over the image's.
        aspect_range: its width over its height.
        generator: source of random numbers.

    Returns:
        the first of ten rectangles that fits; where none does, the largest one in the middle within `aspect_range`.
    """
    height, width = size_hw
    for _ in range(_CROP_TRIES):
        area = height * width * generator.uniform(*area_range)
        aspect = math.exp(generator.uniform(math.log(aspect_range[0]), math.log(aspect_range[1])))
        crop_hw = (round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect)))
        if 0 < crop_hw[0] <= height and 0 < crop_hw[1] <= width:
            return draw_crop(size_hw, crop_hw, generator)
    aspect = min(max(width / height, aspect_range[0]), aspect_range[1])
    crop_hw = (max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect))))
    return Crop((height - crop_hw[0]) // 2, (width - crop_hw[1]) // 2, crop_hw)


def resize_bicubic(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes (H, W, 3) uint8 with Pillow's antialiased bicubic filter, that of the published classifiers."""
    resized = Image.fromarray(image).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC)
    return np.array(resized)
