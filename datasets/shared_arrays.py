"""Numpy arrays that all worker processes of a loader share, however these are started."""

import shutil
from collections.abc import Iterator
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np

_LEAST_BYTES = 2**16
_SHARED_MEMORY = Path("/dev/shm")


class SharedArrays:
    """Base of a record whose large arrays are moved to shared memory when a worker that is not forked gets it.

    A forked worker shares every page that nobody writes to, and arrays are not written to. One started by "spawn" or
    "forkserver" gets a pickled copy of all it needs; here it gets a handle to the one copy that there is. Where shared
    memory is short, as in many containers, it gets its own copy after all. The arrays must not be written to any more.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes; on the way to a new process the large arrays as shared tensors."""
        if get_spawning_popen() is None:
            return {name: value for name, value in vars(self).items() if name != "_shared"}
        import torch  # here: whoever only reads annotation files does without

        shared: dict[str, torch.Tensor] = vars(self).setdefault("_shared", {})
        large = {name: value for name, value in vars(self).items() if name not in shared and _is_large(value)}
        if _has_room(sum(value.nbytes for value in large.values())):
            for name, value in large.items():
                shared[name] = torch.from_numpy(np.require(value, requirements=["C", "W"])).share_memory_()
                vars(self)[name] = shared[name].numpy()
        return {name: value for name, value in vars(self).items() if name not in shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what `__getstate__` returned."""
        vars(self).update(state)
        vars(self).update({name: tensor.numpy() for name, tensor in state.get("_shared", {}).items()})


class FileNames(SharedArrays):
    """File names in one flat array: a worker that looks at a str counts the reference, and so copies the memory page.

    Args:
        names: the names.
    """

    def __init__(self, names: list[str]) -> None:
        # Any text that JSON can hold comes back as it was, half a surrogate pair too.
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in 0..{len(self) - 1}")
        return self._bytes[self._ends[row] : self._ends[row + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


def _is_large(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.nbytes >= _LEAST_BYTES


def _has_room(num_bytes: int) -> bool:
    # More than there is would end the process without a word.
    return not _SHARED_MEMORY.is_dir() or 2 * num_bytes < shutil.disk_usage(_SHARED_MEMORY).free
