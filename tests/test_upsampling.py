import pytest
import torch
from torch.nn import functional

from swin_dense.heads import upsampling
from swin_dense.heads.upsampling import (
    convolve_resized,
    interpolation_matrix,
    likeliest_classes,
    resize,
    resize_by_products,
    spans,
)

CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 7, 13, 31, 64]
SIZES = [((1, 1), (7, 5)), ((3, 5), (1, 1)), ((7, 13), (28, 52)), ((7, 13), (31, 17)), ((29, 31), (11, 64))]


def reference(x, size_hw):
    return functional.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)


def convolved_reference(maps, weight, size_hw):
    return functional.conv2d(torch.cat([reference(x, size_hw) for x in maps], dim=1), weight, padding="same")


def random(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def gradients_of(result, *inputs):
    return torch.autograd.grad((result * random(*result.shape, seed=7).to(result)).sum(), inputs)


def largest_difference(first, second):
    return float((first - second).abs().max().detach())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_interpolation_matrix_holds_the_weights_of_interpolate(dtype, tolerance):
    for size_in in LENGTHS:
        for size_out in LENGTHS:
            matrix = interpolation_matrix(size_in, size_out, dtype, CPU)
            units = torch.eye(size_in, dtype=torch.promote_types(dtype, torch.float32))[None]
            wanted = functional.interpolate(units, size=size_out, mode="linear", align_corners=False)[0].T
            assert matrix.dtype == dtype and matrix.shape == (size_out, size_in)
            assert largest_difference(matrix.to(wanted), wanted) <= tolerance
            assert largest_difference(matrix.to(wanted).sum(dim=1), torch.ones(size_out)) <= tolerance


def test_interpolation_matrix_is_made_once_and_serves_training_after_inference():
    with torch.inference_mode():
        matrix = interpolation_matrix(5, 17, torch.float32, CPU)
    assert matrix is interpolation_matrix(5, 17, torch.float32, CPU) and not matrix.is_inference()


@pytest.mark.parametrize("resizing", [resize, resize_by_products])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_resizing_is_that_of_interpolate_with_its_gradient(resizing, size_in, size_out):
    for x in (random(2, 3, *size_in).requires_grad_(), random(2, 3, *size_in).contiguous().requires_grad_()):
        got, wanted = resizing(x, size_out), reference(x, size_out)
        assert got.shape == wanted.shape and largest_difference(got, wanted) < 1e-12
        assert largest_difference(*gradients_of(got, x), *gradients_of(wanted, x)) < 1e-12
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_resizing_to_its_own_size_is_the_map_itself():
    x = random(2, 3, 7, 5)
    assert resize(x, (7, 5)) is x
    assert torch.equal(resize_by_products(x, (7, 5)), x)


def test_resizing_by_products_keeps_full_precision_under_autocast():
    x = random(2, 3, 7, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = resize_by_products(x, (29, 31))
    assert got.dtype == torch.float32 and largest_difference(got, reference(x, (29, 31))) < 1e-5


@pytest.mark.parametrize(("size_in", "size_out"), [(1, 7), (7, 1), (13, 52), (31, 17), (128, 512), (29, 97)])
@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_spans_are_a_line_with_all_that_it_is_made_of(size_in, size_out, length):
    matrix = interpolation_matrix(size_in, size_out, torch.float64, CPU)
    parts = list(spans(size_in, size_out, length))
    assert [cell for part in parts for cell in range(size_out)[part.cells]] == list(range(size_out))
    for cells, sources in parts:
        assert 0 < cells.stop - cells.start <= length
        others = matrix[cells].clone()
        others[:, sources] = 0
        assert not others.any() and len(range(size_in)[sources]) == sources.stop - sources.start
        assert sources.stop - sources.start <= (cells.stop - cells.start) * size_in / size_out + 3


# ---- Convolution before resizing.

PYRAMIDS = [
    [(29, 31), (15, 16), (8, 8), (4, 4)],
    [(32, 16), (16, 8), (8, 4), (4, 2)],
    [(7, 5), (1, 1), (2, 2), (3, 3), (6, 6)],
    [(3, 5), (29, 2), (3, 5)],
]


@pytest.mark.parametrize("before", [True, False, None])
@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("sizes", PYRAMIDS)
def test_convolving_resized_maps_is_that_of_their_concatenation_with_its_gradients(sizes, side, before, monkeypatch):
    if before is not None:
        monkeypatch.setattr(upsampling, "_taps_are_cheaper", lambda *_: before)
    maps = [random(2, 3 + index, *size, seed=index).requires_grad_() for index, size in enumerate(sizes)]
    weight = random(4, sum(x.shape[1] for x in maps), side, side, seed=11).contiguous().requires_grad_()
    got, wanted = convolve_resized(maps, weight, sizes[0]), convolved_reference(maps, weight, sizes[0])
    assert got.shape == wanted.shape and largest_difference(got, wanted) < 1e-11
    assert got.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(gradients_of(got, *maps, weight), gradients_of(wanted, *maps, weight), strict=True):
        assert largest_difference(ours, theirs) < 1e-11


def test_convolving_resized_maps_under_autocast_is_about_as_exact_as_that_of_their_concatenation():
    sizes = PYRAMIDS[0]
    maps = [random(2, 64, *size, seed=index, dtype=torch.float32) for index, size in enumerate(sizes)]
    weight = random(16, 256, 3, 3, seed=11, dtype=torch.float32) / 48
    exact = convolved_reference(maps, weight, sizes[0])
    with torch.autocast("cpu", torch.bfloat16):
        got, usual = (way(maps, weight, sizes[0]) for way in (convolve_resized, convolved_reference))
    assert got.dtype == torch.bfloat16
    assert (got - exact).square().mean().sqrt() < 2 * (usual - exact).square().mean().sqrt()


def test_taps_are_taken_where_that_saves_work(monkeypatch):
    seen = []
    convolve = upsampling._convolve_before_resizing
    monkeypatch.setattr(
        upsampling, "_convolve_before_resizing", lambda x, *rest: seen.append(tuple(x.shape[2:])) or convolve(x, *rest)
    )
    maps = [random(1, 256, side, side, dtype=torch.float32) for side in (16, 8, 4, 32)]
    convolve_resized(maps, random(2, 1024, 3, 3, dtype=torch.float32), (16, 16))
    assert seen == [(8, 8), (4, 4)]


# ---- Labels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [1, 5, 16, 17, 150])
@pytest.mark.parametrize("sizes_hw", [[(29, 41)], [(29, 41), (37, 23)], [(7, 11)]])
def test_likeliest_classes_are_those_of_all_logits_bit_for_bit(sizes_hw, num_classes, dtype):
    logits = random(2, num_classes, 7, 11, dtype=dtype).round(decimals=1)  # with equal ones
    whole = logits
    for size_hw in sizes_hw:
        whole = resize(whole, size_hw)
    labels = likeliest_classes(logits, sizes_hw)
    assert labels.dtype == torch.int64 and torch.equal(labels, whole.argmax(dim=1))


def test_each_class_is_resized_as_among_all_others():
    logits = random(2, 150, 31, 37, dtype=torch.float32)
    parts = [resize(part, (124, 149)) for part in logits.split(upsampling.CLASSES_AT_ONCE, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), resize(logits, (124, 149)))


def test_the_first_of_equal_classes_is_taken():
    assert not likeliest_classes(torch.zeros(1, 40, 3, 5), [(7, 11)]).any()
