"""The training loop: `train` is the whole of a step, from the batch to the update.

It knows neither data set nor model: `compute_losses` turns a batch into named losses, and here they are summed.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from swin_dense.errors import ConfigError, DivergenceError, Interrupted
from swin_dense.training.distributed import any_process, average_scalars
from swin_dense.training.interruption import StopSignals
from swin_dense.training.random_state import preserved_random_state

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know.

    Args:
        total_steps: Updates of the whole run.
        accumulation_steps: Batches whose gradients are averaged for one update.
        max_gradient_norm: Longer gradients are shortened to this L2 norm; None leaves them.
        precision: "bfloat16" runs the forward pass under autocast; weights and gradients stay as they are.
        log_every_steps: `on_log` after so many steps.
        checkpoint_every_steps: `on_checkpoint` after so many steps, before every evaluation and at the end.
        evaluate_every_steps: `on_evaluate` after so many steps and at the end.
    """

    total_steps: int
    accumulation_steps: int = 1
    max_gradient_norm: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int

    def __post_init__(self) -> None:
        intervals = ("log_every_steps", "checkpoint_every_steps", "evaluate_every_steps")
        for name in ("total_steps", "accumulation_steps", *intervals):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ConfigError(f"max_gradient_norm must be above 0, or None for no limit, got {self.max_gradient_norm}.")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision must be float32 or bfloat16, got {self.precision!r}.")

    def is_due(self, step: int, every_steps: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is done after this step."""
        return step % every_steps == 0 or step == self.total_steps


@dataclass(frozen=True)
class StepLog:
    """The numbers of one step.

    Args:
        step: Updates made, this one included.
        losses: Means over the step's batches and over the processes, by name.
        gradient_norm: L2 norm before it was shortened.
        learning_rate: That of the first parameter group in this step.
        seconds: Length of the step in this process.
        data_seconds: Part of it spent waiting for batches.
    """

    step: int
    losses: dict[str, float]
    gradient_norm: float
    learning_rate: float
    seconds: float
    data_seconds: float


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a batch after its backward pass: detached losses, in words what it was, and the wait for it."""

    losses: dict[str, Tensor]
    description: str
    data_seconds: float


@dataclass(frozen=True)
class StepResult:
    """A step's numbers, partly still on the device: reading them waits for it, so only logged steps are read."""

    micro_batches: list[MicroBatch]
    gradient_norm: Tensor
    learning_rate: float
    seconds: float


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    compute_losses: Callable[[nn.Module, Batch], Mapping[str, Tensor]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: LoopSettings,
    *,
    device: torch.device,
    start_step: int = 0,
    on_log: Callable[[StepLog], None],
    on_checkpoint: Callable[[int], None],
    on_evaluate: Callable[[int], None],
) -> None:
    """Trains a model, in one or many processes alike; the callbacks are called at the same steps in all of them.

    A checkpoint is always written before an evaluation, and an evaluation that is due at `start_step` is made first:
    so none is lost when one is interrupted. Evaluations leave the random generators as they were.

    Args:
        model: On its device; wrapped by `distributed.wrap` where there are several processes.
        batches: At least `accumulation_steps` for each remaining step, beginning with those of `start_step`. A batch
            may have a method `describe() -> str` that names its images. A DataLoader behind a generator function
            needs a generator of its own, since it would draw from the global one.
        compute_losses: Gives the losses to be summed, each a scalar mean over the batch.
        optimizer: Over the model's parameters.
        scheduler: Stepped once after each update.
        settings: Lengths, intervals and precision.
        device: The model's.
        start_step: Updates made before; model, optimiser, schedule and random state are those after that step.
        on_log: Gets the step's numbers.
        on_checkpoint: Gets the number of updates made, to save the state.
        on_evaluate: Likewise, to evaluate; it may put the model into evaluation mode.

    Raises:
        DivergenceError: A loss or the gradient norm is not finite; the update was not made.
        Interrupted: SIGINT or SIGTERM came; the step was finished and `on_checkpoint` called. During an evaluation it
            is raised at once, as the checkpoint is there already. A second SIGINT raises KeyboardInterrupt.
        ConfigError: `start_step` is beyond the end, or the batches are too few.
    """
    if not 0 <= start_step <= settings.total_steps:
        raise ConfigError(f"start_step must lie in [0, total_steps = {settings.total_steps}], got {start_step}.")
    # Starting an iterator over a DataLoader draws a random number, which a resumed run would draw once more.
    with preserved_random_state():
        batch_iterator = iter(batches)
    with StopSignals() as signals:
        if start_step > 0 and settings.is_due(start_step, settings.evaluate_every_steps):
            _evaluate(model, on_evaluate, start_step, signals)
        model.train()
        for step in range(start_step + 1, settings.total_steps + 1):
            result = _train_step(model, batch_iterator, compute_losses, optimizer, scheduler, settings, device, step)
            if settings.is_due(step, settings.log_every_steps):
                on_log(_step_log(step, result))
            evaluation_is_due = settings.is_due(step, settings.evaluate_every_steps)
            (stop,) = any_process([signals.signal_number is not None])
            if stop or evaluation_is_due or settings.is_due(step, settings.checkpoint_every_steps):
                on_checkpoint(step)
            if stop:
                raise Interrupted(signals.signal_number or signal.SIGTERM)
            if evaluation_is_due:
                _evaluate(model, on_evaluate, step, signals)


def _train_step(
    model: nn.Module,
    batches: Iterator[Batch],
    compute_losses: Callable[[nn.Module, Batch], Mapping[str, Tensor]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: LoopSettings,
    device: torch.device,
    step: int,
) -> StepResult:
    """One update: the mean gradient of some batches, a look at whether all is finite, and only then the step."""
    started_s = time.perf_counter()
    learning_rate = optimizer.param_groups[0]["lr"]
    optimizer.zero_grad(set_to_none=True)
    micro_batches = []
    for index in range(settings.accumulation_steps):
        waiting_since_s = time.perf_counter()
        batch = _next_batch(batches, step, settings)
        data_seconds = time.perf_counter() - waiting_since_s
        is_last = index == settings.accumulation_steps - 1
        with _without_gradient_exchange(model) if not is_last else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = dict(compute_losses(model, batch))
            (_total(losses) / settings.accumulation_steps).backward()
        detached = {name: loss.detach() for name, loss in losses.items()}
        micro_batches.append(MicroBatch(detached, _description(batch), data_seconds))

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    _require_finite_everywhere(step, micro_batches, gradient_norm)
    if settings.max_gradient_norm is not None:
        clip_grads_with_norm_(parameters, settings.max_gradient_norm, gradient_norm)
    optimizer.step()
    scheduler.step()
    return StepResult(micro_batches, gradient_norm, learning_rate, time.perf_counter() - started_s)


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    """The one place where losses are summed; weights belong to whoever computes them."""
    return torch.stack(list(losses.values())).sum()


def _evaluate(model: nn.Module, on_evaluate: Callable[[int], None], step: int, signals: StopSignals) -> None:
    with preserved_random_state(), signals.at_once():
        on_evaluate(step)
    model.train()


def _next_batch(batches: Iterator[Batch], step: int, settings: LoopSettings) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise ConfigError(
            f"the batches ended in step {step} of {settings.total_steps}: the loader must give "
            f"{settings.accumulation_steps} for each remaining step. Let it start over, or lower total_steps."
        ) from None


def _without_gradient_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """The processes exchange gradients once an update, in the last backward pass."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _require_finite_everywhere(step: int, micro_batches: Sequence[MicroBatch], gradient_norm: Tensor) -> None:
    """Stops all processes together before an update that would spoil the weights; waits for the device once."""
    numbers = [*(_total(micro_batch.losses) for micro_batch in micro_batches), gradient_norm]
    *losses_finite, norm_finite = torch.stack([number.isfinite() for number in numbers]).tolist()
    loss_diverged, norm_diverged = any_process([not all(losses_finite), not norm_finite])
    if not loss_diverged and not norm_diverged:
        return
    culprits = [micro_batch for micro_batch, good in zip(micro_batches, losses_finite, strict=True) if not good]
    shown = "; ".join(
        f"{', '.join(f'{name}={float(loss):.6g}' for name, loss in micro_batch.losses.items())} "
        f"in batch {micro_batch.description}"
        for micro_batch in culprits or micro_batches
    )
    where = " in another process" if loss_diverged and not culprits else ""
    raise DivergenceError(
        f"step {step}: training diverged{where}, gradient norm={float(gradient_norm):.6g}, {shown}. The update was not "
        "made. Look at these images; otherwise lower the learning rate, limit the gradient norm or use float32."
    )


def _description(batch: object) -> str:
    describe = getattr(batch, "describe", None)
    return str(describe()) if callable(describe) else f"of type {type(batch).__name__}"


def _step_log(step: int, result: StepResult) -> StepLog:
    """Numbers of this step alone: a mean since the last log would differ in a resumed run."""
    count = len(result.micro_batches)
    sums: dict[str, float] = {}
    for micro_batch in result.micro_batches:
        for name, loss in micro_batch.losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss)
    losses = average_scalars({name: value / count for name, value in sums.items()})
    data_seconds = sum(micro_batch.data_seconds for micro_batch in result.micro_batches)
    return StepLog(step, losses, float(result.gradient_norm), result.learning_rate, result.seconds, data_seconds)
