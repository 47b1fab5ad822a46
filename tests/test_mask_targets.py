from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align

from swin_dense.box_masks import BoxMasks
from swin_dense.heads import mask_targets as module
from swin_dense.heads.mask_targets import (
    batch_mask_targets,
    fused_is_right,
    mask_targets,
    mask_targets_image_by_image,
    resampled_masks,
)

SIZE_HW = (83, 131)


def noise_masks(count=13, seed=0):
    """Noise in rectangles of all sizes, some at each border of the image, one over all of it, one without a pixel."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, *SIZE_HW, dtype=torch.uint8)
    for row, mask in enumerate(masks):
        y, x = (torch.randint(side, (2,), generator=generator).sort().values.tolist() for side in SIZE_HW)
        if row in (0, 1, 2, 3, 4):
            y[0], x[0] = y[0] * (row not in (0, 4)), x[0] * (row not in (1, 4))
            y[1], x[1] = SIZE_HW[0] if row in (2, 4) else y[1], SIZE_HW[1] if row in (3, 4) else x[1]
        patch = mask[y[0] : y[1], x[0] : x[1]]
        patch.copy_((torch.rand(patch.shape, generator=generator) > 0.4).to(torch.uint8))
    masks[5] = 0
    return masks


def boxes_around(masks, seed=1, count=200):
    """Boxes near objects and anywhere, within the image, at its borders and beyond them."""
    generator = torch.Generator().manual_seed(seed)
    matched = torch.randint(len(masks), (count,), generator=generator)
    packed = BoxMasks.from_full(masks)
    corner = packed.corners_xy[matched].double()
    boxes = torch.cat((corner, corner + packed.sizes_hw[matched].flip(1)), dim=1)
    boxes += torch.randn(count, 4, generator=generator).double() * torch.logspace(-1, 1.5, count)[:, None]
    boxes[::3] = boxes[::3].round()
    boxes[:50, 0::2] = boxes[:50, 0::2].clamp(0, SIZE_HW[1])
    boxes[:50, 1::2] = boxes[:50, 1::2].clamp(0, SIZE_HW[0])
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.5)
    boxes[-4:] = torch.tensor([[0, 0, 131, 83], [-9, -7, 160, 99], [130.4, 82.2, 131, 83], [0, 0, 0.5, 0.5]])
    return boxes, matched


def from_full_frames(masks, boxes, matched, size):
    aligned = [
        roi_align(masks[row][None, None].to(boxes.dtype), [box[None]], size, sampling_ratio=0, aligned=True)[0, 0]
        for row, box in zip(matched.tolist(), boxes, strict=True)
    ]
    return torch.stack(aligned)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("pixels_at_once", [2**22, 300])
def test_resampled_masks_equal_those_of_full_frames(dtype, tolerance, pixels_at_once, monkeypatch):
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", pixels_at_once)
    masks = noise_masks()
    boxes, matched = boxes_around(masks)
    boxes = boxes.to(dtype)
    wanted = from_full_frames(masks, boxes, matched, 28)
    got = resampled_masks(BoxMasks.from_full(masks), boxes, matched, 28)
    assert got.dtype == dtype and float(wanted.std()) > 0.1
    assert float((got - wanted).abs().max()) <= tolerance


def test_mask_targets_are_the_resampled_masks_from_one_half_on():
    masks = noise_masks()
    boxes, matched = boxes_around(masks)
    packed = BoxMasks.from_full(masks)
    targets = mask_targets(packed, boxes, matched, 28)
    assert targets.shape == (200, 28, 28) and targets.unique().tolist() == [0, 1]
    assert torch.equal(targets, (resampled_masks(packed, boxes, matched, 28) >= 0.5).double())


def test_mask_targets_of_a_whole_cell_box_are_the_mask_itself():
    masks = torch.zeros(2, 40, 50, dtype=torch.uint8)
    masks[1, 7:21, 30:44] = noise_masks()[4, :14, :14]
    boxes, matched = torch.tensor([[30.0, 7, 44, 21]]), torch.tensor([1])
    packed, before = BoxMasks.from_full(masks), boxes.clone()
    assert torch.equal(mask_targets(packed, boxes, matched, 14)[0], masks[1, 7:21, 30:44].float())
    assert torch.equal(boxes, before) and torch.equal(packed.full(), masks)


def test_mask_targets_of_no_boxes_are_none():
    targets = mask_targets(BoxMasks.from_full(noise_masks()), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 28)
    assert targets.shape == (0, 28, 28)


def test_mask_targets_of_an_image_without_objects_are_zeros():
    boxes, matched = boxes_around(noise_masks(), count=7)
    nothing = BoxMasks.from_full(torch.zeros(0, *SIZE_HW, dtype=torch.uint8))
    targets = mask_targets(nothing, boxes, torch.zeros_like(matched), 28)
    assert targets.shape == (7, 28, 28) and targets.dtype == boxes.dtype and not targets.any()


def test_batch_mask_targets_are_those_of_each_image():
    noise, other, nothing = noise_masks(), noise_masks(7, seed=3), torch.zeros(0, 17, 19, dtype=torch.uint8)
    masks = [BoxMasks.from_full(image_masks) for image_masks in (noise, nothing, other, noise)]
    (first, matched), (second, its_matched) = boxes_around(noise, count=31), boxes_around(other, count=29)
    boxes = [first, torch.ones(3, 4).double(), second, torch.zeros(0, 4).double()]
    objects = [matched, torch.zeros(3, dtype=torch.int64), its_matched, torch.zeros(0, dtype=torch.int64)]
    batch = batch_mask_targets(masks, boxes, objects, 14)
    alone = [mask_targets(*image, 14) for image in zip(masks, boxes, objects, strict=True)]
    assert batch.shape == (63, 14, 14) and torch.equal(batch, torch.cat(alone))
    assert alone[0].any() and alone[2].any()


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    return lambda: fused_is_right(torch.device("cpu"), 14)


def test_fused_targets_are_used_where_they_equal_those_of_each_image(tried, monkeypatch):
    monkeypatch.setattr(module, "fused_mask_targets", mask_targets_image_by_image)
    assert tried()


def test_fused_targets_that_miss_averages_of_one_half_are_left_for_those_of_each_image(tried, monkeypatch):
    def fused(masks, boxes, matched, size):
        averages = [resampled_masks(*image, size) for image in zip(masks, boxes, matched, strict=True)]
        return (torch.cat(averages) > 0.5).float()

    monkeypatch.setattr(module, "fused_mask_targets", fused)
    with pytest.warns(UserWarning, match="cut image by image, which is slower: the kernel for all images is off by"):
        assert not tried()


def test_fused_targets_are_for_boxes_in_float32_on_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "fused_is_right", lambda *kind: asked.append(kind) or True)
    boxes = SimpleNamespace(is_cuda=True, device="cuda:1", dtype=torch.float32)
    assert module._is_fused(boxes, 28) and asked == [("cuda:1", 28)]
    assert not module._is_fused(SimpleNamespace(is_cuda=True, device="cuda:1", dtype=torch.float64), 28)
    assert not module._is_fused(torch.zeros(3, 4), 28)
    with FlopCounterMode(display=False):
        assert not module._is_fused(boxes, 28)


def test_windows_grow_with_the_objects_not_with_the_image(monkeypatch):
    cut = []
    windows = BoxMasks.windows
    monkeypatch.setattr(BoxMasks, "windows", lambda *given: cut.append((len(given[1]), given[3])) or windows(*given))
    crops = [torch.ones(side, 3 * side, dtype=torch.uint8) for side in (1, 2, 5, 11, 23, 37)]
    packed = BoxMasks.from_crops(crops, [(100, 200)] * 6, (3000, 4000))
    boxes = torch.tensor([[100.0, 200, 160, 220]] * 12)
    mask_targets(packed, boxes, torch.arange(12) % 6, 28)
    assert sum(count for count, _ in cut) == 6  # each object once, however many boxes it has
    areas = sum((side + 2) * (3 * side + 2) for side in (1, 2, 5, 11, 23, 37))
    assert sum(count * height * width for count, (height, width) in cut) <= 4 * areas
