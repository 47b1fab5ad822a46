"""Views of one image, resized and flipped: from their frames back to that of the image, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import clip_boxes_to_image

from swin_dense.windows import SizeHW


@dataclass(frozen=True)
class View:
    """An image as a model sees it.

    Attributes:
        image: (3, h, w) RGB float in [0, 1], resized from an original of (H, W) and perhaps flipped.
        is_flipped: Left and right are exchanged.
    """

    image: Tensor
    is_flipped: bool = False

    @property
    def size_hw(self) -> SizeHW:
        """(h, w)."""
        return self.image.shape[1], self.image.shape[2]

    def flipped(self) -> View:
        """The same with left and right exchanged."""
        return replace(self, image=self.image.flip(2), is_flipped=not self.is_flipped)

    def unflipped(self, maps: Tensor) -> Tensor:
        """(…, y, x) of the view, such as logits or masks, with left and right as in the original."""
        return maps.flip(-1) if self.is_flipped else maps

    def boxes_to_original(self, boxes: Tensor, size_hw: SizeHW) -> Tensor:
        """(N, 4) xyxy in pixels of the view to pixels of the original of (H, W), inside of it."""
        return clip_boxes_to_image(self._flip(boxes) * self._scale(boxes, size_hw), size_hw)

    def boxes_from_original(self, boxes: Tensor, size_hw: SizeHW) -> Tensor:
        """(N, 4) xyxy in pixels of the original of (H, W) to pixels of the view."""
        return self._flip(boxes / self._scale(boxes, size_hw))

    def _flip(self, boxes: Tensor) -> Tensor:
        if not self.is_flipped:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        width = self.image.shape[2]
        return torch.stack((width - x2, y1, width - x1, y2), dim=1)

    def _scale(self, boxes: Tensor, size_hw: SizeHW) -> Tensor:
        (height, width), (view_height, view_width) = size_hw, self.size_hw
        return boxes.new_tensor([width / view_width, height / view_height]).repeat(2)


def logits_in_original(view: View, logits_of: Callable[[Tensor], Tensor], size_hw: SizeHW) -> Tensor:
    """The logits of one view, enlarged to the original and not flipped.

    Args:
        view: The view.
        logits_of: (1, 3, h, w) to (1, K, h, w).
        size_hw: (H, W) of the original.

    Returns:
        (K, H, W).
    """
    logits = logits_of(view.image[None])
    return view.unflipped(functional.interpolate(logits, size=size_hw, mode="bilinear", align_corners=False)[0])


def mean_probabilities(views: Iterable[View], logits_of: Callable[[Tensor], Tensor], size_hw: SizeHW) -> Tensor:
    """Class probabilities of each pixel: those of every view at the size of the original, averaged.

    This is mmsegmentation's multi-scale testing, which the published "ms + flip" scores were made with. Views are seen
    one after the other, so that only the sum grows.

    Args:
        views: One or more, of one image.
        logits_of: As in `logits_in_original`.
        size_hw: (H, W) of the original.

    Returns:
        (K, H, W).
    """
    total, count = torch.empty(0), 0
    for view in views:
        probabilities = logits_in_original(view, logits_of, size_hw).softmax(dim=0)
        total = total.add_(probabilities) if count else probabilities
        count += 1
    return total / count
