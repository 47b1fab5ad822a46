"""The training state on disk: everything that a resumed run needs to continue bit for bit.

The order of the data needs no state: batch n is a function of the seed and of n, also in the middle of an epoch, and
the step tells n. There is no gradient scaler: mixed precision is bfloat16, which needs none.
A run's folder holds `last.pt` and, as long as the newest has not proved itself, `previous.pt` before it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from swin_dense.errors import CheckpointError, DivergenceError
from swin_dense.training.atomic_file import read_checked, write_checked
from swin_dense.training.distributed import gather_objects, unwrap
from swin_dense.training.random_state import RandomState, random_state, set_random_state
from swin_dense.training.sharding import optimizer_pieces, pieces, whole_state
from swin_dense.training.weight_average import AverageState, WeightAverage

FORMATS = "swin_dense training state"
FORMAT = f"{FORMATS} 2"
LAST, PREVIOUS, DAMAGED = "last.pt", "previous.pt", "last.pt.bad"
SHOWN_NAMES = 5


@dataclass(frozen=True)
class TrainingState:
    """All that changes while a model trains, in plain types and tensors.

    Args:
        step: Updates made.
        best_score: The best score of an evaluation so far, None before the first.
        model: State dict, names without a wrapper's prefix.
        optimizer: State dict.
        scheduler: State dict.
        average: State of the moving average of the weights, None where there is none.
        random_states: Generators of each process, by rank.
        threads: Threads that torch computed with; another number changes the last digits.
        extra: What the caller wants kept: settings, label map.
    """

    step: int
    best_score: float | None
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    average: AverageState | None
    random_states: list[RandomState]
    threads: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedState:
    """A training state and where it came from.

    Args:
        state: The state.
        path: File it was read from.
        messages: What the user should know, such as that the newest file was damaged; mostly empty.
    """

    state: TrainingState
    path: Path
    messages: tuple[str, ...]


def capture_state(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    step: int,
    best_score: float | None = None,
    average: WeightAverage | None = None,
    extra: Mapping[str, Any] | None = None,
) -> TrainingState | None:
    """Collects the state; every process must call it. The tensors are the live ones: save before the next update.

    Returns:
        The state in the main process, None in the others.

    Raises:
        DivergenceError: A weight or running statistic is not finite; such a state is never saved.
    """
    random_states = gather_objects(random_state())
    put_together = partial(whole_state, keep=random_states is not None)
    weights = put_together(unwrap(model).state_dict())
    optimizer_state = put_together(optimizer.state_dict())
    average_state = None if average is None else put_together(average.state_dict())
    if random_states is None:
        return None
    _require_finite(weights, step)
    return TrainingState(
        step=step,
        best_score=best_score,
        model=weights,
        optimizer=optimizer_state,
        scheduler=scheduler.state_dict(),
        average=average_state,
        random_states=random_states,
        threads=torch.get_num_threads(),
        extra=dict(extra or {}),
    )


def restore_state(
    state: TrainingState,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    rank: int = 0,
    average: WeightAverage | None = None,
) -> tuple[str, ...]:
    """Puts a state back into model, average, optimiser, schedule and random generators; strict, and all or nothing.

    Learning rate, weight decay and the other settings of the optimiser become those of the state.

    Args:
        state: Loaded by `load_state`.
        model: Same architecture as the saved one, wrapped or not.
        optimizer: Built over the same parameters.
        scheduler: Same schedule.
        rank: Number of this process, to take back its own random state.
        average: Of the model's weights; where the state has none it begins with the restored weights.

    Returns:
        What makes the continued run differ from the uninterrupted one; mostly empty.

    Raises:
        CheckpointError: The state belongs to another model or optimiser. Nothing was changed.
    """
    bare_model = unwrap(model)
    _require_same_tensors(bare_model.state_dict(), state.model)
    _require_same_groups(optimizer.state_dict()["param_groups"], state.optimizer.get("param_groups", []))
    if average is not None and state.average is not None:
        _require_same_tensors(average.state_dict()["tensors"], state.average["tensors"])
    bare_model.load_state_dict(pieces(state.model, bare_model.state_dict()))
    optimizer.load_state_dict(optimizer_pieces(state.optimizer, optimizer))
    scheduler.load_state_dict(state.scheduler)
    messages = []
    if average is not None and state.average is not None:
        tensors = pieces(state.average["tensors"], average.state_dict()["tensors"])
        average.load_state_dict({**state.average, "tensors": tensors})
    elif average is not None:
        average.restart()
        messages.append("the run was saved without an average of its weights: that begins with the restored ones.")
    elif state.average is not None:
        messages.append("the average of the weights that the run was saved with is given up.")
    if rank < len(state.random_states):
        set_random_state(state.random_states[rank])
    else:
        messages.append(f"process {rank} starts with new random numbers: {len(state.random_states)} were saved.")
    if state.threads != torch.get_num_threads():
        messages.append(f"the run was saved with {state.threads} threads and goes on with {torch.get_num_threads()}.")
    return tuple(messages)


def save_state(folder: Path, state: TrainingState) -> Path:
    """Writes `last.pt` atomically and keeps the one before as `previous.pt`; for the main process only.

    Args:
        folder: Created where it is missing.
        state: From `capture_state`.

    Returns:
        The path of `last.pt`.

    Raises:
        CheckpointError: The file cannot be written; both former files are unharmed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be created ({error.strerror}). Choose another folder.") from error
    content = {"format": FORMAT, **{item.name: getattr(state, item.name) for item in fields(state)}}
    write_checked(folder / LAST, content, keep_as=folder / PREVIOUS)
    return folder / LAST


def has_state(folder: Path) -> bool:
    """Whether a run was saved here, readable or not."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def load_state(folder: Path) -> LoadedState:
    """Reads the newest good state of a folder.

    A damaged `last.pt` is set aside as `last.pt.bad` when `previous.pt` is good, so that it cannot displace it.

    Raises:
        CheckpointError: There is none, or none can be used.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not has_state(folder):
        found = sorted(entry.name for entry in folder.iterdir())[:SHOWN_NAMES] if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: nothing to resume, expected {LAST} or {PREVIOUS}, got {found}.")
    try:
        return LoadedState(read_state(last), last, ())
    except CheckpointError as error:
        problem = str(error)
    if not previous.exists():
        raise CheckpointError(f"{problem} There is no {PREVIOUS} beside it to go back to.")
    try:
        state = read_state(previous)
    except CheckpointError as error:
        raise CheckpointError(f"{problem} Nor can the one before be used: {error}") from None
    try:
        os.replace(last, folder / DAMAGED)
    except OSError:
        # Missing after a crash between two renames, set aside by another process, or a folder only to be read.
        pass
    return LoadedState(state, previous, (f"{problem} Going back to {PREVIOUS}, step {state.step}.",))


def read_state(path: Path) -> TrainingState:
    """Reads one file that `save_state` wrote.

    Raises:
        CheckpointError: It is damaged, or is no training state.
    """
    content = read_checked(path)
    names = [item.name for item in fields(TrainingState)]
    found = content.pop("format", None)
    if found != FORMAT and str(found).startswith(FORMATS):
        raise CheckpointError(
            f"{path}: is of another version of this library: {found!r}, this one reads {FORMAT!r}. Finish the run with "
            "the version that began it, or begin anew with model.weights set to the model it left."
        )
    if found != FORMAT or sorted(content) != sorted(names):
        raise CheckpointError(f"{path}: is no training state, it holds {sorted(content)[:SHOWN_NAMES]}.")
    return TrainingState(**content)


def _require_finite(weights: Mapping[str, Tensor], step: int) -> None:
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if not floating or bool(torch.stack([tensor.isfinite().all() for tensor in floating.values()]).all()):
        return
    bad = [name for name, tensor in floating.items() if not bool(tensor.isfinite().all())]
    raise DivergenceError(
        f"step {step}: {len(bad)} tensors of the model are not finite (first: {bad[:SHOWN_NAMES]}); "
        "this state is not saved. Resume from the last one with a lower learning rate."
    )


def _require_same_tensors(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    reshaped = [
        f"{name} {tuple(got[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]
    findings = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    parts = [
        f"{len(names)} {what} (first: {', '.join(names[:SHOWN_NAMES])})" for what, names in findings.items() if names
    ]
    if parts:
        raise CheckpointError(
            f"the checkpoint is of another model: tensors {'; '.join(parts)}. Resume with its settings."
        )


def _require_same_groups(expected: Sequence[Mapping[str, Any]], got: Sequence[Mapping[str, Any]]) -> None:
    def described(groups: Sequence[Mapping[str, Any]]) -> list[list[str] | int]:
        return [group.get("param_names", len(group["params"])) for group in groups]

    if described(expected) != described(got):
        raise CheckpointError(
            "the checkpoint is of another optimiser: "
            f"its groups hold {[len(group['params']) for group in got]} parameters, "
            f"wanted {[len(group['params']) for group in expected]} with the same names. "
            "Freeze the same parts as in the saved run, and switch layer decay on or off as there."
        )
