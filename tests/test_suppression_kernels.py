import pytest
import torch

from swin_dense.heads.grouped_suppression import grouped_nms, kernel_is_right, nms_by_kernel, nms_group_by_group

KERNELS = ("swin_dense.heads.suppression_kernels",)
# numpy, which the interpreter computes with, warns where devices do not.
pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]


def crowd(sizes, spread=20.0, num_scores=1000, seed=0, dtype=torch.float32):
    """Boxes that overlap some others, in groups whose rows are mixed; of some scores many."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    corner = spread * torch.rand(count, 2, generator=generator, dtype=dtype)
    boxes = torch.cat((corner, corner + 5 + 11 * torch.rand(count, 2, generator=generator, dtype=dtype)), dim=1)
    scores = torch.randint(0, num_scores, (count,), generator=generator).to(dtype)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return boxes, scores, groups[torch.randperm(count, generator=generator)]


def assert_equal(device, tensors, num_groups, iou):
    """The kernel keeps what torchvision does, and both some but not all; returns that."""
    wanted = nms_group_by_group(*tensors, num_groups, iou)
    keep = nms_by_kernel(*(tensor.to(device) for tensor in tensors), num_groups, iou)
    assert keep.device.type == device.type and keep.dtype == torch.bool
    assert torch.equal(keep.cpu(), wanted)
    return wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "spread", "num_scores"),
    [
        ((7, 0, 1, 43, 2, 0, 13, 0), 5.0, 1000),
        ((7, 0, 1, 43, 2, 0, 13, 0), 5.0, 3),
        ((31, 32, 33, 63, 64, 65), 5.0, 1000),  # about the sides of tiles
        ((3, 331), 20.0, 1000),  # few stay of many
        ((331,), 90.0, 5),  # many stay
    ],
)
def test_kernel_keeps_what_torchvision_keeps_of_each_group_alone(sizes, spread, num_scores, dtype, device):
    wanted = assert_equal(device, crowd(sizes, spread, num_scores, dtype=dtype), len(sizes), 0.3)
    assert 3 < wanted.sum() < len(wanted) - 3


def test_longest_chain_of_dependence_is_followed(device):
    """Each box overlaps the next alone, across blocks too: every second one stays."""
    left = 2.0 * torch.arange(197)
    boxes = torch.stack((left, torch.zeros(197), left + 3, torch.ones(197)), dim=1)
    wanted = assert_equal(device, (boxes, -left, torch.zeros(197, dtype=torch.int64)), 1, 0.15)
    assert torch.equal(wanted, torch.arange(197) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps_at_the_threshold_are_rounded_as_torchvisions(dtype, device):
    """Pairs of boxes as wide as n and m have the IoU m / n, among them all tenths."""
    long, short = torch.tril_indices(11, 11, offset=-1) + 1
    left, zeros = 13 * torch.arange(len(long)), torch.zeros_like(long)
    boxes = torch.cat([torch.stack((left, zeros, left + width, zeros + 1), dim=1) for width in (long, short)])
    scores = torch.cat((zeros + 1.0, zeros))
    for tenths in range(11):
        assert_equal(device, (boxes.to(dtype), scores, torch.zeros_like(boxes[:, 0])), 1, tenths / 10)


def test_every_step_is_rounded_as_torchvisions(device):
    """Corners in thirds, of which many overlap by a threshold but for what is rounded."""
    boxes, scores, groups = crowd((131,))
    for iou in (1 / 3, 0.5):
        assert_equal(device, ((boxes / 2).round() / 3, scores, groups), 1, iou)


def test_boxes_without_area_upside_down_or_not_finite_are_torchvisions(device):
    inf, nan = float("inf"), float("nan")
    rows = [
        *([3, 4, 3, 4], [3, 4, 3, 9], [0, 4, 9, 4], [0, 0, 0, 0]),
        *([9, 0, 0, 9], [9, 9, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9]),
        *([0, 0, inf, 9], [-inf, 0, 9, 9], [nan, 0, 9, 9], [0, 0, 1e30, 1e30], [1e-30, 0, 1e-25, 1e-25]),
    ]
    odd = torch.tensor(rows)
    boxes, groups = odd.repeat(2, 1), torch.zeros(2 * len(odd), dtype=torch.int64)
    for scores in (torch.arange(len(boxes)), -torch.arange(len(boxes))):
        for iou in (0.0, 0.5):
            assert_equal(device, (boxes, scores.float(), groups), 1, iou)


def test_empty_places_neither_stay_nor_suppress(device):
    boxes, scores, groups = crowd((7, 0, 71, 5))
    scores[::3] = -float("inf")
    groups[1::5] = -1
    groups[2::7] = 4
    wanted = assert_equal(device, (boxes, scores, groups), 4, 0.4)
    assert wanted.any() and not wanted[::3].any()


def test_nothing_is_kept_of_nothing(device):
    boxes, scores, groups = (tensor.to(device) for tensor in crowd((5, 2)))
    assert nms_by_kernel(boxes[:0], scores[:0], groups[:0], 3, 0.5).shape == (0,)
    assert not nms_by_kernel(boxes, scores, groups, 0, 0.5).any()
    assert not nms_by_kernel(boxes, torch.full_like(scores, -float("inf")), groups, 2, 0.5).any()


def test_any_memory_layout_gives_the_same(device):
    boxes, scores, groups = (tensor.to(device) for tensor in crowd((5, 31)))
    wanted = nms_by_kernel(boxes, scores, groups, 2, 0.4)
    spread = boxes.T.contiguous().T, scores[:, None].repeat(1, 2)[:, 0], groups[:, None].repeat(1, 2)[:, 1]
    assert torch.equal(nms_by_kernel(*spread, 2, 0.4), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trial_finds_the_kernel_right(dtype, device, monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    assert kernel_is_right(device, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_is_waited_for_on_a_gpu():
    tensors = [tensor.cuda() for tensor in crowd((2003, 0, 997), 100.0)]
    first = grouped_nms(*tensors, 3, 0.7)  # compiles, and tries the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = grouped_nms(*tensors, 3, 0.7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)
