"""Which of torchrun's rounds this is: the processes agree on a name for it before they talk about anything else.

torchrun starts all processes anew when one dies, and lets every round use the same key-value store, where the dead have
left their addresses: a process that reads one of these waits for nobody (pytorch/pytorch#135712, #167288). torchrun's
count of restarts does not tell rounds apart, because each machine counts its own.
"""

import time
import uuid

from torch.distributed import Store

from swin_dense.errors import ConfigError

ROUND = "swin_dense/round"
POLL_S = 0.02


def agree_on_round(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Gives all living processes the same name, which no round before had; every process must call it.

    Process 0 makes up a name. Another process reads it, and believes it once its own newest question was answered under
    that name, which only a living process 0 can do.

    Args:
        store: Shared by all processes; may hold whatever earlier rounds have left.
        rank: Number of this process.
        world_size: Number of all.
        timeout_s: Seconds that a process waits for the others.

    Raises:
        ConfigError: The others did not come in time.
    """
    deadline_s = time.monotonic() + timeout_s
    question = uuid.uuid4().hex
    if rank == 0:
        store.set(ROUND, question)
        for other in range(1, world_size):
            _wait(store, f"{question}/{other}", deadline_s, other)
            store.set(f"{question}/{other}/{_text(store, f'{question}/{other}')}", "")
        return question
    while True:
        _wait(store, ROUND, deadline_s, 0)
        name = _text(store, ROUND)
        store.set(f"{name}/{rank}", question)
        while _text(store, ROUND) == name:
            if store.check([f"{name}/{rank}/{question}"]):
                return name
            _pause(deadline_s, 0)


def _text(store: Store, key: str) -> str:
    return store.get(key).decode()


def _wait(store: Store, key: str, deadline_s: float, process: int) -> None:
    while not store.check([key]):
        _pause(deadline_s, process)


def _pause(deadline_s: float, process: int) -> None:
    if time.monotonic() > deadline_s:
        raise ConfigError(f"process {process} did not come in time. Is it running, and can its machine be reached?")
    time.sleep(POLL_S)
