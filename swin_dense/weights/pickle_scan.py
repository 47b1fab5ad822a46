"""What the pickle inside a torch file would create, found by reading its instructions without following them.

torch's own restricted reader stays in charge of opening a file. Before it may, the scan makes sure that every name in
the pickle is a part of tensors or has a harmless stand-in, and that no size in it exceeds what the file holds.
"""

from __future__ import annotations

import pickletools
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any, BinaryIO

from swin_dense.errors import CheckpointError
from swin_dense.weights.foreign_objects import ForeignMapping, ForeignObject, ForeignSequence, StandIn, is_harmless

_BYTES_PER_NUMBER = {
    **{f"{kind}Storage": size for kind, size in (("Double", 8), ("Float", 4), ("Half", 2), ("BFloat16", 2))},
    **{f"{kind}Storage": size for kind, size in (("Long", 8), ("Int", 4), ("Short", 2), ("Char", 1), ("Byte", 1))},
    **{f"{kind}Storage": size for kind, size in (("Bool", 1), ("ComplexDouble", 16), ("ComplexFloat", 8))},
    "UntypedStorage": 1,
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_REBUILDING = frozenset(
    [f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")]
    + ["torch._utils._rebuild_parameter_with_state"]
)
# Rebuilds a tensor with attributes of its own, by the function that is its first argument.
_REBUILDING_BY = "torch._tensor._rebuild_from_type_v2"
_CALLED = _REBUILDING | {
    _REBUILDING_BY,
    "torch.Size",
    "torch.device",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
}
_NAMED = frozenset(
    ["torch.Tensor", "torch.nn.parameter.Parameter"]
    + [f"torch.{name}" for name in ("bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128")]
    + [f"torch.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    + [f"torch.float8_{name}" for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")]
)
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
}
# More exists in no checkpoint. Hashing a tuple that is a million deep ends the process, and hashing one that holds
# itself twice at every level takes for ever.
_DEEPEST_TUPLE = 50
_LARGEST_TUPLE = 100_000
_HIGHEST_PROTOCOL = 3


@dataclass
class PickleScan:
    """What a pickle refers to.

    Attributes:
        storage_bytes: Storage key -> size in bytes that the pickle claims for it.
        foreign: Full name -> stand-in, of every object of another library.
    """

    storage_bytes: dict[str, int] = field(default_factory=dict)
    foreign: dict[str, StandIn] = field(default_factory=dict)


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Instance:
    """What calling a foreign name gives."""

    name: str


@dataclass(frozen=True)
class _Tuple:
    items: tuple[Any, ...]
    depth: int
    size: int


class _Other:
    """A value whose content does not matter here."""


_OTHER = _Other()


def scan_pickle(file: BinaryIO | mmap, source: str) -> PickleScan:
    """Read the next pickle of a file up to its end; nothing in it is executed.

    Args:
        file: Stands at the pickle's first byte, afterwards behind its last. It is in memory or mapped into it.
        source: The file's name for messages.

    Raises:
        CheckpointError: The pickle is damaged, of a protocol that torch does not read safely, or refers to anything
            but tensors, plain values and harmless objects.
    """
    scan = _Scanner(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd escapes in the texts of damaged files
            for instruction, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # a map reads like a file
                scan.follow(instruction.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: its list of tensors is damaged or cut ({type(error).__name__}). Use another copy of it."
        ) from None
    return scan.found


class _Scanner:
    """The stack machine that a pickle is written for, with names and outlines in place of objects."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found = PickleScan()
        self._stack: list[Any] = []
        self._stacks_below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def follow(self, instruction: str, argument: object) -> None:
        if instruction == "PROTO" and isinstance(argument, int) and argument > _HIGHEST_PROTOCOL:
            raise CheckpointError(
                f"{self.source}: is pickled with protocol {argument}; torch reads up to {_HIGHEST_PROTOCOL} safely. "
                "Ask for a file that torch.save wrote without pickle_protocol, or for safetensors."
            )
        if instruction not in _STEPS:
            raise CheckpointError(
                f"{self.source}: holds the pickle instruction {instruction}, which torch does not read safely. "
                "Ask for a file that torch.save wrote without pickle_protocol, or for safetensors."
            )
        _STEPS[instruction](self, argument)

    def push(self, value: object) -> None:
        self._stack.append(value)

    def push_other(self, _: object) -> None:
        self._stack.append(_OTHER)

    def push_global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        # As torch does: names of Python 2, which protocol 2 still writes.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f"{module}.{name}"
        if module in _STORAGE_MODULES and name in _BYTES_PER_NUMBER:
            self.push(_Global(name))
            return
        if full_name not in _CALLED and full_name not in _NAMED:
            if not is_harmless(full_name):
                raise CheckpointError(f"{self.source}: {_reason_against(full_name)}")
            self.found.foreign.setdefault(full_name, ForeignObject)
        self.push(_Global(full_name))

    def call(self, _: object) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop()
        if function.name in self.found.foreign:
            self.push(_Instance(function.name))
            return
        if function.name not in _CALLED:
            raise CheckpointError(f"{self.source}: {_reason_against(function.name)}")
        if function.name == _REBUILDING_BY and arguments.items[0].name not in _REBUILDING:
            raise CheckpointError(f"{self.source}: {_reason_against(arguments.items[0].name)}")
        self.push(_OTHER)

    def mark(self, _: object) -> None:
        self._stacks_below_marks.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._stacks_below_marks.pop()
        return items

    def push_marked_tuple(self, _: object) -> None:
        self._push_tuple(self.pop_to_mark())

    def push_tuple_of(self, length: int) -> None:
        items = self._stack[len(self._stack) - length :]
        del self._stack[len(self._stack) - length :]
        self._push_tuple(items)

    def append(self, _: object) -> None:
        self._stack.pop()
        self._use_as(ForeignSequence)

    def append_marked(self, _: object) -> None:
        self.pop_to_mark()
        self._use_as(ForeignSequence)

    def set_item(self, _: object) -> None:
        del self._stack[-2:]
        self._use_as(ForeignMapping)

    def set_marked_items(self, _: object) -> None:
        self.pop_to_mark()
        self._use_as(ForeignMapping)

    def build(self, _: object) -> None:
        self._stack.pop()

    def memorise(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def claim_storage(self, _: object) -> None:
        kind, storage, key, _location, count = self._stack.pop().items[:5]
        size = count * _BYTES_PER_NUMBER[storage.name]
        if kind != "storage" or not isinstance(key, str) or size < 0:
            raise ValueError("not a storage")
        claimed = self.found.storage_bytes
        claimed[key] = max(size, claimed.get(key, 0))
        self.push(_OTHER)

    def stop(self, _: object) -> None:
        self._stack.pop()

    def _push_tuple(self, items: list[Any]) -> None:
        inner = [item for item in items if isinstance(item, _Tuple)]
        depth = 1 + max((item.depth for item in inner), default=0)
        size = len(items) + sum(item.size for item in inner)
        if depth > _DEEPEST_TUPLE or size > _LARGEST_TUPLE:
            raise CheckpointError(f"{self.source}: holds a tuple {depth} deep of {size} values; no checkpoint does.")
        self.push(_Tuple(tuple(items), depth, size))

    def _use_as(self, stand_in: StandIn) -> None:
        container = self._stack[-1]
        if isinstance(container, _Instance):
            self.found.foreign[container.name] = stand_in


def _reason_against(name: str) -> str:
    if name in _OTHER_TENSORS:
        return f"holds {_OTHER_TENSORS[name]} tensors; ask for a file with plain ones."
    if name.startswith("torch.nn.modules."):
        return f"holds a whole pickled model ({name[:80]}), not its weights. Ask for a file with model.state_dict()."
    if name.startswith("torch.distributed."):
        return f"holds pieces of distributed tensors ({name[:80]}). Ask for a file with the gathered state dict."
    return (
        f"opening it would call {name[:80]}, which is refused; nothing was executed. "
        "Ask for a file with plain tensors (a state dict), or for safetensors."
    )


# Exactly the instructions that torch's restricted reader knows.
_STEPS: dict[str, Callable[[_Scanner, Any], None]] = {
    **{name: _Scanner.push for name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")},
    **{name: _Scanner.push_other for name in ("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "SHORT_BINSTRING")},
    **{name: _Scanner.push_other for name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")},
    **{name: _Scanner.memorise for name in ("BINPUT", "LONG_BINPUT")},
    **{name: _Scanner.recall for name in ("BINGET", "LONG_BINGET")},
    **{name: _Scanner.call for name in ("REDUCE", "NEWOBJ")},
    "PROTO": lambda scanner, protocol: None,
    "GLOBAL": _Scanner.push_global,
    "BUILD": _Scanner.build,
    "MARK": _Scanner.mark,
    "EMPTY_TUPLE": lambda scanner, _: scanner.push_tuple_of(0),
    "TUPLE1": lambda scanner, _: scanner.push_tuple_of(1),
    "TUPLE2": lambda scanner, _: scanner.push_tuple_of(2),
    "TUPLE3": lambda scanner, _: scanner.push_tuple_of(3),
    "TUPLE": _Scanner.push_marked_tuple,
    "APPEND": _Scanner.append,
    "APPENDS": _Scanner.append_marked,
    "SETITEM": _Scanner.set_item,
    "SETITEMS": _Scanner.set_marked_items,
    "BINPERSID": _Scanner.claim_storage,
    "STOP": _Scanner.stop,
}
