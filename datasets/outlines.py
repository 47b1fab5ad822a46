"""Where an object is, as its file says it, and drawn only after all changes of geometry, inside its bounding box.

Flips, resizes and crops change nothing but a few numbers of the frame; polygons keep their corners to the last step.
Only where pixels count earlier, as when an object hides another one, is an outline replaced by its drawn mask.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from swin_dense.datasets.segmentations import crop_of_run_lengths, polygon_run_lengths

MaskInBox = tuple[np.ndarray, tuple[int, int]]
"""A mask (h, w) uint8 inside its bounding box, and the (x, y) of its left column and top row in the image."""


@dataclass(frozen=True)
class Frame:
    """The pixels of an image after flips, resizes and crops, and where those of its file went.

    A point (x, y) of the file's picture lies at scale_xy * (x, y) + shift_xy. A factor is negative after a flip.

    Attributes:
        source_size_hw: (height, width) of the file's picture.
        size_hw: (height, width) of the image now.
        scale_xy: factors of x and y.
        shift_xy: added to x and y, in pixels of the image now.
    """

    source_size_hw: tuple[int, int]
    size_hw: tuple[int, int]
    scale_xy: tuple[float, float] = (1.0, 1.0)
    shift_xy: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of_file(cls, size_hw: tuple[int, int]) -> "Frame":
        """Returns the frame of a picture as its file has it."""
        return cls(size_hw, size_hw)

    def flipped(self) -> "Frame":
        """Returns the frame mirrored left and right."""
        (scale_x, scale_y), (shift_x, shift_y) = self.scale_xy, self.shift_xy
        return replace(self, scale_xy=(-scale_x, scale_y), shift_xy=(self.size_hw[1] - shift_x, shift_y))

    def resized(self, size_hw: tuple[int, int]) -> "Frame":
        """Returns the frame scaled to a (height, width)."""
        factors = size_hw[1] / self.size_hw[1], size_hw[0] / self.size_hw[0]
        scale_x, scale_y, shift_x, shift_y = np.multiply([*self.scale_xy, *self.shift_xy], factors * 2).tolist()
        return replace(self, size_hw=size_hw, scale_xy=(scale_x, scale_y), shift_xy=(shift_x, shift_y))

    def cropped(self, top: int, left: int, size_hw: tuple[int, int]) -> "Frame":
        """Returns the frame of a rectangle of the image."""
        return replace(self, size_hw=size_hw, shift_xy=(self.shift_xy[0] - left, self.shift_xy[1] - top))

    def padded(self, size_hw: tuple[int, int]) -> "Frame":
        """Returns the frame with pixels added at the bottom and right, up to a (height, width)."""
        return replace(self, size_hw=size_hw)

    def of_polygon(self, polygon: np.ndarray) -> np.ndarray:
        """Returns a polygon of the file, (2 P,) x and y in turn, where it lies now."""
        return (polygon.reshape(-1, 2) * self.scale_xy + self.shift_xy).ravel()

    def of_crop(self, crop: MaskInBox) -> MaskInBox:
        """Returns a mask of the file where it lies now: each pixel takes the value that its centre had in the file."""
        mask, corner_xy = crop
        rows, top = self._source_pixels(1, corner_xy[1], mask.shape[0])
        columns, left = self._source_pixels(0, corner_xy[0], mask.shape[1])
        return tight(mask[np.ix_(rows, columns)], (left, top))

    def _source_pixels(self, axis: int, first: int, count: int) -> tuple[np.ndarray, int]:
        """The pixels of the image along x (0) or y (1) that lie in a mask's: its rows or columns, and the first one."""
        centres = np.arange(self.size_hw[1 - axis]) + 0.5
        source = np.floor((centres - self.shift_xy[axis]) / self.scale_xy[axis]).astype(np.int64) - first
        inside = np.flatnonzero((source >= 0) & (source < count))
        return source[inside], int(inside[0]) if len(inside) else 0


@dataclass(frozen=True)
class Outline:
    """One object as its file has it, in pixels of the file's picture: polygons, or run lengths.

    Or as it is left by a change that neither can express, such as another object in front of it: a drawn mask, in
    pixels of the image that it was drawn in.

    Attributes:
        polygons: each (2 P,) float64, x and y in turn.
        runs: (R,) run lengths that fill the picture column by column; they count where there is no polygon.
        drawn: the mask; where there is one, nothing else counts.
    """

    polygons: tuple[np.ndarray, ...] = ()
    runs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    drawn: MaskInBox | None = None

    def draw(self, frame: Frame) -> MaskInBox:
        """Draws the object in a frame; the mask is (0, 0) where no pixel is left.

        Polygons get the raster that pycocotools gives them in the whole frame, the others the nearest pixels.
        """
        if self.drawn is not None:
            return frame.of_crop(self.drawn)
        if self.polygons:
            polygons = [frame.of_polygon(polygon) for polygon in self.polygons]
            return crop_of_run_lengths(polygon_run_lengths(polygons, frame.size_hw), frame.size_hw[0])
        return frame.of_crop(crop_of_run_lengths(self.runs, frame.source_size_hw[0]))


def tight(mask: np.ndarray, corner_xy: tuple[int, int]) -> MaskInBox:
    """Cuts a mask to its bounding box.

    Args:
        mask: (h, w) uint8.
        corner_xy: where its left column and top row lie in the image.

    Returns:
        the mask and where it lies; (0, 0) where it has no pixel.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((0, 0), np.uint8), (0, 0)
    top, left = int(rows[0]), int(columns[0])
    return mask[top : rows[-1] + 1, left : columns[-1] + 1], (corner_xy[0] + left, corner_xy[1] + top)
