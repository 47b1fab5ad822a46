"""Trials of fast implementations: whether they work on this machine, before a model relies on them.

A trial runs the fast implementation and its reference on a small problem:

    @kernel_trial("something is computed by its slower reference: the fused one")
    def fused_is_right(device: torch.device, dtype: torch.dtype) -> None:
        check_equal(fused(...), reference(...), allowed=1e-3)

    out = fused(...) if fused_is_right(x.device, x.dtype) else reference(...)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from swin_dense.training.random_state import preserved_random_state

P = ParamSpec("P")

_answers: dict[Hashable, bool] = {}


class WrongResult(Exception):
    """What a trial raises if the fast implementation runs, but differs; the message follows the trial's subject."""


def kernel_trial(
    subject: str,
) -> Callable[[Callable[Concatenate[torch.device, P], None]], Callable[Concatenate[torch.device, P], bool]]:
    """Make a trial a question that is answered once for each kind of problem.

    The trial takes the device first, then whatever tells kinds apart, all of it hashable. It returns if the fast
    implementation is right; it raises `WrongResult`, or what else may happen where kernels are compiled and run. The
    question takes the same and answers whether it returned; also no where Triton is missing. Each failure is warned of
    once. `torch.compile` takes the answer without looking inside.

    The caller's modes and random generators neither matter to the trial nor change.

    Args:
        subject: What the warning says of the consequence, up to the fast implementation's name.
    """

    def as_question(
        trial: Callable[Concatenate[torch.device, P], None],
    ) -> Callable[Concatenate[torch.device, P], bool]:
        @wraps(trial)
        def question(device: torch.device, *others: P.args, **named: P.kwargs) -> bool:
            kind = (trial, device, others, tuple(sorted(named.items())))
            if kind not in _answers:
                has_triton = find_spec("triton") is not None
                _answers[kind] = has_triton and _passes(lambda: trial(device, *others, **named), device, subject)
            return _answers[kind]

        return torch.compiler.assume_constant_result(question)

    return as_question


def check_equal(got: Sequence[Tensor], wanted: Sequence[Tensor], allowed: float) -> None:
    """Compare results.

    Args:
        got: Of the fast implementation.
        wanted: Of the reference, each with a number other than 0.
        allowed: How far a number may be off, as a part of the largest wanted number of its tensor.

    Raises:
        WrongResult: Some are off by more, or are not numbers.
    """
    for one, other in zip(got, wanted, strict=True):
        difference = float((one - other).abs().max() / other.abs().max())
        if not difference <= allowed:  # nor is NaN
            raise WrongResult(f"is off by {difference:.1e} of the largest value")


def _passes(trial: Callable[[], None], device: torch.device, subject: str) -> bool:
    try:
        with _no_modes(device), preserved_random_state():
            trial()
    except WrongResult as error:
        failure = str(error)
    except Exception as error:
        failure = f"failed ({type(error).__name__}: {error})"
    else:
        return True
    warnings.warn(f"{subject} {failure}.", stacklevel=3)
    return False


@contextmanager
def _no_modes(device: torch.device) -> Iterator[None]:
    """Gradients as usual; what is saved for them is no business of a checkpoint that may be around."""
    before = torch.get_deterministic_debug_mode(), torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    own_gradients = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    autocast = torch.autocast(device.type, enabled=False)
    _set_debug_modes(device, 0, 0)
    try:
        with torch.inference_mode(False), torch.enable_grad(), autocast, own_gradients:
            yield
    finally:
        _set_debug_modes(device, *before)


def _set_debug_modes(device: torch.device, deterministic: int, sync: int) -> None:
    torch.set_deterministic_debug_mode(deterministic)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(sync)
