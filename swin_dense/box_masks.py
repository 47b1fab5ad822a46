"""Masks kept only where the objects are: memory grows with the objects' areas, not with their number times the image.

Data sets make this record and detectors train on it; it belongs to the core because neither imports the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BoxMasks:
    """The masks of the objects of one image, each cut to its bounding box, all in one tensor.

    Where the pixels are is known on the CPU, wherever the pixels themselves are: cutting never waits for a GPU.

    Attributes:
        pixels: (P + 1,) uint8: mask after mask, row after row, 1 on the object. The last one is 0: windows read it
            beyond a mask.
        starts: (N,) int64 on the CPU: where each mask begins in `pixels`.
        sizes_hw: (N, 2) int64 on the CPU: (height, width) of each; 0 where an object has no pixel.
        corners_xy: (N, 2) int64 on the CPU: left column and top row of each in the image.
        image_size_hw: (H, W) of the image.

    Example:
        >>> masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
        >>> masks[1, 10:14, 20:25] = 1
        >>> box_masks = BoxMasks.from_full(masks)
        >>> box_masks.sizes_hw.tolist(), box_masks.corners_xy.tolist(), box_masks.nbytes
        ([[0, 0], [4, 5]], [[0, 0], [20, 10]], 21)
    """

    pixels: Tensor
    starts: Tensor
    sizes_hw: Tensor
    corners_xy: Tensor
    image_size_hw: tuple[int, int]

    @classmethod
    def from_crops(
        cls, crops: Sequence[Tensor], corners_xy: Sequence[tuple[int, int]], image_size_hw: tuple[int, int]
    ) -> BoxMasks:
        """Packs masks that are cut already.

        Args:
            crops: N of (h_i, w_i) uint8 or bool, each inside the image.
            corners_xy: The left column and top row of each.
            image_size_hw: (H, W).
        """
        flat = [crop.reshape(-1).to(torch.uint8) for crop in crops]
        ends = list(accumulate((len(pixels) for pixels in flat), initial=0))
        beyond = torch.zeros(1, dtype=torch.uint8, device=flat[0].device if flat else None)
        return cls(
            torch.cat([*flat, beyond]),
            torch.tensor(ends[:-1], dtype=torch.int64),
            torch.tensor([tuple(crop.shape) for crop in crops], dtype=torch.int64).reshape(-1, 2),
            torch.tensor(list(corners_xy), dtype=torch.int64).reshape(-1, 2),
            image_size_hw,
        )

    @classmethod
    def from_full(cls, masks: Tensor) -> BoxMasks:
        """Cuts masks of the image's size, (N, H, W) uint8 or bool, where they are."""
        (top, bottom), (left, right) = _extent(masks.any(dim=2)), _extent(masks.any(dim=1))
        # One transfer from the device for all objects.
        bounds = torch.stack((top, bottom, left, right), dim=1).tolist()
        crops = [mask[rows:end, columns:stop] for mask, (rows, end, columns, stop) in zip(masks, bounds, strict=True)]
        corners_xy = [(columns, rows) for rows, _, columns, _ in bounds]
        packed = cls.from_crops(crops, corners_xy, (masks.shape[1], masks.shape[2]))
        return packed.to(masks.device)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Tensor) -> BoxMasks:
        """Some of the masks, by (N,) bool or by numbers; the pixels are shared."""
        rows = rows.cpu()
        return replace(self, starts=self.starts[rows], sizes_hw=self.sizes_hw[rows], corners_xy=self.corners_xy[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.pixels.nbytes

    def crop(self, row: int) -> Tensor:
        """(h, w) uint8 the mask of one object inside its bounding box."""
        start, (height, width) = int(self.starts[row]), self.sizes_hw[row].tolist()
        return self.pixels[start : start + height * width].view(height, width)

    def full(self) -> Tensor:
        """(N, H, W) uint8 masks of the image's size, for pictures."""
        masks = self.pixels.new_zeros(len(self), *self.image_size_hw)
        for row, (mask, (left, top)) in enumerate(zip(masks, self.corners_xy.tolist(), strict=True)):
            crop = self.crop(row)
            mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        return masks

    def windows(self, rows: Tensor, corners_xy: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Cuts a window of one size out of each of some masks.

        Args:
            rows: (M,) numbers of the masks.
            corners_xy: (M, 2) int64 left column and top row of each window in the image.
            size_hw: (h, w) of the windows.

        Returns:
            (M, h, w) uint8.
        """
        device = self.pixels.device
        shift_xy = corners_xy - self.corners_xy[rows]
        table = torch.cat((self.starts[rows, None], self.sizes_hw[rows], shift_xy), dim=1).to(device)
        start, height, width, shift_x, shift_y = table[:, :, None].unbind(dim=1)
        y = torch.arange(size_hw[0], device=device) + shift_y
        x = torch.arange(size_hw[1], device=device) + shift_x
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
        index = (start + y * width)[:, :, None] + x[:, None]
        return self.pixels[index.masked_fill_(~inside, len(self.pixels) - 1)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BoxMasks:
        """The same on another device."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> BoxMasks:
        """The same in memory that a GPU copies from without waiting."""
        return replace(self, pixels=self.pixels.pin_memory())


def _extent(hit: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L) bool to the first True and one past the last, (N,) each; 0 and 0 without any."""
    hit = hit.to(torch.uint8)
    any_hit = hit.amax(dim=1)
    return hit.argmax(dim=1) * any_hit, (hit.shape[1] - hit.flip(1).argmax(dim=1)) * any_hit
