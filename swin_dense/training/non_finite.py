"""A loss or gradient that is not finite: whose fault it is, found by computing its batch again under observation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Generic, Literal

import torch
from torch import Tensor, nn

from swin_dense.errors import CheckpointError
from swin_dense.training.atomic_file import write_checked
from swin_dense.training.loss_terms import means, total
from swin_dense.training.micro_batches import B, Forward, MicroBatch
from swin_dense.training.out_of_memory import is_out_of_memory
from swin_dense.training.random_state import set_random_state

LARGEST_PLAUSIBLE = 1e6
"""Neither pixels, box coordinates and labels nor the weights of a network that works come near it."""

MOST_FILES = 20
"""Batches kept of one run: enough to see what is wrong, without filling the disk."""

Verdict = Literal["weights", "data", "precision", "unknown"]


@dataclass(frozen=True)
class Diagnosis(Generic[B]):
    """What was found out about a batch.

    Args:
        verdict: "weights": they are beyond use already, and no other batch can help. "data": the batch, or what these
            weights make of it, is not finite in float32 either. "precision": it is finite in float32. "unknown": it
            could not be computed again, or was finite the second time in the same precision.
        micro_batch: The batch.
        images: Those that are not finite alone too, or all of the batch, for messages.
        place: Where the first value that is not finite came from: the path of a module, a loss or a parameter; None
            where it was not found.
        reason: Why the verdict, in one sentence.
    """

    verdict: Verdict
    micro_batch: MicroBatch[B]
    images: str
    place: str | None
    reason: str

    def __str__(self) -> str:
        losses = ", ".join(f"{name}={float(loss):.6g}" for name, loss in self.micro_batch.losses.items())
        place = "" if self.place is None else f", first in {self.place}"
        return f"not finite with {self.images}{place} ({losses}). Verdict: {self.verdict}; {self.reason}"


@dataclass
class SkippedSteps:
    """How many steps were not made; part of a run's state, so that a resumed run stops where the whole one would.

    Args:
        in_a_row: Since the last update.
        in_all: Of the run.
    """

    in_a_row: int = 0
    in_all: int = 0


def diagnose(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch[B]],
    forward: Forward[B],
    forward_float32: Forward[B],
    *,
    in_float32: bool,
) -> Diagnosis[B]:
    """Computes a batch again that made a loss or a gradient that is not finite, with the same random numbers.

    The model's gradients stay as they are; random state and running statistics do not. Statistics that BatchNorm shares
    between processes are replaced by the running ones, because the other processes do not take part.

    Args:
        model: In training mode, its weights as they were.
        micro_batches: Of the step, in this process; at least one is the culprit.
        forward: The losses as the step computed them.
        forward_float32: The losses without autocast.
        in_float32: Whether the two are the same.
    """
    with _own_statistics(model):
        first = micro_batches[0]
        weight = _implausible_weight(model)
        if weight is not None:
            reason = "this weight is not finite or absurdly large, which no batch can mend."
            return Diagnosis("weights", first, first.batch.describe(), weight, reason)
        try:
            return _diagnose_batch(model, _culprit(model, micro_batches, forward), forward, forward_float32, in_float32)
        except (RuntimeError, ValueError) as error:  # such as too little memory for a single image in float32
            reason = f"it could not be computed again: {str(error).partition(chr(10))[0]}"
            return Diagnosis("unknown", first, first.batch.describe(), None, reason)


def _diagnose_batch(
    model: nn.Module, micro_batch: MicroBatch[B], forward: Forward[B], forward_float32: Forward[B], in_float32: bool
) -> Diagnosis[B]:
    place = _first_place(model, forward_float32, micro_batch)
    if place is not None:
        value = _implausible_value(micro_batch.batch.plain())
        reason = "it is not finite in float32 either, with weights that are."
        if value is not None:
            reason = f"{value} is not finite or absurdly large."
        return Diagnosis("data", micro_batch, _guilty_images(model, forward_float32, micro_batch), place, reason)
    place = None if in_float32 else _first_place(model, forward, micro_batch)
    if place is None:
        reason = "the same computation was finite the second time."
        return Diagnosis("unknown", micro_batch, micro_batch.batch.describe(), None, reason)
    images = _guilty_images(model, forward, micro_batch)
    return Diagnosis("precision", micro_batch, images, place, "it is finite in float32.")


def save_bad_batch(folder: Path, step: int, rank: int, diagnosis: Diagnosis[B]) -> str:
    """Keeps a batch, so that it can be looked at: `torch.load(path, weights_only=True)`.

    Args:
        folder: Created where it is missing.
        step: The step that was skipped.
        rank: Number of this process.
        diagnosis: Of the batch.

    Returns:
        What became of it, for messages: a disk that is full must not end the run as well.
    """
    path = folder / f"step_{step:06d}_rank{rank}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.glob("*.pt"))) >= MOST_FILES:
            return f"It is not kept: {folder} holds {MOST_FILES} such batches already."
        micro_batch = diagnosis.micro_batch
        content = {
            "step": step,
            "rank": rank,
            "images": diagnosis.images,
            "verdict": diagnosis.verdict,
            "place": diagnosis.place,
            "losses": {name: float(loss) for name, loss in micro_batch.losses.items()},
            "random_state": dict(micro_batch.random_state),
            "batch": micro_batch.batch.plain(),
        }
        write_checked(path, content)
    except (OSError, CheckpointError) as error:
        return f"It could not be kept: {error}"
    return f"It is kept as {path}."


def _culprit(model: nn.Module, micro_batches: Sequence[MicroBatch[B]], forward: Forward[B]) -> MicroBatch[B]:
    for micro_batch in micro_batches:
        if not all(map(_is_finite, micro_batch.losses.values())):
            return micro_batch
    for micro_batch in micro_batches[:-1]:
        if _first_place(model, forward, micro_batch) is not None:
            return micro_batch
    return micro_batches[-1]


def _guilty_images(model: nn.Module, forward: Forward[B], micro_batch: MicroBatch[B]) -> str:
    pieces = micro_batch.batch.split(len(micro_batch.batch.ids))
    try:
        guilty = [piece for piece in pieces if _observed(model, forward, piece, micro_batch) is not None]
    except (RuntimeError, ValueError):  # not every model takes a single image in training
        guilty = []
    if len(guilty) in (0, len(pieces)):
        return micro_batch.batch.describe()
    return "; ".join(piece.describe() for piece in guilty)


def _first_place(model: nn.Module, forward: Forward[B], micro_batch: MicroBatch[B]) -> str | None:
    """Where the first value that is not finite comes from, forwards or backwards; None where there is none.

    In float32 a batch may not fit that did in bfloat16: then its parts are looked at one by one.
    """
    parts, images = 1, len(micro_batch.batch.ids)
    while True:
        try:
            places = (_observed(model, forward, part, micro_batch) for part in micro_batch.batch.split(parts))
            return next((place for place in places if place is not None), None)
        except RuntimeError as error:
            if parts >= images or not is_out_of_memory(error):
                raise
        parts = min(2 * parts, images)


def _observed(model: nn.Module, forward: Forward[B], batch: B, micro_batch: MicroBatch[B]) -> str | None:
    set_random_state(micro_batch.random_state)
    with _Observation(model) as observation:
        losses = means(forward(batch))
        if observation.place is not None:
            return observation.place
        for name, loss in losses.items():
            if not _is_finite(loss):
                return f"the loss {name}"
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(total(losses), list(parameters.values()), allow_unused=True)
        if observation.place is not None:
            return observation.place
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and not _is_finite(gradient):
                return f"the gradient of {name}"
    return None


class _Observation:
    """Notes the first module whose output, or else whose output's gradient, is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.place: str | None = None
        self._handles = [
            module.register_forward_hook(self._observer(name)) for name, module in model.named_modules() if name
        ]

    def __enter__(self) -> "_Observation":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _observer(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def look(_: nn.Module, __: object, output: object) -> None:
            for tensor in _tensors(output):
                self._note(tensor, f"the output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._note(gradient, f"the gradient at the output of {name}"))

        return look

    def _note(self, tensor: Tensor, place: str) -> None:
        if self.place is None and not _is_finite(tensor):
            self.place = place


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def _implausible_weight(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not _is_plausible(parameter):
            return name
    for name, buffer in model.named_buffers():
        if not _is_finite(buffer):
            return name
    return None


def _implausible_value(value: object, name: str = "") -> str | None:
    """The path of a value of a batch, such as `targets[1].boxes`."""
    if isinstance(value, Mapping):
        items = [(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(item, f"{name}[{index}]") for index, item in enumerate(value)]
    elif isinstance(value, Tensor):
        return None if _is_plausible(value) else name
    else:
        return name if isinstance(value, float) and not math.isfinite(value) else None
    return next((found for item, path in items if (found := _implausible_value(item, path)) is not None), None)


def _is_finite(tensor: Tensor) -> bool:
    # Detached: what is saved for a gradient would be missed where activations are computed again.
    return bool(tensor.detach().isfinite().all())


def _is_plausible(tensor: Tensor) -> bool:
    """Not so where a value is NaN, which compares to nothing."""
    return not tensor.is_floating_point() or bool((tensor.detach().abs() <= LARGEST_PLAUSIBLE).all())


@contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    synchronised = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    for module in synchronised:
        module.eval()
    try:
        yield
    finally:
        for module in synchronised:
            module.train()
