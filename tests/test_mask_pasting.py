import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from swin_dense.heads.mask_pasting import masks_to_rle, paste_masks, paste_window

# pycocotools' decode is older than numpy 2's copy keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE_HW = (23, 31)


def slow_paste(mask, box, size_hw):
    """Each pixel centre looked up bilinearly between the centres of the mask's cells, zero outside the mask."""
    side = len(mask)
    x1, y1, x2, y2 = box
    out = np.zeros(size_hw)
    for row in range(size_hw[0]):
        for column in range(size_hw[1]):
            y = (row + 0.5 - y1) / (y2 - y1) * side - 0.5
            x = (column + 0.5 - x1) / (x2 - x1) * side - 0.5
            for cell_y in (math.floor(y), math.floor(y) + 1):
                for cell_x in (math.floor(x), math.floor(x) + 1):
                    if 0 <= cell_y < side and 0 <= cell_x < side:
                        weight = (1 - abs(y - cell_y)) * (1 - abs(x - cell_x))
                        out[row, column] += weight * mask[cell_y][cell_x]
    return out


BOXES = [
    (3.0, 4.0, 20.0, 15.0),
    (2.3, 5.9, 9.1, 17.4),
    (-7.5, -3.2, 12.0, 9.0),
    (20.0, 10.0, 44.0, 40.0),
    (-5.0, -5.0, 50.0, 50.0),
    (10.2, 11.1, 10.9, 11.7),
    (40.0, 2.0, 60.0, 9.0),
    (-30.0, -30.0, -9.0, -2.0),
    (0.0, 0.0, 31.0, 23.0),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("side", [28, 5, 1])
def test_pasting_is_bilinear_between_cell_centres_of_the_float_box(box, side):
    mask = torch.rand(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    pasted = paste_masks(mask[None, None], torch.tensor([box], dtype=torch.float64), SIZE_HW)
    assert pasted.shape == (1, 1, *SIZE_HW)
    assert np.abs(pasted[0, 0].numpy() - slow_paste(mask.tolist(), box, SIZE_HW)).max() < 1e-9


def test_a_full_mask_covers_the_pixels_whose_centres_lie_in_the_box():
    boxes = torch.tensor([[2.3, 5.9, 9.1, 17.4], [4.0, 3.0, 11.0, 8.0], [-4.0, 20.2, 6.6, 40.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), boxes, SIZE_HW)[:, 0] > 0.5
    y, x = torch.arange(SIZE_HW[0])[:, None] + 0.5, torch.arange(SIZE_HW[1])[None, :] + 0.5
    for mask, (x1, y1, x2, y2) in zip(pasted, boxes.tolist(), strict=True):
        assert torch.equal(mask, (y > y1) & (y < y2) & (x > x1) & (x < x2))


def test_a_window_is_a_cut_of_the_whole():
    mask, box = torch.rand(28, 28, dtype=torch.float64), torch.tensor([2.3, 5.9, 19.1, 17.4], dtype=torch.float64)
    whole = paste_masks(mask[None, None], box[None], SIZE_HW)[0, 0]
    assert torch.allclose(paste_window(mask, box, (7, 3, 19, 11)), whole[7:19, 3:11], atol=1e-12)


def test_no_masks_give_none():
    assert paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), SIZE_HW).shape == (0, 1, *SIZE_HW)
    assert masks_to_rle(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), SIZE_HW) == []


@pytest.mark.parametrize(
    "box",
    [
        (7.0, 5.0, 7.0, 15.0),
        (3.0, 5.5, 20.0, 5.5),
        (7.5, 5.5, 7.5, 5.5),
        (7.5, 2.0, 7.5, 18.0),
        (31.0, 0.0, 31.0, 23.0),
    ],
)
def test_a_box_without_area_has_no_pixels_and_nothing_undefined(box):
    for dtype in (torch.float32, torch.float64):
        masks, boxes = torch.ones(1, 1, 28, 28, dtype=dtype), torch.tensor([box], dtype=dtype)
        pasted = paste_masks(masks, boxes, SIZE_HW)
        assert not pasted.isnan().any()
        assert not (pasted > 0.5).any()
        (code,) = masks_to_rle(masks, boxes, SIZE_HW)
        assert coco_mask.decode(code).sum() == (pasted >= 0.5).sum() == 0


def random_boxes(count, generator):
    """Inside, partly and wholly outside, tiny, and on whole or half pixels."""
    corner = torch.rand(count, 2, generator=generator) * 50 - 10
    size = torch.rand(count, 2, generator=generator) ** 3 * 40 + 1e-3
    boxes = torch.cat((corner, corner + size), dim=1)
    boxes[::3] = (boxes[::3] * 2).round() / 2
    boxes[::3, 2:] += 0.5 * (boxes[::3, 2:] <= boxes[::3, :2])
    return boxes


@pytest.mark.parametrize("seed", range(3))
def test_rle_equals_encoding_the_thresholded_pasted_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(151, generator)
    masks = torch.rand(151, 1, 28, 28, generator=generator)
    masks[::2] = (masks[::2] > 0.3).float()
    codes = masks_to_rle(masks, boxes, SIZE_HW)
    wanted = (paste_masks(masks, boxes, SIZE_HW)[:, 0] >= 0.5).numpy().astype(np.uint8)
    assert sum(map(np.any, wanted)) > 30
    for code, mask in zip(codes, wanted, strict=True):
        assert code["size"] == list(SIZE_HW) and isinstance(code["counts"], str)
        assert code["counts"] == coco_mask.encode(np.asfortranarray(mask))["counts"].decode()


def test_rle_of_many_pixels_equals_the_pasted_masks():
    boxes = torch.tensor([[5.2, 7.1, 480.3, 300.9], [-20.0, -10.0, 700.0, 500.0], [630.1, 470.2, 640.0, 480.0]])
    masks = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    pasted = paste_masks(masks, boxes, (480, 640))[:, 0] >= 0.5
    decoded = coco_mask.decode(masks_to_rle(masks, boxes, (480, 640)))
    assert np.array_equal(decoded.transpose(2, 0, 1), pasted.numpy())


def test_pasting_leaves_its_arguments_alone():
    masks, boxes = torch.rand(2, 1, 7, 7), torch.tensor([[1.0, 2, 9, 8], [3.0, 3, 5, 5]])
    copies = masks.clone(), boxes.clone()
    paste_masks(masks, boxes, SIZE_HW)
    masks_to_rle(masks, boxes, SIZE_HW)
    assert torch.equal(masks, copies[0]) and torch.equal(boxes, copies[1])
