"""One process per device on one or many machines: torchrun's environment, and what the processes tell each other.

The same code runs without torchrun as the only process: every function here then does nothing, or the obvious thing.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_dense.errors import ConfigError
from swin_dense.training.rendezvous import agree_on_round

BUCKET_BYTES = 25 * 2**20
"""As in torch's DistributedDataParallel: large enough to use the wire, small beside the gradients."""

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


def torchrun_call() -> str | None:
    """What tells one call of torchrun from others: the same in the main process before and after each restart.

    Returns:
        torchrun's --rdzv-id, which is a new one for each --standalone call; where there is none, the machine and the
        number of torchrun's process. None where torchrun did not start this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{socket.gethostname()} {os.getppid()}" if name in ("", "none") else name


def restarted() -> bool:
    """Whether torchrun has started the processes anew after one died; every process must call it.

    All are asked, because torchrun counts on each machine only the restarts that began there.
    """
    count = _environment_number("TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0
    return any_process([count > 0])[0]


@contextmanager
def distributed(device: str = "auto", *, timeout_s: float = 1800.0) -> Iterator[Process]:
    """Joins the processes for the length of the block, over NCCL on CUDA and Gloo on the CPU.

    Args:
        device: As in `process_from_environment`.
        timeout_s: Seconds that a process waits for the others before it gives up.

    Yields:
        The place of this process.

    Raises:
        ConfigError: As in `process_from_environment`, or the others did not come in time.
    """
    process = process_from_environment(device)
    on_cuda = process.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(process.device)
    if process.world_size == 1:
        yield process
        return
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.PrefixStore(agree_on_round(store, rank, world_size, timeout_s), store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=process.device if on_cuda else None,
    )
    try:
        yield process
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, process: Process, *, synchronise_batch_norm: bool = False) -> nn.Module:
    """Makes a model the same in all processes, on the device of each; `exchange_gradients` keeps it so.

    torch's DistributedDataParallel, which exchanges gradients during the last backward pass, is not used: a process
    that runs out of memory in there would leave the others waiting for ever. The cost is that no exchange hides behind
    a backward pass: each update takes longer by the time that its gradients need on the wire.

    Args:
        model: Same architecture in every process; the weights and buffers of rank 0 are sent to all.
        process: The place of this process.
        synchronise_batch_norm: BatchNorm statistics over the batches of all processes; CUDA only.

    Returns:
        The model to train; another object only where it is itself a BatchNorm that was replaced.

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
    send_from_main([*model.parameters(), *model.buffers()])
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without `torch.compile` around it."""
    original = getattr(model, "_orig_mod", None)
    return unwrap(original) if isinstance(original, nn.Module) else model


def several_processes() -> bool:
    """Whether there are others to talk to."""
    return dist.is_initialized() and dist.get_world_size() > 1


def process_rank() -> int:
    """The number of this process among all, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def exchange_gradients(model: nn.Module) -> None:
    """Replaces the gradient of every trainable parameter by its mean over the processes; every process must call it.

    They travel in buckets: what is needed besides the gradients is the memory of one bucket.

    Raises:
        ConfigError: A parameter has no gradient.
    """
    if not several_processes():
        return
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    if without:
        raise ConfigError(
            f"{len(without)} parameters have no gradient (first: {without[0]}): several processes can train only what "
            "every loss reaches. Set requires_grad to false for parameters that are not used, or use them."
        )
    for bucket in _buckets(parameter.grad for parameter in parameters.values() if parameter.grad is not None):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        _spread(flat, bucket)


@torch.no_grad()
def send_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors with those of rank 0; every process must call it, with tensors of the same shapes."""
    if not several_processes():
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat, src=0)
        _spread(flat, bucket)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the tensors in groups of one kind and limited size, in the same order in every process."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = waiting.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(member.nbytes for member in bucket) >= BUCKET_BYTES:
            yield waiting.pop((tensor.dtype, tensor.device))
    yield from waiting.values()


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))


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


def share_rare(value: T | None) -> list[T]:
    """Tells all processes what some have to say; every process must call it. Where none has, it costs one flag.

    Args:
        value: Picklable; None says nothing.

    Returns:
        The values of the processes that have one, by rank, the same in all of them.
    """
    if not any(any_process([value is not None])):
        return []
    values: list[T | None] = [value]
    if several_processes():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return [value for value in values if value is not None]


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
