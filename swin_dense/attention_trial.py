"""A trial of the fused window attention: whether it works here, before a model relies on it."""

from __future__ import annotations

import torch
from torch import Tensor

from swin_dense.fused_window_attention import LARGEST_HEAD_DIM, fused_window_attention
from swin_dense.kernel_trial import check_equal, kernel_trial
from swin_dense.window_attention import reference_window_attention
from swin_dense.windows import ShiftedWindows

_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest value; mistakes are larger


def fused_is_right(
    device: torch.device, dtype: torch.dtype, window_size: int, head_dim: int, has_cosines: bool
) -> bool:
    """Whether the kernels of this kind compile on this machine and compute what the reference does, on a small map.

    Tried once per kind; a failure is warned of once.

    Args:
        device: A GPU.
        dtype: Of queries, keys and values.
        window_size: M.
        head_dim: Channels of a head.
        has_cosines: Whether logits are those of Swin V2.
    """
    return head_dim <= LARGEST_HEAD_DIM and _try_fused(device, dtype, window_size, head_dim, has_cosines)


@kernel_trial("window attention is computed by its slower reference: the fused one")
def _try_fused(device: torch.device, dtype: torch.dtype, window_size: int, head_dim: int, has_cosines: bool) -> None:
    windows = ShiftedWindows(window_size, (window_size // 2, window_size // 2), True, -100.0)
    channels, area = 3 * 2 * head_dim, window_size**2  # of two heads
    shapes = [(1, window_size + 1, window_size + 2, channels), (channels,), (2, area, area)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    qkv, padding, bias = values
    scale = torch.tensor([1.0, 3.0]).to(device, dtype).requires_grad_() if has_cosines else None
    inputs = values if scale is None else [*values, scale]
    wanted = _with_gradients(reference_window_attention(qkv, padding, bias, scale, windows), inputs)
    got = _with_gradients(fused_window_attention(qkv, padding, bias, scale, *windows), inputs)
    check_equal(got, wanted, _ALLOWED[dtype])


def _with_gradients(attended: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [attended.detach(), *torch.autograd.grad(attended, inputs, torch.ones_like(attended))]
