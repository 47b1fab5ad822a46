"""Linear layers on CPUs by oneDNN, called as torch.compile calls it: the bias, and a GELU, are part of the product.

`torch.nn.functional.linear` copies the bias into the result before it multiplies, and in float32 multiplies by MKL,
which takes a tenth longer on processors of AMD.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from swin_dense.watched import operations_are_watched

_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the trial, whose values are about 1; mistakes are larger


def apply_linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """What a layer makes of (..., C), or the GELU of that.

    Args:
        layer: A plain linear layer is computed the fastest way; anything else that stands in its place is called.
        x: Its input.
        gelu: Whether the GELU follows.
    """
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias, gelu)
    x = layer(x)
    return functional.gelu(x) if gelu else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, or the GELU of that, whichever way is faster.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,), or None.
        gelu: Whether the GELU follows.

    Returns:
        (..., D).
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not _suit_onednn(tensors):
        x = functional.linear(x, weight, bias)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        x = _Linear.apply(x, weight, bias)
    else:
        return _multiply(x, weight, bias, gelu)
    return functional.gelu(x) if gelu else x


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is `torch.nn.Linear` and calling it does nothing more."""
    if type(layer) is not nn.Linear:
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    own_call = layer._compiled_call_impl is not None or "forward" in vars(layer)
    return not (own_call or any(hooks) or nn.modules.module._has_any_global_hook())


def _suit_onednn(tensors: tuple[Tensor, ...]) -> bool:
    x, weight = tensors[:2]
    if x.device.type != "cpu" or operations_are_watched():
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return False
    # Quantised weights and the like are tensors of other types, and multiply in their own way.
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in tensors)
    alike = all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in tensors)
    fit = x.numel() > 0 and x.shape[-1] == weight.shape[1]
    return plain and alike and fit and onednn_is_right(x.dtype)


class _Linear(torch.autograd.Function):
    """Differentiable as often as wanted: its gradients are made of differentiable products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _multiply(x, weight, bias, gelu=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        # Compiled, it is differentiable only once, and the choice of `linear` cannot be traced in here.
        multiply = partial(_product_operator, gelu=False) if torch.compiler.is_compiling() else linear
        return (
            multiply(gradient, weight.t(), None) if wants_x else None,
            rows.t() @ x.flatten(0, -2) if wants_weight else None,  # oneDNN's is no faster
            rows.sum(dim=0) if wants_bias and ctx.has_bias else None,
        )


@torch.compiler.assume_constant_result
def onednn_is_right(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's product here, fast in this dtype and right on a small example. Tried once."""
    return _trial(dtype)


@cache
def _trial(dtype: torch.dtype) -> bool:
    if dtype not in _ALLOWED or not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False  # without MKL it is another kind of processor, where nobody has measured
    with torch.inference_mode(False), torch.no_grad():
        values = torch.linspace(-1, 1, 105, dtype=torch.float64, device="cpu").to(dtype)
        x, weight, bias = values.view(15, 7).sin(), values[:35].view(5, 7).cos(), values[:5]
        wanted = functional.gelu(functional.linear(x.double(), weight.double(), bias.double()))
        try:
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            got = _product(x, weight, bias, gelu=True)
        except (AttributeError, RuntimeError, TypeError):  # no such operator, or of other arguments
            return False
    return bool((got.double() - wanted).abs().max() <= _ALLOWED[dtype])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    product = _product_operator if torch.compiler.is_compiling() else _product
    return product(x, weight, bias, gelu)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


# A compiler knows torch's operator too, but takes it for constant weights only.
_product_operator = torch.library.custom_op("swin_dense::linear", _product, mutates_args=())


@_product_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
