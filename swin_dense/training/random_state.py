"""The random number generators that training draws from (torch on CPU and CUDA, Python), as plain types and tensors."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor


class RandomState(TypedDict):
    """State of one process; holds nothing that `torch.load(weights_only=True)` would refuse."""

    torch: Tensor
    cuda: Tensor | None
    python: tuple[int, tuple[int, ...], float | None]


def random_state() -> RandomState:
    """Reads the generators of this process; of several CUDA devices that of the current one."""
    version, numbers, next_gauss = random.getstate()
    return RandomState(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        python=(version, tuple(numbers), next_gauss),
    )


def set_random_state(state: RandomState) -> None:
    """Sets the generators of this process; the CUDA one where both the state and the machine have it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside the block leaves no trace outside it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def repeated_random_state() -> Iterator[None]:
    """Whatever is drawn inside the block is drawn alike every time, and leaves no trace outside it."""
    with preserved_random_state():
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(0)  # of the current device, the one that is preserved
        yield
