"""One process per device on one or many machines: torchrun's environment and `DistributedDataParallel`.

The same code runs without torchrun as the only process: every function here then does nothing, or the obvious thing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swin_dense.errors import ConfigError

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """The place of this process among all that train together.

    Args:
        rank: Its number among all processes, 0 first.
        local_rank: Its number on its machine.
        world_size: Number of all processes.
        device: The device it computes on.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0


def process_from_environment(device: str = "auto") -> Process:
    """Reads what torchrun says of this process.

    Args:
        device: "auto" (CUDA where there is one), or a device name as torch knows it. Plain "cuda" is the device
            with this process's local rank.

    Returns:
        The process; rank 0 of 1 where torchrun did not start it.

    Raises:
        ConfigError: The environment is incomplete or not numbers, or the machine has no such device.
    """
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        rank, local_rank, world_size = 0, 0, 1
    elif missing:
        raise ConfigError(
            f"environment of a distributed run without {', '.join(missing)}: start the processes with torchrun."
        )
    else:
        rank, local_rank, world_size = (_environment_number(name) for name in TORCHRUN_VARIABLES[:3])
    return Process(rank, local_rank, world_size, _device(device, local_rank))


@contextmanager
def distributed(device: str = "auto", *, timeout_s: float = 1800.0) -> Iterator[Process]:
    """Joins the processes for the length of the block, over NCCL on CUDA and Gloo on the CPU.

    Args:
        device: As in `process_from_environment`.
        timeout_s: Seconds that a process waits for the others before it gives up.

    Yields:
        The place of this process.

    Raises:
        ConfigError: As in `process_from_environment`.
    """
    process = process_from_environment(device)
    on_cuda = process.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(process.device)
    if process.world_size == 1:
        yield process
        return
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=process.device if on_cuda else None,
    )
    try:
        yield process
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, process: Process, *, synchronise_batch_norm: bool = False) -> nn.Module:
    """Moves a model to the device of its process and joins its gradients with those of the others.

    Build the optimiser on the model itself, after this call; train the returned module.

    Args:
        model: Same architecture in every process; the weights of rank 0 are sent to all.
        process: The place of this process.
        synchronise_batch_norm: BatchNorm statistics over the batches of all processes; CUDA only.

    Returns:
        The model where there is one process, else a `DistributedDataParallel` around it.

    Raises:
        ConfigError: Synchronised BatchNorm is asked for on several CPU processes, where torch has none.
    """
    model = model.to(process.device)
    if process.world_size == 1:
        return model
    if synchronise_batch_norm:
        if process.device.type != "cuda":
            raise ConfigError("synchronised BatchNorm needs CUDA devices: switch it off, or train with one process.")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    device_ids = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without `DistributedDataParallel` and `torch.compile` around it."""
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    original = getattr(model, "_orig_mod", None)
    return unwrap(original) if isinstance(original, nn.Module) else model


def barrier() -> None:
    """Waits until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: T) -> list[T] | None:
    """Brings one picklable value of each process to the main one; every process must call it.

    Returns:
        The values by rank in the main process, None in the others.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered  # type: ignore[return-value]  # every None was replaced


def average_scalars(scalars: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes; every process must call it, with the same names.

    Returns:
        The same means in every process, in the order of `scalars`.
    """
    if not dist.is_initialized() or not scalars:
        return dict(scalars)
    names = sorted(scalars)
    values = torch.tensor([scalars[name] for name in names], dtype=torch.float64, device=_collective_device())
    dist.all_reduce(values)
    means = dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))
    return {name: means[name] for name in scalars}


def any_process(flags: Sequence[bool]) -> list[bool]:
    """For each flag whether it is set in any process; every process must call it, with as many flags."""
    if not dist.is_initialized():
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=_collective_device())
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _environment_number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"environment variable {name} must be a number, got {os.environ[name]!r}.") from None


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:<number>.")
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device cuda:{index} asked for, but this machine has {torch.cuda.device_count()} CUDA devices. "
            "Start fewer processes per machine, or use --device cpu."
        )
    return torch.device("cuda", index)
