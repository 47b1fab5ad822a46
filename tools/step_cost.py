"""Memory and time of training steps, each kind measured in a process of its own, so that no peak hides another.

Nothing depends on the content of images or weights, so one sample is copied and the weights are random; the learning
rate is 0, so that no step diverges.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from swin_dense.blocks import DropPath
from swin_dense.errors import ConfigError, SwinDenseError
from swin_dense.tools.micro_batch_choice import Split
from swin_dense.tools.recipe import Recipe
from swin_dense.tools.step_settings import resolve_precision
from swin_dense.tools.tasks import Task, task_of
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import add_gradient
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.out_of_memory import is_out_of_memory
from swin_dense.training.progress import peak_memory_bytes
from swin_dense.training.weight_average import WeightAverage

ENOUGH_S = 60.0
"""No further step is begun after so long; the first and one more are always made."""

_LOOK_EVERY_S = 0.05
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class StepJob:
    """What to measure.

    Attributes:
        recipe: The recipe; model, optimiser and average of the weights follow from it.
        num_classes: Of the data set.
        sample: What the task collates; every image of the batch is this one.
        split: Micro-batch and accumulation. Backbone stages are those of `recipe`.
        steps: To measure at most, after one that is not.
        device: Where to.
        memory_bytes: More is not to be used.
    """

    recipe: Recipe
    num_classes: int
    sample: Any
    split: Split
    steps: int
    device: torch.device
    memory_bytes: int


@dataclass(frozen=True)
class StepCost:
    """What a step costs.

    Attributes:
        peak_bytes: On a GPU the most that torch has reserved, on the CPU the most that the process has held.
        step_time_s: Median, of a step with all its micro-batches.
    """

    peak_bytes: int
    step_time_s: float


def step_cost(job: StepJob, on_step: Callable[[int], None]) -> StepCost | None:
    """Measures a job in a new process.

    Args:
        job: What to measure.
        on_step: Gets the number of steps made.

    Returns:
        The cost; None where memory did not suffice, whoever noticed: torch, the system, or the given limit.

    Raises:
        SwinDenseError: What a training step would raise.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # In bytes: tensors as they are would go through shared memory, of which containers have little.
    process = context.Process(target=_measure_and_send, args=(pickle.dumps(job), sender), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(_LOOK_EVERY_S):
                if job.device.type == "cpu" and resident_bytes(process.pid) > job.memory_bytes:
                    return None
                continue
            message = receiver.recv()
            if isinstance(message, SwinDenseError):
                raise message
            if not isinstance(message, int):
                return message
            on_step(message)
    except EOFError:
        process.join()
        if process.exitcode == -9:  # SIGKILL, the system's answer to a process that takes too much
            return None
        raise ConfigError(f"the process that measures a step ended with code {process.exitcode}.") from None
    finally:
        process.kill()
        process.join()


def _measure_and_send(job: bytes, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked gets it too, and ends this one
    try:
        sender.send(make_steps(pickle.loads(job), sender.send))
    except SwinDenseError as error:
        sender.send(error)


def make_steps(job: StepJob, on_step: Callable[[int], None]) -> StepCost | None:
    """The same in this process, whose peak counts from its start.

    At most two micro-batches are computed: with a second one gradients take memory during the forward pass, further
    ones add nothing but their time, which is counted.
    """
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
        in_all = torch.cuda.get_device_properties(job.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_bytes / in_all), job.device)
        torch.cuda.reset_peak_memory_stats(job.device)
    times_s: list[float] = []
    try:
        steps = _Steps(job)
        started_s = time.perf_counter()
        while len(times_s) <= job.steps and (len(times_s) < 2 or time.perf_counter() - started_s < ENOUGH_S):
            # Stochastic depth saves memory by chance. The first step, whose time does not count, drops nothing.
            with nullcontext() if times_s else nothing_dropped(steps.model):
                times_s.append(steps.make())
            on_step(len(times_s))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    # The first step also allocates, chooses kernels and fills caches.
    step_time_s = median(times_s[1:]) * job.split.accumulation_steps / steps.micro_batches
    return StepCost(peak_bytes(job.device), step_time_s)


@contextmanager
def nothing_dropped(model: nn.Module) -> Iterator[None]:
    """Stochastic depth keeps every path meanwhile."""
    rates = {module: module.rate for module in model.modules() if isinstance(module, DropPath)}
    try:
        for module in rates:
            module.rate = 0.0
        yield
    finally:
        for module, rate in rates.items():
            module.rate = rate


class _Steps:
    """Model, optimiser and batch of a job."""

    def __init__(self, job: StepJob) -> None:
        settings = job.recipe.optimizer
        task = task_of(job.recipe)
        self.device = job.device
        self.micro_batches = min(2, job.split.accumulation_steps)
        self.max_gradient_norm = settings.max_gradient_norm
        self.batch = task.collate([job.sample] * job.split.micro_batch_size)
        self.model = task.build_model(job.num_classes).to(job.device).train()
        self.forward = partial(
            _forward, self.model, task, job.device, resolve_precision(settings.precision, job.device)
        )
        self.optimizer = build_optimizer(
            self.model, learning_rate=0.0, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
        )
        decay = settings.average_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)

    def make(self) -> float:
        """A step as `training.loop` makes it; returns its seconds."""
        started_s = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.micro_batches):
            add_gradient(self.forward, self.batch, self.micro_batches)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.max_gradient_norm is not None:
            clip_grads_with_norm_(parameters, self.max_gradient_norm, norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started_s


def _forward(
    model: nn.Module,
    task: Task[Any, Any, Any],
    device: torch.device,
    precision: str,
    batch: Any,  # noqa: ANN401 - the task's own
) -> Mapping[str, LossTerm]:
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return task.losses(model, batch, device)


def memory_bytes(device: torch.device) -> int:
    """What a process may use: free memory of a GPU; on the CPU that of the system, up to its container's limit.

    Raises:
        ConfigError: The system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        raise ConfigError("this system does not tell how much memory is free: say how much to use, --memory-limit GB.")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(1024 * available, int(limit)) if limit.isdigit() else 1024 * available


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # A process's `ru_maxrss` begins with that of the process that started it.
    held = _kibibytes(Path("/proc/self/status"), "VmHWM")
    return peak_memory_bytes(device) if held is None else 1024 * held


def resident_bytes(process_id: int | None) -> int:
    """The memory that a process holds now; 0 where the system does not tell, or the process has ended."""
    return 1024 * (_kibibytes(Path(f"/proc/{process_id}/status"), "VmRSS") or 0)


def _kibibytes(path: Path, name: str) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
