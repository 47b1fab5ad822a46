import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from swin_dense.errors import ConfigError
from swin_dense.fused_window_attention import fused_window_attention
from swin_dense.windows import shift_mask, window_merge, window_partition

KERNELS = tuple(
    f"swin_dense.{name}"  # in the order in which they import each other
    for name in ("window_attention_tiles", "window_attention_kernels", "large_window_attention_kernels")
)
pytestmark = pytest.mark.usefixtures("device")

NAMES = ("out", "qkv", "padding", "bias", "logit_scale")


def attention_by_windows(qkv, padding, bias, logit_scale, window_size, shift_hw, pad_first, mask_value):
    """The same function step by step, in the dtype of its arguments."""
    batch, height, width, channels = qkv.shape
    rows, columns = -(-height // window_size), -(-width // window_size)
    padded_hw = (rows * window_size, columns * window_size)
    back_hw = (-shift_hw[0], -shift_hw[1])

    def pad(x):
        whole = padding.expand(batch, *padded_hw, channels)
        return torch.cat((torch.cat((x, whole[:, :height, width:]), dim=2), whole[:, height:]), dim=1)

    x = pad(qkv).roll(back_hw, (1, 2)) if pad_first else pad(qkv.roll(back_hw, (1, 2)))
    windows = window_partition(x, window_size).unflatten(-1, (3, bias.shape[0], -1))
    query, key, value = windows.permute(3, 0, 1, 4, 2, 5)
    if logit_scale is None:
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    else:
        query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
        logits = query @ key.transpose(-1, -2) * logit_scale[:, None, None]
    mask = shift_mask(padded_hw, window_size, shift_hw, mask_value, logits.dtype, logits.device)
    attended = (logits + bias + mask[:, None]).softmax(dim=-1) @ value
    x = window_merge(attended.transpose(2, 3).flatten(3), window_size, padded_hw)
    if pad_first:
        return x.roll(shift_hw, (1, 2))[:, :height, :width]
    return x[:, :height, :width].roll(shift_hw, (1, 2))


def random_tensors(size_hw, window_size, num_heads, head_dim, cosine, batch=1):
    generator = torch.Generator().manual_seed(0)
    area, channels = window_size**2, num_heads * head_dim
    return (
        torch.randn(batch, *size_hw, 3 * channels, generator=generator),
        torch.randn(3 * channels, generator=generator),
        torch.randn(num_heads, area, area, generator=generator),
        3 + 10 * torch.rand(num_heads, generator=generator) if cosine else None,
    )


def out_and_gradients(function, tensors, device, *settings):
    """The result, and the gradients of its product with fixed random numbers."""
    leaves = [None if t is None else t.detach().to(device, copy=True).requires_grad_() for t in tensors]
    out = function(*leaves, *settings)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], upstream)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=False))


def by_windows(tensors, *settings):
    doubled = [None if t is None else t.double() for t in tensors]
    return out_and_gradients(attention_by_windows, doubled, "cpu", *settings)


def assert_equal(got, wanted, tolerance=1e-4):
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor.cpu().double(),
            wanted[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


CASES = {
    "one window, no padding": ((7, 7), 7, 1, 16, (0, 0), True, False, 1),
    "padded, not shifted": ((9, 13), 7, 2, 16, (0, 0), True, False, 1),
    "padded, then shifted": ((9, 13), 7, 2, 16, (3, 3), True, False, 1),
    "shifted, then padded": ((9, 13), 7, 2, 16, (3, 3), False, False, 1),
    "shifted down only": ((4, 5), 3, 1, 8, (1, 0), True, False, 3),
    "shifted right only": ((2, 7), 3, 1, 24, (0, 1), False, False, 3),
    "padded rows in the last window but one": ((5, 4), 4, 1, 8, (2, 2), True, False, 1),
    "padded columns in the last window but one": ((4, 5), 4, 1, 8, (2, 2), True, False, 1),
    "version 2": ((9, 13), 7, 2, 8, (3, 3), True, True, 1),
    "version 2, shifted first": ((5, 7), 4, 3, 16, (2, 2), False, True, 1),
    "window larger than the map": ((3, 2), 7, 2, 16, (3, 3), True, False, 2),
    "window larger than the map, shifted first": ((2, 1), 7, 1, 48, (3, 3), False, False, 2),
    "window of 2": ((3, 5), 2, 1, 4, (1, 1), True, False, 1),
    "window of 5": ((7, 6), 5, 1, 32, (2, 2), True, True, 1),
    "window of 8, wide heads": ((9, 8), 8, 1, 64, (4, 4), True, False, 1),
    "window of 9, one tile and a part": ((5, 11), 9, 2, 16, (4, 4), True, True, 1),
    "window of 12": ((13, 7), 12, 1, 32, (6, 6), True, False, 1),
    "window of 12, shifted first": ((13, 7), 12, 1, 24, (6, 6), False, True, 1),
    "window of 16": ((5, 13), 16, 1, 16, (8, 8), True, True, 1),
    "window of 24": ((19, 23), 24, 1, 16, (0, 0), True, False, 1),
}


EXHAUSTIVE = {"window of 12", "window of 16", "window of 24"}  # seconds each in the interpreter


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in EXHAUSTIVE)) for name, case in CASES.items()],
)
def test_fused_window_attention_equals_attention_by_windows(case, device):
    size_hw, window_size, num_heads, head_dim, shift_hw, pad_first, cosine, batch = case
    tensors = random_tensors(size_hw, window_size, num_heads, head_dim, cosine, batch)
    settings = (window_size, shift_hw, pad_first, -100.0)
    assert_equal(out_and_gradients(fused_window_attention, tensors, device, *settings), by_windows(tensors, *settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size_hw", "window_size", "num_heads", "head_dim", "batch"),
    [
        ((5, 4), 5, 3, 12, 3),
        ((9, 13), 7, 2, 32, 3),
        ((16, 17), 8, 2, 24, 1),
        ((13, 17), 12, 1, 16, 1),
        ((17, 15), 16, 1, 48, 1),
        ((19, 23), 24, 1, 64, 1),
    ],
)
@pytest.mark.parametrize("pad_first", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_fused_window_attention_equals_attention_by_windows_in_every_combination(
    size_hw, window_size, num_heads, head_dim, batch, pad_first, cosine, device
):
    tensors = random_tensors(size_hw, window_size, num_heads, head_dim, cosine, batch)
    shift = window_size // 2
    for shift_hw in itertools.product((0, shift), repeat=2):
        settings = (window_size, shift_hw, pad_first, -100.0)
        got = out_and_gradients(fused_window_attention, tensors, device, *settings)
        assert_equal(got, by_windows(tensors, *settings))


@pytest.mark.parametrize(("size_hw", "window_size"), [((5, 7), 3), ((9, 11), 9)])
def test_infinite_mask_closes_regions(size_hw, window_size, device):
    tensors = random_tensors(size_hw, window_size, 1, 16, cosine=False)
    settings = (window_size, (window_size // 2, window_size // 2), True, float("-inf"))
    assert_equal(out_and_gradients(fused_window_attention, tensors, device, *settings), by_windows(tensors, *settings))


@pytest.mark.parametrize(
    ("dtype", "size_hw", "window_size", "num_heads", "head_dim", "cosine"),
    [
        (torch.bfloat16, (9, 6), 7, 1, 16, False),
        (torch.bfloat16, (7, 11), 9, 1, 16, False),
        (torch.bfloat16, (6, 4), 7, 6, 8, True),  # many heads, for chance decides what error one number has
        pytest.param(torch.bfloat16, (8, 5), 9, 6, 8, True, marks=pytest.mark.slow),
        (torch.float16, (6, 4), 7, 6, 8, True),
        (torch.float16, (7, 5), 9, 1, 16, False),
    ],
)
def test_half_precision_errs_less_than_twice_the_steps_in_half_precision(
    dtype, size_hw, window_size, num_heads, head_dim, cosine, device
):
    tensors = random_tensors(size_hw, window_size, num_heads, head_dim, cosine)
    half = [None if t is None else t.to(dtype) for t in tensors]
    settings = (window_size, (window_size // 2, window_size // 2), True, -100.0)
    exact = by_windows(half, *settings)
    steps = out_and_gradients(attention_by_windows, half, "cpu", *settings)
    fused = out_and_gradients(fused_window_attention, half, device, *settings)
    for name, wanted in exact.items():
        assert fused[name].dtype == dtype
        error, allowed = ((got[name].cpu().double() - wanted).norm() for got in (fused, steps))
        assert error <= 2 * allowed, name


def test_keys_of_length_zero_attend_as_normalised_ones(device):
    qkv, *others = random_tensors((5, 4), 3, 2, 8, cosine=True)
    qkv[:, 1:3, :, 16:32] = 0
    tensors = (qkv, *others)
    settings = (3, (1, 1), True, -100.0)
    got, wanted = out_and_gradients(fused_window_attention, tensors, device, *settings), by_windows(tensors, *settings)
    assert wanted["qkv"].abs().max() > 1e9  # normalising divides by 1e-12 there
    for name in ("qkv", "padding"):
        scale = wanted[name].abs().clamp(min=1)
        got[name], wanted[name] = got[name].cpu() / scale, wanted[name] / scale
    assert_equal(got, wanted)


@pytest.mark.parametrize(("size_hw", "padded"), [((4, 8), False), ((4, 7), True), ((3, 8), True)])
@pytest.mark.parametrize("pad_first", [True, False])
def test_padding_gets_a_gradient_only_through_keys_and_values_of_padded_cells(size_hw, padded, pad_first, device):
    tensors = random_tensors(size_hw, 4, 2, 8, cosine=False)
    got = out_and_gradients(fused_window_attention, tensors, device, 4, (2, 2), pad_first, -100.0)
    query, key, value = got["padding"].chunk(3)
    assert not query.any()
    assert bool(key.all()) == bool(key.any()) == padded
    assert bool(value.all()) == bool(value.any()) == padded


@pytest.mark.parametrize(("size_hw", "window_size"), [((9, 13), 7), ((7, 11), 9)])
def test_results_and_gradients_repeat_bit_for_bit(size_hw, window_size, device):
    tensors = random_tensors(size_hw, window_size, 1, 16, cosine=True)
    settings = (window_size, (window_size // 2, 0), True, -100.0)
    first, second = (out_and_gradients(fused_window_attention, tensors, device, *settings) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_equals_each_image_alone(device):
    qkv, *others = random_tensors((4, 5), 3, 1, 8, cosine=False, batch=3)
    others = [None if t is None else t.to(device) for t in others]
    together = fused_window_attention(qkv.to(device), *others, 3, (1, 1), True, -100.0)
    for image, out in zip(qkv.to(device), together, strict=True):
        assert torch.equal(fused_window_attention(image[None], *others, 3, (1, 1), True, -100.0)[0], out)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        lambda x: torch.cat((x, x), dim=3)[..., : x.shape[3]],
        lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),  # aligned to one number only
    ],
    ids=["cells outermost", "channels outermost", "part of more channels", "off by one"],
)
def test_any_memory_layout_gives_the_same(layout, device):
    qkv, padding, bias, _ = (t if t is None else t.to(device) for t in random_tensors((2, 5), 3, 2, 16, False, batch=2))
    settings = (padding, bias, None, 3, (1, 1), True, -100.0)
    wanted = fused_window_attention(qkv, *settings)
    out = fused_window_attention(layout(qkv), *settings)
    assert torch.equal(layout(qkv), qkv) and torch.equal(out, wanted)
    assert out.is_contiguous()


@pytest.mark.parametrize("cosine", [True, False])
def test_no_images_give_no_results_and_zero_gradients(cosine, device):
    tensors = random_tensors((5, 7), 3, 2, 8, cosine, batch=0)
    got = out_and_gradients(fused_window_attention, tensors, device, 3, (1, 1), True, -100.0)
    assert got["out"].shape == (0, 5, 7, 16) and got["qkv"].shape == (0, 5, 7, 48)
    assert not any(got[name].any() for name in got)


def test_parameters_in_float32_serve_a_map_in_bfloat16(device):
    qkv, padding, bias, scale = random_tensors((4, 5), 3, 2, 8, cosine=True)
    tensors = (qkv.bfloat16(), padding, bias, scale)
    got = out_and_gradients(fused_window_attention, tensors, device, 3, (1, 1), True, -100.0)
    assert [tensor.dtype for tensor in got.values()] == [torch.bfloat16] * 2 + [torch.float32] * 3
    rounded = (qkv.bfloat16().float(), padding.bfloat16().float(), bias, scale)
    wanted = by_windows(rounded, 3, (1, 1), True, -100.0)
    assert_equal({"bias": got["bias"]}, {"bias": wanted["bias"]}, tolerance=0.02)


def test_checkpoint_recomputes_the_same_gradients(device):
    tensors = random_tensors((2, 4), 3, 2, 8, cosine=True)
    settings = (3, (1, 1), True, -100.0)
    wanted = out_and_gradients(fused_window_attention, tensors, device, *settings)

    def recomputed(*arguments):
        return checkpoint(fused_window_attention, *arguments, use_reentrant=False)

    got = out_and_gradients(recomputed, tensors, device, *settings)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_second_derivatives_are_refused(device):
    qkv, padding, bias, _ = (t if t is None else t.to(device) for t in random_tensors((2, 3), 2, 1, 8, False))
    out = fused_window_attention(qkv.requires_grad_(), padding, bias, None, 2, (0, 0), True, -100.0)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # of opcheck itself
@pytest.mark.parametrize("cosine", [pytest.param(True, marks=pytest.mark.slow), False])
def test_operator_keeps_the_rules_of_torch(cosine, device):
    leaves = [
        None if t is None else t.to(device).requires_grad_() for t in random_tensors((2, 4), 3, 2, 8, cosine, batch=2)
    ]
    torch.library.opcheck(torch.ops.swin_dense.window_attention.default, (*leaves, 3, 1, 1, True, -100.0))
    out, log_sums = torch.ops.swin_dense.window_attention(*leaves, 3, 1, 1, True, -100.0)
    saved = [None if t is None else t.detach() for t in (torch.ones_like(out), out, log_sums, *leaves)]
    backward = torch.ops.swin_dense.window_attention_backward.default
    torch.library.opcheck(backward, (*saved, 3, 1, 1, True, -100.0))


class Attention(torch.nn.Module):
    settings = (3, (1, 1), True, -100.0)

    def forward(self, qkv, padding, bias, logit_scale):
        return fused_window_attention(qkv, padding, bias, logit_scale, *self.settings)


def num_operators(graph):
    return [node.target for node in graph.nodes].count(torch.ops.swin_dense.window_attention.default)


def test_compiled_graph_has_one_operator_for_all_sizes(device):
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(num_operators(graph_module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)

    torch.compiler.reset()
    try:
        compiled = torch.compile(Attention(), fullgraph=True, backend=backend, dynamic=True)
        for size_hw in ((4, 5), (5, 7)):
            tensors = random_tensors(size_hw, 3, 2, 8, cosine=True)
            got, wanted = out_and_gradients(compiled, tensors, device), by_windows(tensors, *Attention.settings)
            assert_equal(got, wanted)
    finally:
        torch.compiler.reset()
    assert graphs == [1]


def test_exported_program_has_one_operator(device):
    tensors = [t.to(device) for t in random_tensors((4, 5), 3, 2, 8, cosine=True)]
    sides = {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    program = torch.export.export(Attention(), tuple(tensors), dynamic_shapes=(sides, None, None, None))
    assert num_operators(program.graph) == 1
    larger = random_tensors((7, 8), 3, 2, 8, cosine=True)[0].to(device)
    assert torch.equal(program.module()(larger, *tensors[1:]), Attention()(larger, *tensors[1:]))


def call(device, **changes):
    arguments = {
        "qkv": torch.zeros(1, 4, 5, 48),
        "padding": torch.zeros(48),
        "bias": torch.zeros(2, 9, 9),
        "logit_scale": None,
        "window_size": 3,
        "shift_hw": (1, 1),
        "pad_first": True,
        "mask_value": -100.0,
    }
    arguments.update(changes)
    for name, value in arguments.items():
        if torch.is_tensor(value) and not value.is_meta:
            arguments[name] = value.to(device)
    return fused_window_attention(**arguments)


def test_the_call_that_the_errors_below_break_is_right(device):
    assert call(device).shape == (1, 4, 5, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qkv": torch.zeros(4, 5, 48)},
            r"qkv must be \(B, H, W, 3 C\) of float32, .*, got \(4, 5, 48\) of torch.float32",
        ),
        ({"qkv": torch.zeros(1, 4, 5, 47)}, r"qkv must be .*, got \(1, 4, 5, 47\)"),
        ({"qkv": torch.zeros(1, 4, 5, 48).double()}, r"qkv must be .*, got \(1, 4, 5, 48\) of torch.float64"),
        ({"padding": torch.zeros(16)}, r"padding must be \(48,\) floats, one for each channel of qkv, got \(16,\)"),
        (
            {"bias": torch.zeros(2, 9, 8)},
            r"bias must be \(num_heads, 9, 9\) floats for windows of side 3, got \(2, 9, 8\)",
        ),
        ({"bias": torch.zeros(2, 9, 9).long()}, r"bias must be .* floats .*, got \(2, 9, 9\) of torch.int64"),
        (
            {"bias": torch.zeros(3, 9, 9)},
            r"bias must be of num_heads that divide C = 16 into at most 64 .*, got \(3, 9, 9\)",
        ),
        ({"bias": torch.zeros(1, 9, 9), "qkv": torch.zeros(1, 4, 5, 198), "padding": torch.zeros(198)}, "at most 64"),
        ({"logit_scale": torch.zeros(2, 1, 1)}, r"logit_scale must be \(2,\) floats or None, got \(2, 1, 1\)"),
        ({"shift_hw": (0, 3)}, r"shift_hw must be two numbers from 0 to 2, got \(0, 3\)"),
        ({"shift_hw": (-1, 0)}, r"shift_hw must be two numbers from 0 to 2, got \(-1, 0\)"),
    ],
)
def test_what_does_not_fit_is_one_error(changes, message, device):
    with pytest.raises(ConfigError, match=message):
        call(device, **changes)


def test_tensors_of_two_devices_are_an_error():
    with pytest.raises(ConfigError, match="padding must be on the device of qkv, cpu, got meta"):
        call("cpu", padding=torch.zeros(48, device="meta"))


def test_importing_does_not_import_triton():
    code = "import sys, swin_dense.fused_window_attention; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_devices_without_kernels_are_an_error(device, monkeypatch):
    monkeypatch.setitem(sys.modules, KERNELS[1], SimpleNamespace())  # none of them interpreted
    with pytest.raises(ConfigError, match=r"^fused_window_attention runs on CUDA devices, got tensors on cpu\."):
        call("cpu")
