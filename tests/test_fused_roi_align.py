import sys
from types import SimpleNamespace

import pytest
import torch

from swin_dense.errors import ConfigError
from swin_dense.features import FeatureSpec
from swin_dense.heads.box_batches import EMPTY_BOX
from swin_dense.heads.fused_roi_align import fused_roi_align
from swin_dense.heads.roi_pooling import PyramidRoIAlign, fused_is_right, reference_roi_align

KERNELS = ("swin_dense.heads.roi_align_kernels",)
# numpy, which the interpreter computes with, warns where devices do not.
pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]

STRIDES = (4, 8, 16)


def pyramid(dtype=torch.float64, channels=3, batch=2):
    """Levels of an image of about 40 x 60 pixels, of unequal sizes that are no halves of each other."""
    generator = torch.Generator().manual_seed(0)
    sizes_hw = ((11, 17), (7, 5), (2, 3))
    return [torch.randn(batch, channels, *size_hw, generator=generator).to(dtype) for size_hw in sizes_hw]


def rows(boxes, dtype=torch.float64):
    """Boxes in turn of all images and levels, and these."""
    number = torch.arange(len(boxes))
    return torch.as_tensor(boxes, dtype=dtype).view(-1, 4), number % 2, number % 3


def pooled_and_gradients(align, levels, strides, of_boxes, output_size, device):
    """The result, and the gradients of its product with fixed random numbers."""
    levels = [level.detach().to(device).requires_grad_() for level in levels]
    pooled = align(levels, strides, *(tensor.to(device) for tensor in of_boxes), output_size)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(pooled, levels, upstream.to(pooled))
    return [pooled.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def assert_equal(got, wanted, tolerance):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def assert_as_level_by_level(levels, of_boxes, output_size, device, tolerance):
    got = pooled_and_gradients(fused_roi_align, levels, STRIDES, of_boxes, output_size, device)
    doubled = [level.double() for level in levels]
    of_boxes = (of_boxes[0].double(), *of_boxes[1:])
    wanted = pooled_and_gradients(reference_roi_align, doubled, STRIDES, of_boxes, output_size, "cpu")
    assert_equal(got, wanted, tolerance)


CASES = {
    "inside": [(4.2, 5.1, 17.3, 20.9), (1.5, 3.2, 27.8, 29.4), (2.0, 1.0, 40.0, 29.0)],
    "across the first borders": [(-9.3, -7.1, 15.0, 21.0), (-6.5, 9.0, 5.3, 33.3), (9.0, -17.7, 33.0, 11.0)],
    "across the last borders": [(50.3, 31.0, 77.9, 60.1), (30.1, 40.0, 51.2, 71.7), (20.0, 20.0, 90.5, 41.5)],
    "outside": [(-40.0, -30.0, -12.0, -9.0), (70.0, 80.0, 90.0, 95.0), (3.0, 60.0, 30.0, 90.0)],
    "within a cell": [(9.1, 9.2, 9.6, 9.9), (20.3, 20.1, 21.0, 24.0), (20.0, 13.0, 20.001, 13.001)],
    "samples at the first place that counts": [(-4.0, -4.0, 4.0, 4.0), (-8.0, -8.0, 8.0, 8.0), (-24.0, 8.0, 8.0, 24.0)],
    "samples at the last place that counts": [(64.0, 40.0, 72.0, 48.0), (36.0, 52.0, 44.0, 60.0)],
    "many rows of cells wide": [(-50.0, 3.0, 130.0, 9.0), (-700.0, -300.0, 500.0, 400.0), (3.0, -90.0, 9.0, 140.0)],
    "exactly as many cells as bins": [(2.0, 2.0, 10.0, 10.0), (4.0, 4.0, 20.0, 20.0), (8.0, 8.0, 40.0, 40.0)],
}


@pytest.mark.parametrize("boxes", CASES.values(), ids=CASES.keys())
def test_fused_roi_align_equals_torchvisions_level_by_level(boxes, device):
    assert_as_level_by_level(pyramid(), rows(boxes), 2, device, 1e-12)


@pytest.mark.parametrize(("output_size", "channels"), [(1, 1), (3, 5), (5, 2)])
def test_any_number_of_bins_and_channels_equals_torchvisions(output_size, channels, device):
    boxes = rows([(4.2, -5.1, 37.3, 30.9), (1.5, 3.2, 27.8, 29.4)], torch.float32)
    assert_as_level_by_level(pyramid(torch.float32, channels), boxes, output_size, device, 1e-5)


@pytest.mark.parametrize("channels", [16, 257])  # one block of channels, all of it used, and two
def test_channels_beyond_one_block_are_pooled_alike(channels, device):
    boxes = rows([(4.2, -5.1, 37.3, 30.9), (1.5, 3.2, 27.8, 29.4)], torch.float32)
    assert_as_level_by_level(pyramid(torch.float32, channels), boxes, 1, device, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("output_size", "seed"), [(2, 0), (3, 1), (4, 2), (7, 3), (9, 4), (14, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_random_boxes_equal_torchvisions(output_size, seed, dtype, tolerance, device):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(15, 2, generator=generator) * 90 - 30
    sides = 300 ** torch.rand(15, 2, generator=generator)
    boxes = torch.cat((corners, corners + sides), dim=1)
    boxes[:5] = boxes[:5].round()
    assert_as_level_by_level(pyramid(dtype), rows(boxes, dtype), output_size, device, tolerance)


def test_boxes_on_one_place_add_their_gradients(device):
    boxes = torch.tensor([(4.2, 5.1, 17.3, 20.9)] * 3, dtype=torch.float64)
    level = torch.zeros(3, dtype=torch.int64)
    assert_as_level_by_level(pyramid(), (boxes, torch.tensor([0, 1, 0]), level), 2, device, 1e-12)


def test_empty_places_of_a_batch_are_nothing_to_torchvision_as_well(device):
    assert_as_level_by_level(pyramid(), rows([EMPTY_BOX, (4.2, 5.1, 17.3, 20.9)]), 2, device, 1e-12)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box",
    [
        EMPTY_BOX,
        (0.0, 0.0, 0.0, 0.0),
        (5.0, 7.0, 5.0, 20.0),
        (20.0, 7.0, 5.0, 20.0),
        (20.0, 30.0, 5.0, 7.0),
        (NAN, 7.0, 5.0, 20.0),
        (NAN, NAN, NAN, NAN),
        (-INFINITE, 7.0, 5.0, 20.0),
        (3.0, 7.0, INFINITE, INFINITE),
    ],
)
def test_boxes_without_an_area_pool_zeros_and_leave_no_gradient(box, device):
    got = pooled_and_gradients(fused_roi_align, pyramid(torch.float32), STRIDES, rows([box] * 2), 2, device)
    assert got[0].shape == (2, 3, 2, 2)
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in got)


def test_an_enormous_box_is_bounded_by_the_map(device):
    levels = [torch.ones_like(level) for level in pyramid(torch.float32)]
    pooled = fused_roi_align(
        [level.to(device) for level in levels],
        STRIDES,
        *(tensor.to(device) for tensor in rows([(-1e9, -1e9, 1e9, 1e9)])),
        1,
    )
    assert (
        (pooled >= 0) & (pooled < 1e-3)
    ).all()  # almost all samples are outside; as many as there are would take years


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_of_the_same_values(dtype, device):
    boxes = rows([(4.2, -5.1, 37.3, 30.9), (1.5, 3.2, 27.8, 29.4)], torch.float32)
    levels = pyramid(dtype)
    got = pooled_and_gradients(fused_roi_align, levels, STRIDES, boxes, 2, device)
    exact = [level.float() for level in levels]
    wanted = pooled_and_gradients(fused_roi_align, exact, STRIDES, boxes, 2, device)
    assert got[0].dtype == torch.float32 and torch.equal(got[0], wanted[0])
    for gradient, of_floats in zip(got[1:], wanted[1:], strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, of_floats.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_boxes_in_half_precision_are_taken_as_they_are(device):
    levels, (boxes, *indices) = pyramid(torch.float32), rows([(4.25, -5.0, 37.0, 30.5)])
    got, wanted = (
        pooled_and_gradients(fused_roi_align, levels, STRIDES, (boxes.to(dtype), *indices), 1, device)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert torch.equal(got[0], wanted[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pyramid_is_pooled_alike_from_all_levels_at_once(dtype, device, monkeypatch):
    specs = {f"p{index}": FeatureSpec(3, stride) for index, stride in enumerate(STRIDES, start=2)}
    levels = {name: level.to(device) for name, level in zip(specs, pyramid(dtype), strict=True)}
    boxes = [torch.tensor([(1.0, 2, 9, 8), (2, 1, 40, 29)]), torch.tensor([EMPTY_BOX]), torch.zeros(0, 4)]
    pooler, arguments = PyramidRoIAlign(specs, 2, finest_side=14), (levels, [box.to(device) for box in boxes], [])
    wanted, got = [], []
    for is_fused, pooled in ((False, wanted), (True, got)):
        monkeypatch.setattr("swin_dense.heads.roi_pooling._is_fused", lambda *_, answer=is_fused: answer)
        pooled.append(pooler(*arguments))
    assert got[0].dtype == torch.float32
    assert_equal(got, wanted, 1e-5)


def test_trial_finds_it_right(device, monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    assert fused_is_right(device, torch.bfloat16, 1, 3, 1)


def test_no_boxes_give_no_bins_and_zero_gradients(device):
    got = pooled_and_gradients(fused_roi_align, pyramid(), STRIDES, rows([]), 7, device)
    assert got[0].shape == (0, 3, 7, 7) and got[0].dtype == torch.float64
    assert [gradient.shape[2:] for gradient in got[1:]] == [(11, 17), (7, 5), (2, 3)]
    assert not any(gradient.any() for gradient in got[1:])


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat((x, x), dim=3)[..., : x.shape[3]],
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ],
    ids=["channels last", "part of wider maps", "columns outermost"],
)
def test_any_memory_layout_gives_the_same_in_channels_last_memory(layout, device):
    levels = [level.to(device) for level in pyramid(torch.float32)]
    boxes = [tensor.to(device) for tensor in rows([(4.2, -5.1, 37.3, 30.9), (1.5, 3.2, 27.8, 29.4)])]
    wanted = fused_roi_align(levels, STRIDES, *boxes, 2)
    got = fused_roi_align([layout(level) for level in levels], STRIDES, *boxes, 2)
    assert torch.equal(got, wanted)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_gradients_come_in_channels_last_memory(device):
    levels = [level.to(device).requires_grad_() for level in pyramid(torch.bfloat16)]
    boxes = [tensor.to(device) for tensor in rows([(4.2, -5.1, 37.3, 30.9)])]
    pooled = fused_roi_align(levels, STRIDES, *boxes, 1)
    gradients = torch.autograd.grad(pooled.sum(), levels)
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients)


def test_second_derivatives_are_refused(device):
    levels = [level.to(device).requires_grad_() for level in pyramid()]
    pooled = fused_roi_align(levels, STRIDES, *(x.to(device) for x in rows([(4.2, -5.1, 37.3, 30.9)])), 1)
    gradients = torch.autograd.grad(pooled.square().sum(), levels, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradients[0].sum().backward()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # of opcheck itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_keeps_the_rules_of_torch(dtype, device):
    levels = [level.to(device).requires_grad_() for level in pyramid(dtype)[1:]]
    boxes = torch.tensor([(4.2, -5.1, 37.3, 30.9)], device=device)
    image, level = torch.tensor([1], device=device), torch.tensor([0], device=device)
    torch.library.opcheck(torch.ops.swin_dense.roi_align.default, (levels, [8, 16], boxes, image, level, 1))
    gradient = torch.ones(1, 3, 1, 1, device=device)
    sizes = (2, [level.shape[2] for level in levels], [level.shape[3] for level in levels], dtype)
    backward = torch.ops.swin_dense.roi_align_backward.default
    torch.library.opcheck(backward, (gradient, [8, 16], boxes, image, level, *sizes))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_graph_is_whole_for_all_sizes(backend, device):
    def pool(*levels_and_boxes):
        return fused_roi_align(levels_and_boxes[:3], STRIDES, *levels_and_boxes[3:], 1)

    def gradients(function, levels, of_boxes):
        levels = [level.to(device).requires_grad_() for level in levels]
        pooled = function(*levels, *(tensor.to(device) for tensor in of_boxes))
        return [pooled.detach(), *torch.autograd.grad(pooled.sum(), levels)]

    torch.compiler.reset()
    try:
        compiled = torch.compile(pool, fullgraph=True, backend=backend, dynamic=True)
        for levels, boxes in (
            (pyramid(), rows([(4.2, -5.1, 37.3, 30.9)] * 2)),
            ([level[:, :, 1:, 1:] for level in pyramid(batch=3)], rows([(1.5, 3.2, 27.8, 29.4)] * 3)),
        ):
            wanted = gradients(pool, levels, boxes)
            assert_equal(gradients(compiled, levels, boxes), wanted, 1e-12)
    finally:
        torch.compiler.reset()


def call(device, **changes):
    arguments = {
        "levels": [torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 3, 4)],
        "strides": (4, 8),
        "boxes": torch.zeros(5, 4),
        "image_of_box": torch.zeros(5, dtype=torch.int64),
        "level_of_box": torch.zeros(5, dtype=torch.int64),
        "output_size": 1,
    }
    arguments.update(changes)
    arguments["levels"] = [level.to(device) for level in arguments["levels"]]
    for name in ("boxes", "image_of_box", "level_of_box"):
        if not arguments[name].is_meta:
            arguments[name] = arguments[name].to(device)
    return fused_roi_align(**arguments)


def test_the_call_that_the_errors_below_break_is_right(device):
    assert call(device).shape == (5, 3, 1, 1)


LEVEL = torch.zeros(2, 3, 5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": [], "strides": ()}, "equally many, .* got 0 levels, strides \\(\\) and output_size 1"),
        ({"strides": (4,)}, r"equally many, .* got 2 levels, strides \(4,\) and output_size 1"),
        ({"strides": (4, 0)}, r"at least 1, got 2 levels, strides \(4, 0\)"),
        ({"output_size": 0}, "at least 1, got .* output_size 0"),
        ({"levels": [LEVEL, LEVEL[0]]}, r"each level must be \(B, C, h, w\) floats, .* got \(3, 5, 7\)"),
        ({"levels": [LEVEL, LEVEL[:, 1:]]}, r"B and C those of the first, got \(2, 2, 5, 7\) of torch.float32"),
        ({"levels": [LEVEL.int(), LEVEL.int()]}, r"each level must be .* floats, .* of torch.int32"),
        (
            {"levels": [LEVEL, LEVEL.half()]},
            "each level must be of torch.float32 on .*, as the first, got .* torch.float16",
        ),
        ({"boxes": torch.zeros(5, 5)}, r"boxes must be \(N, 4\) floats, got \(5, 5\)"),
        ({"boxes": torch.zeros(5, 4).long()}, r"boxes must be \(N, 4\) floats, got \(5, 4\) of torch.int64"),
        (
            {"image_of_box": torch.zeros(4).long()},
            r"image_of_box must be \(5,\) of int64, one for each box, got \(4,\)",
        ),
        ({"level_of_box": torch.zeros(5)}, r"level_of_box must be \(5,\) of int64, .* of torch.float32"),
        ({"boxes": torch.zeros(5, 4, device="meta")}, "boxes must be on the device of the levels, .*, got .* on meta"),
    ],
)
def test_what_does_not_fit_is_one_error(changes, message, device):
    with pytest.raises(ConfigError, match=message):
        call(device, **changes)


def test_devices_without_kernels_are_an_error(device, monkeypatch):
    monkeypatch.setitem(sys.modules, KERNELS[0], SimpleNamespace())  # none of them interpreted
    with pytest.raises(ConfigError, match=r"^fused_roi_align runs on CUDA devices, got tensors on cpu\."):
        call("cpu")
