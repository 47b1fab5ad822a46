"""Triton kernels are imported when they are first needed, so that everything else works without Triton."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from swin_dense.errors import ConfigError


def import_kernels(module: str, operator: str, device: torch.device) -> ModuleType:
    """The module of an operator's kernels.

    Args:
        module: Its name.
        operator: Who asks, for messages.
        device: Where the tensors are.

    Raises:
        ConfigError: Triton is missing, or runs on no such device.
    """
    try:
        kernels = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{operator} needs Triton, which cannot be imported: {error}.") from error
    if device.type != "cuda" and not _are_interpreted(kernels):
        raise ConfigError(
            f"{operator} runs on CUDA devices, got tensors on {device}. "
            "For trials on a CPU set TRITON_INTERPRET=1 before Python starts."
        )
    return kernels


def _are_interpreted(kernels: ModuleType) -> bool:
    """What Triton decided when the module was imported."""
    from triton.runtime.interpreter import InterpretedFunction

    return any(isinstance(value, InterpretedFunction) for value in vars(kernels).values())
