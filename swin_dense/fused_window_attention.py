"""Shifted-window attention in one pass over memory: Triton kernels as one torch operator.

The same function as `window_attention.reference_window_attention`, which pads, rolls, cuts, attends, joins and rolls
back, but queries, keys and values are read where they lie in the map and results written to theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from swin_dense.errors import ConfigError
from swin_dense.kernel_import import import_kernels
from swin_dense.windows import SizeHW, windows_of_a_map

LARGEST_HEAD_DIM = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_BLOCK = 64  # cells of a tile: windows up to 8 x 8 are one tile
# Programs per multiprocessor: two rounds of what its registers hold; one where each program writes partial sums.
_FORWARD_PROGRAMS = 8
_GRADIENT_PROGRAMS = 2


def fused_window_attention(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    window_size: int,
    shift_hw: SizeHW,
    pad_first: bool,
    mask_value: float,
) -> Tensor:
    """Attend within the windows of a padded, shifted map that is never built.

    Runs on CUDA devices, and on the CPU in Triton's interpreter. Differentiable once, in all tensors. Logits, softmax
    and all sums are float32; results and gradients repeat bit for bit on one device.

    Args:
        qkv: (B, H, W, 3 C) float32, bfloat16 or float16: queries, keys and values in turn, each head by head, of the
            map as it is, neither padded nor rolled.
        padding: (3 C,), what a padded cell holds: the bias of the projection to `qkv`, zeros without one.
        bias: (num_heads, M M, M M), added to the logits.
        logit_scale: (num_heads,), the factors of the cosines of queries and keys (Swin V2); None is their products
            over the root of the head's channels.
        window_size: M, in cells.
        shift_hw: By how many cells the map is rolled up and left, below M; 0 is no shift along that side.
        pad_first: True pads the map at the bottom and the right to multiples of M, then rolls it; False rolls, then
            pads.
        mask_value: What is added to the logit of two cells that only the roll made neighbours.

    Returns:
        (B, H, W, C), contiguous, of the dtype of `qkv`.

    Raises:
        ConfigError: A shape, a dtype or a device does not fit, or Triton is missing.
    """
    _check(qkv, padding, bias, logit_scale, window_size, shift_hw)
    out, _ = _window_attention(
        qkv, padding.to(qkv.dtype), bias, logit_scale, window_size, shift_hw[0], shift_hw[1], pad_first, mask_value
    )
    return out


def _check(
    qkv: Tensor, padding: Tensor, bias: Tensor, logit_scale: Tensor | None, window_size: int, shift_hw: SizeHW
) -> None:
    if qkv.ndim != 4 or qkv.shape[3] == 0 or qkv.shape[3] % 3 != 0 or qkv.dtype not in _DTYPES:
        raise _unfit("qkv", "(B, H, W, 3 C) of float32, bfloat16 or float16", qkv)
    channels, area = qkv.shape[3] // 3, window_size * window_size
    if padding.shape != qkv.shape[3:] or not padding.is_floating_point():
        raise _unfit("padding", f"({3 * channels},) floats, one for each channel of qkv", padding)
    if bias.ndim != 3 or bias.shape[1:] != (area, area) or not bias.is_floating_point():
        raise _unfit("bias", f"(num_heads, {area}, {area}) floats for windows of side {window_size}", bias)
    num_heads = bias.shape[0]
    if num_heads == 0 or channels % num_heads != 0 or channels // num_heads > LARGEST_HEAD_DIM:
        wanted = f"of num_heads that divide C = {channels} into at most {LARGEST_HEAD_DIM} channels each"
        raise _unfit("bias", wanted, bias)
    if logit_scale is not None and (logit_scale.shape != (num_heads,) or not logit_scale.is_floating_point()):
        raise _unfit("logit_scale", f"({num_heads},) floats or None", logit_scale)
    if min(shift_hw) < 0 or max(shift_hw) >= window_size:
        raise ConfigError(
            f"fused_window_attention: shift_hw must be two numbers from 0 to {window_size - 1}, got {shift_hw}."
        )
    for name, tensor in (("padding", padding), ("bias", bias), ("logit_scale", logit_scale)):
        if tensor is not None and tensor.device != qkv.device:
            raise ConfigError(
                f"fused_window_attention: {name} must be on the device of qkv, {qkv.device}, got {tensor.device}."
            )


def _unfit(name: str, wanted: str, got: Tensor) -> ConfigError:
    return ConfigError(f"fused_window_attention: {name} must be {wanted}, got {tuple(got.shape)} of {got.dtype}.")


@torch.library.custom_op("swin_dense::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    window_size: int,
    shift_y: int,
    shift_x: int,
    pad_first: bool,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    """The result and, for its gradient, the log-sum-exp of every query's logits, (num_heads, windows, M M)."""
    out, log_sums = _empty_results(qkv, bias, window_size)
    if out.numel() > 0:
        launcher = _launcher(qkv, padding, bias, logit_scale, window_size, (shift_y, shift_x), pad_first, mask_value)
        runs = launcher.num_runs(launcher.num_tiles, _FORWARD_PROGRAMS)
        kernel = launcher.kernels("window_attention_kernels").forward_kernel
        launcher.launch(kernel, launcher.num_tiles, runs, out=out, log_sums=log_sums)
    return out, log_sums


@_window_attention.register_fake
def _(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    window_size: int,
    shift_y: int,
    shift_x: int,
    pad_first: bool,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    return _empty_results(qkv, bias, window_size)


def _empty_results(qkv: Tensor, bias: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = qkv.shape
    num_windows = batch * windows_of_a_map((height, width), window_size)
    log_sums = qkv.new_empty((bias.shape[0], num_windows, window_size * window_size), dtype=torch.float32)
    return qkv.new_empty((batch, height, width, channels // 3)), log_sums


@torch.library.custom_op("swin_dense::window_attention_backward", mutates_args=())
def _window_attention_backward(
    out_gradient: Tensor,
    out: Tensor,
    log_sums: Tensor,
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    window_size: int,
    shift_y: int,
    shift_x: int,
    pad_first: bool,
    mask_value: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qkv, padding, bias and logit_scale; the last is empty without one."""
    if out.numel() == 0:
        gradients = _empty_gradients(qkv, padding, bias, logit_scale)
        return gradients[0], gradients[1].zero_(), gradients[2].zero_(), gradients[3].zero_()
    launcher = _launcher(qkv, padding, bias, logit_scale, window_size, (shift_y, shift_x), pad_first, mask_value)
    qkv_gradient = _contiguous_like(qkv)
    tensors = {"out_gradient": out_gradient.contiguous(), "log_sums": log_sums, "qkv_gradient": qkv_gradient}
    if launcher.num_tiles == 1:
        padding_parts, bias_parts, scale_parts = _small_window_gradients(launcher, tensors)
    else:
        padding_parts, bias_parts, scale_parts = _large_window_gradients(launcher, tensors, out)
    key_value_gradient = padding_parts.sum(0)
    # The results of padded queries are dropped.
    padding_gradient = torch.cat((key_value_gradient.new_zeros(out.shape[3]), key_value_gradient))
    scale_gradient = bias.new_empty(0) if logit_scale is None else scale_parts.sum(0).to(logit_scale.dtype)
    return qkv_gradient, padding_gradient.to(padding.dtype), bias_parts.sum(0).to(bias.dtype), scale_gradient


@_window_attention_backward.register_fake
def _(
    out_gradient: Tensor,
    out: Tensor,
    log_sums: Tensor,
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    window_size: int,
    shift_y: int,
    shift_x: int,
    pad_first: bool,
    mask_value: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(qkv, padding, bias, logit_scale)


def _empty_gradients(
    qkv: Tensor, padding: Tensor, bias: Tensor, logit_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale_gradient = bias.new_empty(0) if logit_scale is None else _contiguous_like(logit_scale)
    return _contiguous_like(qkv), _contiguous_like(padding), _contiguous_like(bias), scale_gradient


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    qkv, padding, bias, logit_scale, *ctx.numbers = inputs
    ctx.save_for_backward(*output, qkv, padding, bias, logit_scale)
    ctx.set_materialize_grads(False)  # the log-sum-exps have none


def _backward(ctx: Any, out_gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    no_gradients = (None,) * len(ctx.numbers)
    if out_gradient is None:
        return (None, None, None, None, *no_gradients)
    *saved, logit_scale = ctx.saved_tensors  # only once: a checkpoint computes them anew at each look
    *gradients, scale_gradient = _window_attention_backward(out_gradient, *saved, logit_scale, *ctx.numbers)
    return (*gradients, None if logit_scale is None else scale_gradient, *no_gradients)


_window_attention.register_autograd(_backward, setup_context=_save_for_backward)


@dataclass(frozen=True)
class _Launcher:
    """The arguments that kernels share. Grids are (heads, tiles, runs of windows)."""

    arguments: dict[str, Any]
    num_heads: int
    num_tiles: int

    def num_runs(self, tiles: int, programs_per_multiprocessor: int) -> int:
        """Into how many runs the windows are cut, none of them empty, for about so many programs."""
        qkv, num_windows = self.arguments["qkv"], self.arguments["num_windows"]
        multiprocessors = torch.cuda.get_device_properties(qkv.device).multi_processor_count if qkv.is_cuda else 1
        wanted = max(multiprocessors * programs_per_multiprocessor // (self.num_heads * tiles), 1)
        return math.ceil(num_windows / math.ceil(num_windows / wanted))

    def padding_parts(self, parts: int) -> Tensor:
        """(parts, 2 C) for partial sums over padded keys, then padded values."""
        channels = self.arguments["HEAD_DIM"] * self.num_heads
        return self._sums(parts, 2 * channels)

    def bias_parts(self, parts: int) -> Tensor:
        """(parts, num_heads, M M, M M)."""
        area = self.arguments["WINDOW"] ** 2
        return self._sums(parts, self.num_heads, area, area)

    def scale_parts(self, parts: int) -> Tensor:
        """(parts, num_heads)."""
        return self._sums(parts, self.num_heads)

    def _sums(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=self.arguments["qkv"].device)

    def kernels(self, module: str) -> ModuleType:
        """Those of a module."""
        return import_kernels(f"swin_dense.{module}", "fused_window_attention", self.arguments["qkv"].device)

    def launch(self, kernel: Any, tiles: int, runs: int, **tensors: Tensor) -> None:  # noqa: ANN401 - Triton's
        """Run a kernel with further tensors, all contiguous."""
        run_length = math.ceil(self.arguments["num_windows"] / runs)
        with torch.cuda.device_of(self.arguments["qkv"]):
            kernel[(self.num_heads, tiles, runs)](**self.arguments, **tensors, windows_per_program=run_length)


def _launcher(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    window_size: int,
    shift_hw: SizeHW,
    pad_first: bool,
    mask_value: float,
) -> _Launcher:
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    padding, bias = padding.contiguous(), bias.contiguous()
    batch, height, width, channels = qkv.shape
    num_heads, area = bias.shape[:2]
    head_dim = channels // 3 // num_heads
    block = min(_power_of_two(area), _LARGEST_BLOCK)
    strides = qkv.stride()[:3]
    steps = (qkv.element_size() * step for step in (head_dim, *strides))
    arguments = {
        "qkv": qkv,
        "padding": padding,
        "bias": bias,
        "logit_scale": None if logit_scale is None else logit_scale.contiguous(),
        "stride_image": strides[0],
        "stride_row": strides[1],
        "stride_cell": strides[2],
        "height": height,
        "width": width,
        "shift_y": shift_hw[0],
        "shift_x": shift_hw[1],
        "mask_value": mask_value,
        "num_windows": batch * windows_of_a_map((height, width), window_size),
        "WINDOW": window_size,
        "HEAD_DIM": head_dim,
        "HEAD_TILE": _power_of_two(head_dim),
        "BLOCK": block,
        "ALIGNMENT": math.gcd(16, qkv.data_ptr(), padding.data_ptr(), *steps),  # 16: what one instruction loads
        "PAD_FIRST": pad_first,
        "SHIFTED": shift_hw != (0, 0),
        "COSINE": logit_scale is not None,
        **_registers_and_memory(qkv.dtype, head_dim),
        "enable_fp_fusion": True,  # multiply-adds; Triton warns where this is left to it
    }
    return _Launcher(arguments, num_heads, math.ceil(area / block))


def _registers_and_memory(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """The fewest warps that hold a program's tiles in registers (as compiled for compute capability 9.0)."""
    if dtype == torch.float32:  # multiplied without tensor cores, from registers; slower than memory in any case
        return {"num_warps": 8 if head_dim <= 32 else 16, "num_stages": 1}
    return {"num_warps": 4 if head_dim <= 32 else 8, "num_stages": 2}


def _power_of_two(number: int) -> int:
    """The smallest that is not below the number, and at least 16, the smallest side of a matrix product."""
    return max(1 << (number - 1).bit_length(), 16)


def _small_window_gradients(launcher: _Launcher, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Launch what fills `qkv_gradient`; returns those of padding, bias and logit_scale, still to be summed."""
    runs = launcher.num_runs(1, _GRADIENT_PROGRAMS)
    parts = launcher.padding_parts(runs), launcher.bias_parts(runs), launcher.scale_parts(runs)
    kernel = launcher.kernels("window_attention_kernels").backward_kernel
    launcher.launch(kernel, 1, runs, **tensors, padding_parts=parts[0], bias_parts=parts[1], scale_parts=parts[2])
    return parts


def _large_window_gradients(
    launcher: _Launcher, tensors: dict[str, Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_small_window_gradients`; queries, keys with values, and bias have a kernel each."""
    kernels, tiles = launcher.kernels("large_window_attention_kernels"), launcher.num_tiles
    tensors["means"] = torch.empty_like(tensors["log_sums"])
    runs = launcher.num_runs(tiles, _GRADIENT_PROGRAMS)
    padding_parts, scale_parts = launcher.padding_parts(runs * tiles), launcher.scale_parts(runs * tiles)
    launcher.launch(kernels.query_gradient_kernel, tiles, runs, **tensors, out=out, scale_parts=scale_parts)
    launcher.launch(kernels.key_value_gradient_kernel, tiles, runs, **tensors, padding_parts=padding_parts)
    runs = launcher.num_runs(tiles * tiles, _GRADIENT_PROGRAMS)
    bias_parts = launcher.bias_parts(runs)
    del tensors["qkv_gradient"]
    launcher.launch(kernels.bias_gradient_kernel, tiles * tiles, runs, **tensors, bias_parts=bias_parts)
    return padding_parts, bias_parts, scale_parts
