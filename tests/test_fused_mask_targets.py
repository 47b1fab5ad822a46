import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import roi_align

from swin_dense.box_masks import BoxMasks
from swin_dense.errors import ConfigError
from swin_dense.heads.fused_mask_targets import fused_mask_targets
from swin_dense.heads.mask_targets import fused_is_right

KERNELS = ("swin_dense.heads.mask_target_kernels",)
pytestmark = pytest.mark.usefixtures("device")


def patches(size_hw, seed, count=5):
    """Rectangles of ones or noise, one at each border of the image, one without a pixel."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, *size_hw, dtype=torch.uint8)
    for row, mask in enumerate(masks):
        (top, bottom), (left, right) = (
            torch.randint(side + 1, (2,), generator=generator).sort().values.tolist() for side in size_hw
        )
        top, left = top * (row != 0), left * (row != 1)
        bottom, right = (size_hw[0] if row == 2 else bottom), (size_hw[1] if row == 3 else right)
        patch = mask[top:bottom, left:right]
        patch.copy_(torch.rand(patch.shape, generator=generator) < (1.0 if row % 2 else 0.6))
    masks[count - 1] = 0
    return masks


def boxes_near(masks, seed, count=13):
    """Boxes about objects, the farther the later; a third of them in whole pixels, a third in halves."""
    generator = torch.Generator().manual_seed(seed)
    matched = torch.randint(len(masks) - 1, (count,), generator=generator)
    packed = BoxMasks.from_full(masks)
    corner = packed.corners_xy[matched].float()
    boxes = torch.cat((corner, corner + packed.sizes_hw[matched].flip(1)), dim=1)
    boxes += torch.randn(count, 4, generator=generator) * torch.logspace(-1, 0.7, count)[:, None]
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.5)
    boxes[::3] = boxes[::3].round()
    boxes[1::3] = (boxes[1::3] * 2).round() / 2
    return boxes, matched


def averages(masks, boxes, matched, size):
    """RoIAlign of masks of the whole image."""
    aligned = [
        roi_align(masks[row][None, None].float(), [box[None]], size, sampling_ratio=0, aligned=True)[0, 0]
        for row, box in zip(matched.tolist(), boxes, strict=True)
    ]
    return torch.stack(aligned)


def on(device, masks, boxes, matched, size):
    """The targets of several images, from masks of the whole image."""
    packed = [BoxMasks.from_full(image_masks).to(device) for image_masks in masks]
    given = ([tensor.to(device) for tensor in tensors] for tensors in (boxes, matched))
    return fused_mask_targets(packed, *given, size).cpu()


@pytest.mark.parametrize(("size", "seed"), [(5, 0), (5, 1), (7, 2), (12, 3)])
def test_fused_mask_targets_equal_roi_align_of_whole_images(size, seed, device):
    masks = patches((13, 19), seed)
    boxes, matched = boxes_near(masks, seed)
    targets, wanted = on(device, [masks], [boxes], [matched], size), averages(masks, boxes, matched, size)
    assert targets.dtype == torch.float32 and 0.2 < float(targets.mean()) < 0.8
    is_clear = (wanted - 0.5).abs() > 1e-6
    assert torch.equal(targets[is_clear], (wanted >= 0.5).float()[is_clear])


ODD_BOXES = {
    "larger than the image": (-7, -5, 23, 17),
    "the image": (0, 0, 19, 13),
    "beyond the left and the top": (-4.3, -3.2, 3.1, 2.9),
    "beyond the right and the bottom": (15.7, 10.2, 23.4, 16.1),
    "a pixel outside": (-1, -1, 0, 0),
    "outside": (25, 3, 37, 11),
    "far outside": (-3e5, -2e5, -3e5 + 5, -2e5 + 3),
    "the last pixel": (18, 12, 19, 13),
    "read at -1, the first position that is read": (-1, -1, 4, 4),
    "read at the image's sides, the last ones": (16, 10, 21, 15),
    "a part of a pixel": (9.25, 9.5, 9.75, 9.625),
    "a line": (3, 7, 15, 7),
    "a point": (9, 9, 9, 9),
}


@pytest.mark.parametrize("box", ODD_BOXES.values(), ids=ODD_BOXES.keys())
def test_odd_boxes_are_cut_as_by_roi_align(box, device):
    masks = torch.stack((torch.ones(13, 19, dtype=torch.uint8), patches((13, 19), 3)[2]))
    boxes, matched = torch.tensor([box, box], dtype=torch.float32), torch.tensor([0, 1])
    wanted = averages(masks, boxes, matched, 5)
    is_clear = (wanted - 0.5).abs() > 1e-6
    assert torch.equal(on(device, [masks], [boxes], [matched], 5)[is_clear], (wanted >= 0.5).float()[is_clear])


@pytest.mark.parametrize("bin_side", [1, 2, 4])
def test_averages_of_one_half_are_objects_as_by_roi_align(bin_side, device):
    """Edges through the middle of bins, and positions that are sums of powers of two: no step is rounded."""
    masks = torch.zeros(1, 37, 41, dtype=torch.uint8)
    masks[0, 9:22, 11:31] = 1
    shift = torch.tensor([0.0, bin_side / 2])
    corners = torch.cartesian_prod(11 - bin_side - shift, 9 - bin_side - shift)
    boxes = torch.cat((corners, corners + 6 * bin_side), dim=1)
    matched = torch.zeros(4, dtype=torch.int64)
    wanted = averages(masks, boxes, matched, 6)
    assert int((wanted == 0.5).sum()) >= 6
    assert torch.equal(on(device, [masks], [boxes], [matched], 6), (wanted >= 0.5).float())


def images(seed=5):
    """Images of several sizes: with objects, without a box, without an object, without either."""
    masks = [patches((7, 17), seed), patches((13, 5), seed + 1), torch.zeros(0, 11, 13, dtype=torch.uint8)]
    boxes, matched = zip(boxes_near(masks[0], seed, 5), boxes_near(masks[1], seed, 4), strict=True)
    masks += [patches((5, 17), seed, 2), masks[2], patches((11, 7), seed + 2)]
    last_boxes, last_matched = boxes_near(masks[5], seed, 6)
    no_boxes, none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    anywhere = torch.tensor([[0.0, 0, 11, 13], [3, 4, 3, 4], [0, 0, -1, -1]])
    boxes = [*boxes, anywhere, no_boxes, no_boxes, last_boxes]
    return masks, boxes, [*matched, torch.zeros(3, dtype=torch.int64), none, none, last_matched]


def test_batch_equals_each_image_alone(device):
    masks, boxes, matched = images()
    together = on(device, masks, boxes, matched, 5)
    alone = [on(device, [one], [its_boxes], [its], 5) for one, its_boxes, its in zip(*images(), strict=True)]
    assert [len(targets) for targets in alone] == [5, 4, 3, 0, 0, 6]
    assert alone[0].any() and alone[1].any() and alone[5].any()
    assert torch.equal(together, torch.cat(alone))


def test_boxes_of_an_image_without_objects_see_nothing(device):
    nothing, everything = torch.zeros(0, 11, 13, dtype=torch.uint8), torch.ones(1, 11, 13, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 13, 11], [-1, -1, 5, 6], [3, 3, 3, 3], [0, 0, -1, -1]])
    given = [boxes] * 3, [torch.zeros(4, dtype=torch.int64)] * 3
    first, second, third = on(device, [everything, nothing, everything], *given, 7).split(4)
    assert first[0].all() and torch.equal(first, third) and not second.any()


def test_boxes_that_end_before_they_begin_or_nowhere_see_nothing(device):
    nan = float("nan")
    boxes = torch.tensor([[0, 0, -1, -1], [0, 0, 9, -40], [9, 0, -80, 9], [9, 9, -80, -40], [nan, 0, 9, 9], [nan] * 4])
    masks = torch.ones(1, 11, 13, dtype=torch.uint8)
    assert not on(device, [masks], [boxes], [torch.zeros(6, dtype=torch.int64)], 3).any()


def test_no_boxes_have_no_targets(device):
    targets = on(device, [patches((7, 5), 0)], [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], 14)
    assert targets.shape == (0, 14, 14)


def test_masks_of_some_objects_are_read_where_they_lie(device):
    masks = patches((11, 17), 7)
    boxes, matched = boxes_near(masks, 7, 5)
    rows = torch.tensor([3, 0, 2, 1])
    wanted = on(device, [masks], [boxes], [rows[matched]], 5)
    some = BoxMasks.from_full(masks).to(device)[rows]
    assert torch.equal(fused_mask_targets([some], [boxes.to(device)], [matched.to(device)], 5).cpu(), wanted)
    assert wanted.any()


def test_no_gradient_leads_to_the_boxes(device):
    masks = patches((7, 5), 0)
    boxes, matched = boxes_near(masks, 0, 3)
    assert not on(device, [masks], [boxes.requires_grad_()], [matched], 2).requires_grad


def test_operator_keeps_the_rules_of_torch(device):
    masks = patches((7, 5), 0)
    boxes, matched = (tensor.to(device) for tensor in boxes_near(masks, 0, 3))
    table = torch.tensor([[0, 3, 2, 1, 4, 7, 5]]).expand(5, 7).contiguous()
    pixels, first_rows = torch.ones(7, dtype=torch.uint8, device=device), torch.zeros(3, dtype=torch.int64)
    operator = torch.ops.swin_dense.mask_targets.default
    torch.library.opcheck(operator, (pixels, table, boxes, matched, first_rows, 2))


def test_trial_finds_the_kernel_right(device, monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    assert fused_is_right(device, 4)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_host_does_not_wait_for_the_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    masks, boxes, matched = images()
    packed = [BoxMasks.from_full(image_masks).to(device) for image_masks in masks]
    given = ([tensor.to(device) for tensor in tensors] for tensors in (boxes, matched))
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_mask_targets(packed, *given, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def call(device, dtype=torch.float32):
    masks = torch.ones(1, 3, 5, dtype=torch.uint8)
    return on(device, [masks], [torch.zeros(1, 4, dtype=dtype)], [torch.zeros(1, dtype=torch.int64)], 2)


def test_boxes_of_another_dtype_are_an_error(device):
    assert call(device).shape == (1, 2, 2)
    with pytest.raises(ConfigError, match=r"fused_mask_targets: boxes must be float32, got torch\.float64\."):
        call(device, torch.float64)


def test_devices_without_kernels_are_an_error(device, monkeypatch):
    monkeypatch.setitem(sys.modules, KERNELS[0], SimpleNamespace())  # none of them interpreted
    with pytest.raises(ConfigError, match=r"^fused_mask_targets runs on CUDA devices, got tensors on cpu\."):
        call("cpu")
