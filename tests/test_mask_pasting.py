import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from swin_dense.heads import mask_pasting
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


def random_detections(count, seed=0, side=28, dtype=torch.float32):
    """Noise, every second one binary, in boxes inside, partly and wholly outside, tiny, on whole or half pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50 - 10
    size = torch.rand(count, 2, generator=generator) ** 3 * 40 + 1e-3
    boxes = torch.cat((corner, corner + size), dim=1)
    boxes[::3] = (boxes[::3] * 2).round() / 2
    boxes[::3, 2:] += 0.5 * (boxes[::3, 2:] <= boxes[::3, :2])
    masks = torch.rand(count, 1, side, side, generator=generator)
    masks[::2] = (masks[::2] > 0.3).float()
    return masks.to(dtype), boxes.to(dtype)


def reference_masks(masks, boxes, size_hw=SIZE_HW):
    """(N, H, W), each mask pasted by the definition."""
    whole = (0, 0, *size_hw)
    return torch.stack([paste_window(mask[0], box, whole) for mask, box in zip(masks, boxes, strict=True)])


def encoded(mask):
    """A mask of the image's size as pycocotools encodes it."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("side", [28, 5, 1])
def test_a_pasted_window_is_bilinear_between_cell_centres_of_the_float_box(box, side):
    mask = torch.rand(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    pasted = paste_window(mask, torch.tensor(box, dtype=torch.float64), (0, 0, *SIZE_HW))
    assert pasted.shape == SIZE_HW
    assert np.abs(pasted.numpy() - slow_paste(mask.tolist(), box, SIZE_HW)).max() < 1e-9


@pytest.mark.parametrize("side", [28, 5, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_pasted_masks_equal_pasted_windows_of_the_image(dtype, tolerance, side):
    masks, boxes = random_detections(151, side=side, dtype=dtype)
    boxes[-len(BOXES) :] = torch.tensor(BOXES, dtype=dtype)
    pasted, wanted = paste_masks(masks, boxes, SIZE_HW), reference_masks(masks, boxes)
    assert pasted.shape == (151, 1, *SIZE_HW) and pasted.dtype == dtype
    assert (wanted > 0).any(dim=(1, 2)).sum() > 50
    assert float((pasted[:, 0] - wanted).abs().max()) <= tolerance


def test_pasted_masks_have_the_gradient_of_pasted_windows():
    masks, boxes = random_detections(17, side=5, dtype=torch.float64)
    masks.requires_grad_()
    weights = torch.rand(17, *SIZE_HW, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((paste_masks(masks, boxes, SIZE_HW)[:, 0] * weights).sum(), masks)
    (wanted,) = torch.autograd.grad((reference_masks(masks, boxes) * weights).sum(), masks)
    assert wanted.abs().max() > 0.1
    assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_reduced_precision_are_pasted_in_float32(dtype):
    masks, boxes = random_detections(31)
    masks = masks.to(dtype)
    assert torch.equal(paste_masks(masks, boxes, SIZE_HW), paste_masks(masks.float(), boxes, SIZE_HW))
    assert masks_to_rle(masks, boxes, SIZE_HW) == masks_to_rle(masks.float(), boxes, SIZE_HW)


def test_a_full_mask_covers_the_pixels_whose_centres_lie_in_the_box():
    boxes = torch.tensor([[2.3, 5.9, 9.1, 17.4], [4.0, 3.0, 11.0, 8.0], [-4.0, 20.2, 6.6, 40.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), boxes, SIZE_HW)[:, 0] > 0.5
    y, x = torch.arange(SIZE_HW[0])[:, None] + 0.5, torch.arange(SIZE_HW[1])[None, :] + 0.5
    for mask, (x1, y1, x2, y2) in zip(pasted, boxes.tolist(), strict=True):
        assert torch.equal(mask, (y > y1) & (y < y2) & (x > x1) & (x < x2))


def test_a_window_is_a_cut_of_the_whole():
    mask, box = torch.rand(28, 28, dtype=torch.float64), torch.tensor([2.3, 5.9, 19.1, 17.4], dtype=torch.float64)
    whole = paste_window(mask, box, (0, 0, *SIZE_HW))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [28, 5, 1])
@pytest.mark.parametrize("values_at_once", [mask_pasting._VALUES_AT_ONCE, 5000, 1])
def test_run_lengths_are_the_pasted_masks_from_one_half_on(dtype, side, values_at_once, monkeypatch):
    monkeypatch.setattr(mask_pasting, "_VALUES_AT_ONCE", values_at_once)
    masks, boxes = random_detections(301, side=side, dtype=dtype)
    pasted = reference_masks(masks.double(), boxes.double()).numpy()
    decided = abs(pasted - 0.5) > 1e-6
    assert decided.mean() > 0.99 and (pasted >= 0.5).any(axis=(1, 2)).sum() > 30
    codes = masks_to_rle(masks, boxes, SIZE_HW)
    for code, values, is_decided in zip(codes, pasted, decided, strict=True):
        decoded = coco_mask.decode(code)
        assert code["size"] == list(SIZE_HW) and code["counts"] == encoded(decoded)
        assert np.array_equal(decoded[is_decided], (values >= 0.5)[is_decided])


def test_run_lengths_of_large_objects_are_exact_in_float32():
    boxes = torch.tensor([[5.2, 7.1, 480.3, 300.9], [-20.0, -10.0, 700.0, 500.0], [630.1, 470.2, 640.0, 480.0]])
    masks = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    pasted = reference_masks(masks.double(), boxes.double(), (480, 640)).numpy()
    decoded = coco_mask.decode(masks_to_rle(masks, boxes, (480, 640))).transpose(2, 0, 1)
    assert (abs(pasted - 0.5) < 1e-6).sum() < 5
    assert abs(pasted - 0.5)[decoded != (pasted >= 0.5)].max(initial=0) < 1e-6


@st.composite
def detections(draw):
    """Masks, boxes and (H, W): sides from 1 on, boxes at and over borders of the image, on fractions of pixels."""
    size_hw = draw(st.tuples(st.integers(1, 13), st.integers(1, 17)))
    count, side = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    coordinate = st.integers(-40, 200).map(lambda eighths: eighths / 8) | st.sampled_from([0.0, *map(float, size_hw)])
    boxes = draw(st.lists(st.tuples(*[coordinate] * 4), min_size=count, max_size=count))
    value = st.sampled_from([0.0, 1.0, 1.0, 0.3, 0.7])
    masks = draw(st.lists(value, min_size=count * side**2, max_size=count * side**2))
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(count, 2, 2)
    boxes_xyxy = torch.cat((corners.amin(dim=1), corners.amax(dim=1)), dim=1)
    return torch.tensor(masks, dtype=torch.float64).reshape(count, 1, side, side), boxes_xyxy, size_hw


@settings(deadline=None, max_examples=50)
@given(detections())
def test_run_lengths_of_any_detections_are_those_of_their_full_images(found):
    masks, boxes, size_hw = found
    codes = masks_to_rle(masks, boxes, size_hw)
    assert len(codes) == len(masks)
    for code, mask, box in zip(codes, masks, boxes, strict=True):
        values = paste_window(mask[0], box, (0, 0, *size_hw)).numpy()
        is_decided = abs(values - 0.5) > 1e-6
        decoded = coco_mask.decode(code)
        assert code["counts"] == encoded(np.where(is_decided, values >= 0.5, decoded))


@pytest.mark.parametrize(
    ("box", "counts"),
    [
        ((-10.0, -10.0, 50.0, 50.0), [0, 23 * 31]),  # all columns in one run
        ((0.0, 0.0, 31.0, 23.0), [0, 23 * 31]),
        ((4.0, -9.0, 7.0, 40.0), [4 * 23, 3 * 23, 24 * 23]),  # three full columns
        ((-5.0, -5.0, 1.0, 1.0), [0, 1, 23 * 31 - 1]),  # the first pixel
        ((30.0, 22.0, 31.0, 23.0), [23 * 31 - 1, 1]),  # the last pixel
        ((3.0, 21.0, 5.0, 30.0), [3 * 23 + 21, 2, 21, 2, 26 * 23]),
        ((2.0, 7.0, 3.0, 7.9), [2 * 23 + 7, 1, 29 * 23 - 8]),
        ((2.0, 3.5, 3.0, 9.5), [2 * 23 + 3, 7, 29 * 23 - 10]),  # centres on both edges: one half belongs to it
        ((2.0, 7.0, 2.4, 9.0), [23 * 31]),  # no pixel's centre
        ((40.0, 2.0, 60.0, 9.0), [23 * 31]),
        ((math.nan, 2.0, 9.0, 9.0), [23 * 31]),
        ((-math.inf, -math.inf, math.inf, math.inf), [23 * 31]),
        ((9.0, 9.0, 2.0, 2.0), [23 * 31]),  # turned inside out
    ],
)
def test_run_lengths_of_full_masks_are_known(box, counts):
    masks, boxes = torch.ones(3, 1, 28, 28), torch.tensor([(2.0, 3.0, 9.0, 10.0), box, (0.0, 0.0, 31.0, 23.0)])
    code = masks_to_rle(masks, boxes, SIZE_HW)[1]
    wanted = coco_mask.frPyObjects({"size": list(SIZE_HW), "counts": counts}, *SIZE_HW)["counts"].decode()
    assert code == {"size": list(SIZE_HW), "counts": wanted}


def test_one_half_belongs_to_a_mask():
    (code,) = masks_to_rle(torch.full((1, 1, 28, 28), 0.5), torch.tensor([[-10.0, -10.0, 50.0, 50.0]]), SIZE_HW)
    assert coco_mask.area(code) == 23 * 31


def test_a_batch_of_masks_is_each_mask_alone():
    masks, boxes = random_detections(53)
    alone = [slice(index, index + 1) for index in range(53)]
    assert masks_to_rle(masks, boxes, SIZE_HW) == [masks_to_rle(masks[n], boxes[n], SIZE_HW)[0] for n in alone]
    pasted = torch.cat([paste_masks(masks[n], boxes[n], SIZE_HW) for n in alone])
    assert torch.allclose(paste_masks(masks, boxes, SIZE_HW), pasted, atol=1e-7)


def test_run_lengths_fill_the_image_whatever_a_broken_model_gives():
    masks, boxes = random_detections(31)
    masks[torch.rand(masks.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = math.nan
    for code in masks_to_rle(masks, boxes, SIZE_HW):
        assert code["counts"] == encoded(coco_mask.decode(code))


def test_run_lengths_need_no_image_of_the_full_size():
    boxes = torch.tensor([[29_000.0, 29_990.0, 29_007.0, 30_011.0]])
    (code,) = masks_to_rle(torch.ones(1, 1, 28, 28), boxes, (30_000, 30_000))  # 0.9 GB
    assert coco_mask.area(code) == 7 * 10
    assert coco_mask.toBbox(code).tolist() == [29_000, 29_990, 7, 10]


def test_pasting_leaves_its_arguments_alone():
    masks, boxes = torch.rand(2, 1, 7, 7).requires_grad_(), torch.tensor([[1.0, 2, 9, 8], [3.0, 3, 5, 5]])
    copies = masks.detach().clone(), boxes.clone()
    paste_masks(masks, boxes, SIZE_HW)
    masks_to_rle(masks, boxes, SIZE_HW)
    assert torch.equal(masks, copies[0]) and torch.equal(boxes, copies[1])
