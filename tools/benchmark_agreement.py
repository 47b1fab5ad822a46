"""Whether two models compute the same: without that, no ratio of their times is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

MAP_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""The largest relative difference, in the L2 norm, of a map, by the precision that it was computed in."""

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far a peer's outputs are from ours.

    Attributes:
        reference: Which model of ours they were compared with.
        precision: What both computed in.
        compared: The names of all outputs.
        worst: The one with the largest difference.
        difference: Relative to ours, in the L2 norm; infinite where shapes differ or values are not finite.
        tolerance: What it may be.
    """

    reference: str
    precision: str
    compared: tuple[str, ...]
    worst: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether both computed the same."""
        return self.difference <= self.tolerance

    def refusal(self, name: str) -> str:
        """Why a peer of this name has no ratio."""
        return (
            f"{name} differs from {self.reference}: {self.worst} by {self.difference:.1e} in {self.precision}, more "
            f"than the {self.tolerance:g} allowed."
        )


def agreement(theirs: Outputs, ours: Outputs, reference: str, precision: str, tolerance: float) -> Agreement:
    """Compare all outputs of a peer with ours of the same names.

    Args:
        theirs: By name.
        ours: Likewise, maybe more.
        reference: Which model of ours these are from.
        precision: What both computed in.
        tolerance: The relative difference that is allowed.
    """
    differences = {name: relative_difference(value, ours[name]) for name, value in theirs.items()}
    worst = max(differences, key=lambda name: differences[name])
    return Agreement(reference, precision, tuple(theirs), worst, differences[worst], tolerance)


def relative_difference(value: Tensor, wanted: Tensor) -> float:
    """The L2 norm of the difference over that of what is wanted; infinite where they cannot be compared."""
    if value.shape != wanted.shape:
        return math.inf
    value, wanted = value.detach().double(), wanted.detach().double()
    absolute = float((value - wanted).norm())
    relative = absolute and absolute / max(float(wanted.norm()), math.ulp(0.0))
    return relative if math.isfinite(relative) else math.inf


def first_agreement(theirs: Outputs, references: Mapping[str, Callable[[], Outputs]]) -> Agreement:
    """Compare maps in float32 with one model of ours after the other, until one agrees; the nearest where none does.

    Args:
        theirs: By name.
        references: What ours compute, by the model's name; each is called when it is its turn.
    """
    found: list[Agreement] = []
    for reference, outputs in references.items():
        found.append(agreement(theirs, outputs(), reference, "float32", MAP_TOLERANCE["float32"]))
        if found[-1].holds:
            break
    return min(found, key=lambda one: one.difference)


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions of a GPU in float32 as it is, not in TF32, whose choice of kernels differs between layouts."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
