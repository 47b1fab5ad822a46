"""Augmentation and test-time resizing of images with label maps, all random numbers drawn from the sample's seed."""

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.geometry import (
    Crop,
    Flip,
    Operation,
    Pad,
    Resize,
    draw_crop,
    keep_ratio_size_hw,
    load_albumentations,
)
from swin_dense.datasets.photometric import draw_photometric
from swin_dense.datasets.transforms import (
    PAD_RGB,
    TileDraw,
    require_lengths,
    require_positive_range,
    require_probability,
)

_CROP_TRIES = 10


class SemanticTransform:
    """Transforms an image and its label map; build it with `semantic_training` or `semantic_inference`.

    Args:
        scale: (long, short) edge bounds in pixels, order free; the ratio is kept.
        ratio_range: both bounds are multiplied by a number drawn from this range.
        crop_size_hw: size of the result, cut out or filled up; None leaves the size and the label map as they are.
        max_category_ratio: a crop is drawn again, up to 10 times, while one class covers this share of it or more.
        flip_probability: probability of mirroring.
        photometric: also distort the colours.
        tile_size: side in pixels of a tile that is cut out of the image before everything else; None takes all of it.
    """

    def __init__(
        self,
        scale: tuple[int, int],
        ratio_range: tuple[float, float] = (1.0, 1.0),
        crop_size_hw: tuple[int, int] | None = None,
        max_category_ratio: float = 1.0,
        flip_probability: float = 0.0,
        photometric: bool = False,
        tile_size: int | None = None,
    ) -> None:
        require_lengths("scale", scale)
        require_probability("flip_probability", flip_probability)
        require_probability("max_category_ratio", max_category_ratio)
        require_positive_range("ratio_range", ratio_range)
        if crop_size_hw is not None:
            require_lengths("crop_size_hw", crop_size_hw)
        self._scale = scale
        self._ratio_range = ratio_range
        self._crop_size_hw = crop_size_hw
        self._max_category_ratio = max_category_ratio
        self._flip_probability = flip_probability
        self._photometric = photometric
        self._tile = None if tile_size is None else TileDraw(tile_size)
        load_albumentations()

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Transforms one sample.

        Args:
            image: (H, W, 3) uint8 RGB.
            label: (H, W) uint8 class indices, 255 ignored.
            seed: as `sample_seed` gives it.

        Returns:
            new image and label map. For training both have `crop_size_hw`. For inference the label map is returned as
            it is: predictions are compared at the original size, as published scores are.
        """
        generator = np.random.default_rng(seed)
        if self._tile is not None:
            tile = self._tile((image.shape[0], image.shape[1]), generator)
            image, label = tile.image(image), tile.label(label)
        ratio = generator.uniform(*self._ratio_range)
        edges = (int(self._scale[0] * ratio), int(self._scale[1] * ratio))
        resize = Resize(keep_ratio_size_hw((image.shape[0], image.shape[1]), (max(1, edges[0]), max(1, edges[1]))))
        if self._crop_size_hw is None:
            return resize.image(image), label
        label = resize.label(label)
        crop = choose_crop(label, self._crop_size_hw, self._max_category_ratio, generator)
        operations: list[Operation] = [crop]
        if generator.random() < self._flip_probability:
            operations.append(Flip())
        image = resize.image(image)
        for operation in operations:
            image, label = operation.image(image), operation.label(label)
        if self._photometric:
            image = draw_photometric(generator)(image)
        # Last, so that the fill keeps the mean colour.
        pad = Pad(self._crop_size_hw, PAD_RGB, IGNORED_LABEL)
        return pad.image(image), pad.label(label)


def semantic_training(
    scale: tuple[int, int] = (2048, 512),
    ratio_range: tuple[float, float] = (0.5, 2.0),
    *,
    crop_size_hw: tuple[int, int],
    max_category_ratio: float = 0.75,
    flip_probability: float = 0.5,
    photometric: bool = True,
    tile_size: int | None = None,
) -> SemanticTransform:
    """Builds the augmentation of the published segmenters: random scale, crop, flip, colours; see `SemanticTransform`.

    Raises:
        ConfigError: a length is not positive, or a probability or ratio is out of range.
    """
    return SemanticTransform(
        scale, ratio_range, crop_size_hw, max_category_ratio, flip_probability, photometric, tile_size
    )


def semantic_inference(scale: tuple[int, int] = (2048, 512)) -> SemanticTransform:
    """Builds the test-time resize: ratio kept within (long, short) edge bounds; the label map keeps its size.

    Raises:
        ConfigError: a length is not positive.
    """
    return SemanticTransform(scale)


def choose_crop(
    label: np.ndarray, size_hw: tuple[int, int], max_category_ratio: float, generator: np.random.Generator
) -> Crop:
    """Draws a crop in which no class covers too much, or the last one drawn after 10 tries.

    Args:
        label: (H, W) uint8, 255 does not count.
        size_hw: size of the crop; where the label map is smaller, its whole side is taken.
        max_category_ratio: a class must cover less than this share; 1 accepts every crop.
        generator: source of random numbers.
    """
    full_hw = (label.shape[0], label.shape[1])
    crop_hw = (min(size_hw[0], full_hw[0]), min(size_hw[1], full_hw[1]))
    crop = draw_crop(full_hw, crop_hw, generator)
    if max_category_ratio >= 1 or crop_hw == full_hw:
        return crop
    for _ in range(_CROP_TRIES):
        counts = np.bincount(crop.label(label).ravel(), minlength=256)[:IGNORED_LABEL]
        # A crop of one class alone has the ratio 1, an ignored one none: both are drawn again.
        if counts.any() and counts.max() / counts.sum() < max_category_ratio:
            break
        crop = draw_crop(full_hw, crop_hw, generator)
    return crop
