import itertools

import pytest
import torch

from swin_dense import gathered_window_attention as gathered
from swin_dense.gathered_window_attention import gathered_window_attention
from swin_dense.gathered_windows import cells_of_windows
from swin_dense.window_attention import reference_window_attention
from swin_dense.windows import ShiftedWindows

# (images, height, width, window, heads, channels of a head)
MAPS = [(2, 5, 7, 3, 2, 4), (1, 6, 6, 3, 3, 2), (3, 9, 4, 7, 1, 5), (1, 13, 11, 4, 2, 3), (0, 4, 4, 2, 1, 2)]
SHIFTS = [(0, 0), (1, 1), (0, 1), (2, 0)]


@pytest.fixture(params=[1, 400, gathered._LOGITS_AT_ONCE], autouse=True)
def logits_at_once(request, monkeypatch):
    monkeypatch.setattr(gathered, "_LOGITS_AT_ONCE", request.param)


def inputs(sizes, cosine, dtype=torch.float64, seed=0):
    batch, height, width, window, heads, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, height, width, 3 * heads * channels), (3 * heads * channels,), (heads, window**2, window**2)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values += [torch.rand(heads, generator=generator, dtype=torch.float64) * 5] if cosine else []
    return [value.to(dtype).requires_grad_() for value in values]


def attend(attention, values, windows):
    qkv, padding, bias, *scale = values
    return attention(qkv, padding, bias, scale[0] if scale else None, windows)


@pytest.mark.parametrize("sizes", MAPS)
@pytest.mark.parametrize("cosine", [False, True])
def test_value_and_gradients_are_the_references(sizes, cosine):
    for shift_hw, pad_first in itertools.product(SHIFTS, (True, False)):
        windows = ShiftedWindows(sizes[3], shift_hw, pad_first, -3.0)
        if max(shift_hw) >= windows.window_size:
            continue
        values = inputs(sizes, cosine)
        wanted = attend(reference_window_attention, values, windows)
        got = attend(gathered_window_attention, values, windows)
        direction = torch.randn_like(wanted)
        assert torch.allclose(got, wanted, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(got, values, direction),
            torch.autograd.grad(wanted, values, direction, allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            assert torch.allclose(one, other, atol=1e-12), (windows, one.shape)
        with torch.no_grad():
            assert torch.allclose(attend(gathered_window_attention, values, windows), wanted, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True])
def test_bfloat16_is_as_near_as_the_reference(cosine):
    sizes, windows = (2, 9, 10, 7, 3, 8), ShiftedWindows(7, (3, 3), True, -100.0)
    exact = attend(reference_window_attention, inputs(sizes, cosine), windows)
    values = inputs(sizes, cosine, torch.bfloat16)
    errors = [
        (attend(attention, values, windows).double() - exact).abs().max()
        for attention in (gathered_window_attention, reference_window_attention)
    ]
    assert 0 < errors[0] <= 2 * errors[1]


def test_autocast_does_not_reach_inside():
    sizes, windows = (1, 5, 4, 3, 2, 4), ShiftedWindows(3, (1, 1), True, -100.0)
    values = inputs(sizes, False, torch.float32)
    plain = attend(gathered_window_attention, values, windows)
    with torch.autocast("cpu", torch.bfloat16):
        under = attend(gathered_window_attention, values, windows)
        assert torch.equal(under, plain)
        for one, other in zip(
            torch.autograd.grad(under.sum(), values), torch.autograd.grad(plain.sum(), values), strict=True
        ):
            assert torch.equal(one, other)


def test_gradient_of_half_precision_maps_with_a_float32_bias():
    sizes, windows = (1, 5, 4, 3, 2, 4), ShiftedWindows(3, (1, 1), True, -100.0)
    qkv, padding, bias = inputs(sizes, False, torch.bfloat16)
    bias = bias.detach().float().requires_grad_()
    gradients = torch.autograd.grad(
        gathered_window_attention(qkv, padding, bias, None, windows).float().square().sum(), (qkv, padding, bias)
    )
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("sizes", [(2, 5, 7, 3, 2, 4), (1, 6, 6, 3, 3, 2), (0, 4, 4, 2, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compilers_are_told_what_operators_return(sizes, dtype):
    windows = ShiftedWindows(sizes[3], (1, 0), True, -100.0)
    values = [value.detach() for value in inputs(sizes, False, dtype)]
    checks = ("test_schema", "test_faketensor")
    for operator in (gathered._attend_operator, gathered._attend_and_keep_operator):
        torch.library.opcheck(operator, (*values, 0.5, *windows), test_utils=checks)
    out, *kept = gathered._attend_and_keep(*values, 0.5, *windows)
    torch.library.opcheck(gathered._attend_backward_operator, (out, *kept, 0.5, *windows), test_utils=checks)


def test_indices_first_made_in_inference_mode_serve_training():
    cells_of_windows.cache_clear()
    sizes, windows = (1, 5, 4, 3, 2, 4), ShiftedWindows(3, (1, 1), True, -100.0)
    with torch.inference_mode():
        attend(gathered_window_attention, inputs(sizes, False), windows)
    values = inputs(sizes, False)
    attend(gathered_window_attention, values, windows).sum().backward()
    assert values[0].grad.isfinite().all()
