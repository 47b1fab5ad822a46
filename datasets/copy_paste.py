"""Copy-paste: objects of a second image laid over a first one, which hide what is behind them.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation" (2021), section 3.
"""

from dataclasses import dataclass

import numpy as np

from swin_dense.datasets.instances import Instances
from swin_dense.datasets.outlines import MaskInBox, tight
from swin_dense.datasets.transforms import sample_seed
from swin_dense.errors import ConfigError

# No epoch has this number, so a sample's second image never shares its random numbers with an augmentation.
_PASTE_STREAM = 2**63


@dataclass(frozen=True)
class CopyPaste:
    """Chooses, from a sample's seed alone, whether objects are pasted into it, and from which image.

    Args:
        probability: of pasting; always in the paper.

    Raises:
        ConfigError: the probability lies outside 0..1.
    """

    probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"augmentation: copy_paste_probability must lie in 0..1, got {self.probability}")

    def draw(self, seed: int, num_images: int) -> "Paste | None":
        """Draws what is pasted into one sample; None is nothing.

        Args:
            seed: the sample's, as `sample_seed` gives it.
            num_images: number of images in the data set, any of which is taken, the sample's own too.
        """
        generator = np.random.default_rng(sample_seed(seed, _PASTE_STREAM, 0))
        if generator.random() >= self.probability:
            return None
        index, first, second = (int(generator.integers(limit)) for limit in (num_images, 2**63, 2**63))
        return Paste(index, first, second)


@dataclass(frozen=True)
class Paste:
    """What is pasted into one sample.

    Attributes:
        index: number of the second image in the data set.
        transform_seed: of its own transform.
        subset_seed: of the choice among its objects.
    """

    index: int
    transform_seed: int
    subset_seed: int

    def __call__(
        self, image: np.ndarray, instances: Instances, second_image: np.ndarray, second_instances: Instances
    ) -> tuple[np.ndarray, Instances]:
        """Lays about half of the second image's objects over the first image.

        The paper takes "a random subset"; here each object has the probability one half. Regions that take no part are
        never pasted, and those of the first image stay such regions.

        Args:
            image: (H, W, 3) uint8 RGB, already transformed.
            instances: its objects.
            second_image: (H, W, 3) uint8 RGB, transformed with `transform_seed`.
            second_instances: its objects.

        Returns:
            a new image, and the objects of both as `paste_objects` gives them.

        Raises:
            ConfigError: the images differ in size.
        """
        chosen = np.random.default_rng(self.subset_seed).random(len(second_instances)) < 0.5
        pasted = second_instances.select(chosen & ~second_instances.is_crowd)
        return paste_objects(image, instances, second_image, pasted)


def paste_objects(
    image: np.ndarray, instances: Instances, second_image: np.ndarray, pasted: Instances
) -> tuple[np.ndarray, Instances]:
    """Lays objects of one image over another one, without blending, all at their places.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: its objects.
        second_image: (H, W, 3) uint8 RGB.
        pasted: those of its objects that are pasted.

    Returns:
        a new image; and the objects still to be seen, those of the first image first. Masks lose what is covered, boxes
        bound the masks.

    Raises:
        ConfigError: the images differ in size.
    """
    if image.shape != second_image.shape:
        raise ConfigError(
            f"augmentation: copy-paste needs images of one size, got {image.shape[:2]} and {second_image.shape[:2]} "
            f"(height, width). Use large_scale_jitter, which gives all images the size of its square."
        )
    pasted = pasted.drawn()
    in_front = [outline.draw(pasted.frame) for outline in pasted.outlines]
    image = image.copy()
    for mask, (left, top) in in_front:
        window = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
        np.copyto(image[window], second_image[window], where=mask[:, :, None].astype(np.bool_))
    behind = [outline.draw(instances.frame) for outline in instances.outlines]
    return image, instances.with_drawn_masks([uncovered(mask, in_front) for mask in behind]).followed_by(pasted)


def uncovered(behind: MaskInBox, in_front: list[MaskInBox]) -> MaskInBox:
    """Returns what is to be seen of a mask behind others; only the rectangles in which two boxes meet are looked at."""
    mask, corner_xy = behind[0].copy(), behind[1]
    own_box = _box_xyxy(behind)
    for front in in_front:
        front_box = _box_xyxy(front)
        shared = np.concatenate([np.maximum(own_box[:2], front_box[:2]), np.minimum(own_box[2:], front_box[2:])])
        if (shared[:2] < shared[2:]).all():
            _window((mask, corner_xy), shared)[_window(front, shared) > 0] = 0
    return tight(mask, corner_xy)


def _box_xyxy(placed: MaskInBox) -> np.ndarray:
    mask, (left, top) = placed
    return np.array([left, top, left + mask.shape[1], top + mask.shape[0]])


def _window(placed: MaskInBox, box_xyxy: np.ndarray) -> np.ndarray:
    """A view of the part of a mask that lies in a box inside its own."""
    mask, (left, top) = placed
    x1, y1, x2, y2 = (box_xyxy - [left, top, left, top]).tolist()
    return mask[y1:y2, x1:x2]
