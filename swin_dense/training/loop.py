"""The training loop: `train` repeats `_Steps.make`, which is the whole of a step, from the batch to the update.

It knows neither data set nor model: `compute_losses` turns a batch into named losses, and they are summed here.
"""

import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from swin_dense.errors import ConfigError, DivergenceError, Interrupted, SwinDenseError
from swin_dense.training.distributed import (
    any_process,
    average_scalars,
    exchange_gradients,
    process_rank,
    send_from_main,
    several_processes,
    share_rare,
    unwrap,
)
from swin_dense.training.events import Event
from swin_dense.training.interruption import StopSignals
from swin_dense.training.loss_terms import LossTerm, total
from swin_dense.training.micro_batches import B, MicroBatch
from swin_dense.training.non_finite import Diagnosis, SkippedSteps, diagnose, save_bad_batch
from swin_dense.training.out_of_memory import OutOfMemoryRecovery
from swin_dense.training.random_state import preserved_random_state
from swin_dense.training.sharding import is_sharded, whole
from swin_dense.training.starting_point import StartingPoint, running_statistics

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know.

    Args:
        total_steps: Steps of the whole run, each an update or skipped.
        accumulation_steps: Batches whose gradients are averaged for one update.
        max_gradient_norm: Longer gradients are shortened to this L2 norm; None leaves them.
        precision: "bfloat16" runs the forward pass under autocast; weights and gradients stay as they are.
        max_skipped_steps: So many steps in a row may have a loss or gradient that is not finite; one more ends the run.
        log_every_steps: `on_log` after so many steps.
        checkpoint_every_steps: `on_checkpoint` after so many steps, before every evaluation and at the end.
        evaluate_every_steps: `on_evaluate` after so many steps and at the end.
    """

    total_steps: int
    accumulation_steps: int = 1
    max_gradient_norm: float | None = None
    precision: Precision = "float32"
    max_skipped_steps: int = 10
    log_every_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int

    def __post_init__(self) -> None:
        intervals = ("log_every_steps", "checkpoint_every_steps", "evaluate_every_steps")
        for name in ("total_steps", "accumulation_steps", *intervals):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_skipped_steps < 0:
            raise ConfigError(f"max_skipped_steps must be 0 or more, got {self.max_skipped_steps}.")
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
        step: Its number, counted from 1.
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
class StepResult:
    """A step's numbers, partly still on the device: reading them waits for it, so only logged steps are read."""

    losses: list[dict[str, Tensor]]
    gradient_norm: Tensor
    learning_rate: float
    seconds: float
    data_seconds: float


def train(
    model: nn.Module,
    batches: Iterable[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, LossTerm]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: LoopSettings,
    *,
    device: torch.device,
    start_step: int = 0,
    skipped_steps: SkippedSteps | None = None,
    bad_batches: Path | None = None,
    on_log: Callable[[StepLog], None],
    on_checkpoint: Callable[[int], None],
    on_evaluate: Callable[[int], None],
    on_event: Callable[[Event], None] | None = None,
    after_update: Callable[[], None] | None = None,
) -> None:
    """Trains a model, in one or many processes alike; the callbacks are called at the same steps in all of them.

    A checkpoint is always written before an evaluation, and an evaluation that is due at `start_step` is made first:
    so none is lost when one is interrupted. Evaluations leave the random generators as they were.

    A step that runs out of memory is made again in smaller parts, see `OutOfMemoryRecovery`. A step with a loss or
    gradient that is not finite in any process is skipped, see `non_finite.diagnose`: weights, random state and running
    statistics stay as they were, nothing is logged, but the schedule goes on, so that the run keeps its length.

    Args:
        model: On its device; prepared by `distributed.wrap` where there are several processes.
        batches: At least `accumulation_steps` for each remaining step, beginning with those of `start_step`. A
            DataLoader behind a generator function needs a generator of its own, since it would draw from the global
            one.
        compute_losses: Gives the losses to be summed, and what each is a mean over.
        optimizer: Over the model's parameters.
        scheduler: Stepped once after each step.
        settings: Lengths, intervals and precision.
        device: The model's.
        start_step: Steps made before; model, optimiser, schedule and random state are those after that step.
        skipped_steps: Counts the steps that are skipped; a resumed run passes the saved counts.
        bad_batches: Folder for the batches of skipped steps; None keeps none.
        on_log: Gets the step's numbers.
        on_checkpoint: Gets the number of steps made, to save the state.
        on_evaluate: Likewise, to evaluate; it may put the model into evaluation mode.
        on_event: Gets what the user should know of any process.
        after_update: Called after every update of the weights, for what follows them, such as their average.

    Raises:
        DivergenceError: Too many steps in a row were skipped, or a weight is not finite; no update was made.
        Interrupted: SIGINT or SIGTERM came; the step was finished and `on_checkpoint` called. During an evaluation it
            is raised at once, as the checkpoint is there already. A second SIGINT raises KeyboardInterrupt.
        ConfigError: `start_step` is beyond the end, the batches are too few, a single image does not fit into memory,
            or, with several processes, a parameter gets no gradient.
    """
    if not 0 <= start_step <= settings.total_steps:
        raise ConfigError(f"start_step must lie in [0, total_steps = {settings.total_steps}], got {start_step}.")
    # Starting an iterator over a DataLoader draws a random number, which a resumed run would draw once more.
    with preserved_random_state():
        batch_iterator = iter(batches)
    steps = _Steps(
        model=model,
        batches=batch_iterator,
        forward=partial(_forward, model, compute_losses, device, settings.precision),
        forward_float32=partial(_forward, model, compute_losses, device, "float32"),
        optimizer=optimizer,
        scheduler=scheduler,
        settings=settings,
        skipped=SkippedSteps() if skipped_steps is None else skipped_steps,
        bad_batches=bad_batches,
        on_event=(lambda event: None) if on_event is None else on_event,
    )
    with StopSignals() as signals:
        if start_step > 0 and settings.is_due(start_step, settings.evaluate_every_steps):
            _evaluate(model, on_evaluate, start_step, signals)
        model.train()
        for step in range(start_step + 1, settings.total_steps + 1):
            result = steps.make(step)
            if result is not None and after_update is not None:
                after_update()
            if result is not None and settings.is_due(step, settings.log_every_steps):
                on_log(_step_log(step, result))
            evaluation_is_due = settings.is_due(step, settings.evaluate_every_steps)
            (stop,) = any_process([signals.signal_number is not None])
            if stop or evaluation_is_due or settings.is_due(step, settings.checkpoint_every_steps):
                on_checkpoint(step)
            if stop:
                raise Interrupted(signals.signal_number or signal.SIGTERM)
            if evaluation_is_due:
                _evaluate(model, on_evaluate, step, signals)


@dataclass(frozen=True)
class _Report:
    """What one process tells the others of its part of a step."""

    events: Sequence[Event] = ()
    not_finite: str | None = None
    error: SwinDenseError | None = None


class _Steps(Generic[B]):
    """Makes one step after another; the arguments are those of `train`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        batches: Iterator[B],
        forward: Callable[[B], Mapping[str, LossTerm]],
        forward_float32: Callable[[B], Mapping[str, LossTerm]],
        optimizer: Optimizer,
        scheduler: LRScheduler,
        settings: LoopSettings,
        skipped: SkippedSteps,
        bad_batches: Path | None,
        on_event: Callable[[Event], None],
    ) -> None:
        self.model = model
        self.batches = batches
        self.forward = forward
        self.forward_float32 = forward_float32
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.settings = settings
        self.skipped = skipped
        self.bad_batches = bad_batches
        self.on_event = on_event
        self.waited_s = 0.0
        # Synchronised BatchNorm waits for the other processes inside the passes.
        has_synchronised_norms = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        self.is_sharded = is_sharded(unwrap(model))
        self.passes_are_joint = self.is_sharded or (several_processes() and has_synchronised_norms)
        self.memory = OutOfMemoryRecovery(
            model, forward, settings.accumulation_steps, can_redo=not self.passes_are_joint
        )

    def make(self, step: int) -> StepResult | None:
        """One update: the mean gradient of some batches, a look at whether all is finite everywhere, then the step.

        Returns:
            Its numbers, or None where the step was skipped.
        """
        started_s = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        start = StartingPoint.of(self.model)
        losses, gradient_norm, report = self._compute(step, start)
        if self._is_to_be_skipped(step, share_rare(report)):
            start.go_back()
            self._skip()
            return None
        if several_processes() and not self.is_sharded:
            # The norm of a mean is at most the mean of the norms: it is as finite as they are.
            exchange_gradients(self.model)
            gradient_norm = self._gradient_norm()
        if self.settings.max_gradient_norm is not None:
            clip_grads_with_norm_(self._parameters(), self.settings.max_gradient_norm, gradient_norm)
        self.optimizer.step()
        self.scheduler.step()
        send_from_main(running_statistics(self.model))
        self.skipped.in_a_row = 0
        return StepResult(losses, gradient_norm, learning_rate, time.perf_counter() - started_s, self.waited_s)

    def _compute(self, step: int, start: StartingPoint) -> tuple[list[dict[str, Tensor]], Tensor, _Report | None]:
        """Losses of each micro-batch and the norm of their mean gradient, in this process."""
        self.waited_s = 0.0
        try:
            micro_batches, events = self.memory.add_gradients(step, start, partial(self._next_batch, step))
            losses = [micro_batch.losses for micro_batch in micro_batches]
            gradient_norm = self._gradient_norm()
            not_finite = None
            if not _are_finite(losses, gradient_norm):
                self.optimizer.zero_grad(set_to_none=True)  # makes room
                start.go_back()
                not_finite = self._diagnose(step, micro_batches)
        except SwinDenseError as error:
            if self.passes_are_joint:  # the others may be waiting in the middle of a pass
                raise
            return [], torch.zeros(()), _Report(error=error)
        has_news = bool(events) or not_finite is not None
        return losses, gradient_norm, _Report(events, not_finite) if has_news else None

    def _diagnose(self, step: int, micro_batches: Sequence[MicroBatch[B]]) -> str:
        if self.is_sharded:  # no process can compute alone
            images = "; ".join(micro_batch.batch.describe() for micro_batch in micro_batches)
            return f"in process {process_rank()} not finite, or in another one, with {images}."
        diagnosis: Diagnosis[B] = diagnose(
            self.model,
            micro_batches,
            self.forward,
            self.forward_float32,
            in_float32=self.settings.precision == "float32",
        )
        where = f"in process {process_rank()} " if several_processes() else ""
        if diagnosis.verdict == "weights":
            raise DivergenceError(
                f"step {step}: training diverged: {where}{diagnosis} Resume the last state with a lower learning rate."
            )
        kept = "" if self.bad_batches is None else save_bad_batch(self.bad_batches, step, process_rank(), diagnosis)
        return f"{where}{diagnosis} {kept}".rstrip()

    def _is_to_be_skipped(self, step: int, reports: Sequence[_Report]) -> bool:
        """Looks at what the processes have told each other, and raises what ends the run in all of them."""
        for event in (event for report in reports for event in report.events):
            self.on_event(event)
        for report in reports:
            if report.error is not None:
                raise report.error
        problems = " ".join(report.not_finite for report in reports if report.not_finite is not None)
        if not problems:
            return False
        self.skipped.in_a_row += 1
        self.skipped.in_all += 1
        most = self.settings.max_skipped_steps
        if self.skipped.in_a_row > most:
            raise DivergenceError(
                f"step {step}: training diverged, more than {most} steps in a row are not finite; this one: {problems} "
                "Look at these images; otherwise lower the learning rate, limit the gradient norm or use float32."
            )
        text = f"step {step}: skipped, {self.skipped.in_a_row} in a row of at most {most}: {problems}"
        self.on_event(Event(step, "skipped", text))
        return True

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # In the first step torch takes a missing update for a mistake.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            self.scheduler.step()

    def _next_batch(self, step: int) -> B:
        waiting_since_s = time.perf_counter()
        try:
            batch = next(self.batches)
        except StopIteration:
            raise ConfigError(
                f"the batches ended in step {step} of {self.settings.total_steps}: the loader must give "
                f"{self.settings.accumulation_steps} for each remaining step. Let it start over, or lower total_steps."
            ) from None
        self.waited_s += time.perf_counter() - waiting_since_s
        return batch

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gradient_norm(self) -> Tensor:
        return whole(get_total_norm([parameter.grad for parameter in self._parameters() if parameter.grad is not None]))


def _forward(
    model: nn.Module,
    compute_losses: Callable[[nn.Module, B], Mapping[str, LossTerm]],
    device: torch.device,
    precision: Precision,
    batch: B,
) -> Mapping[str, LossTerm]:
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return compute_losses(model, batch)


def _are_finite(losses: Sequence[Mapping[str, Tensor]], gradient_norm: Tensor) -> bool:
    """Waits for the device, once a step."""
    numbers = [*(total(named) for named in losses), gradient_norm]
    return bool(torch.stack([number.isfinite() for number in numbers]).all())


def _evaluate(model: nn.Module, on_evaluate: Callable[[int], None], step: int, signals: StopSignals) -> None:
    with preserved_random_state(), signals.at_once():
        on_evaluate(step)
    model.train()


def _step_log(step: int, result: StepResult) -> StepLog:
    """Numbers of this step alone: a mean since the last log would differ in a resumed run."""
    sums: dict[str, float] = {}
    for losses in result.losses:
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss)
    means = average_scalars({name: value / len(result.losses) for name, value in sums.items()})
    return StepLog(step, means, float(result.gradient_norm), result.learning_rate, result.seconds, result.data_seconds)
