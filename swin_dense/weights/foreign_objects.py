"""Harmless objects of other libraries in torch files: which they are, and what takes their place.

Training code writes its configuration, logs and progress beside the weights, as objects of libraries that need not be
installed here: yacs in the official Swin files, mmengine's HistoryBuffer in mmdetection's. None of them is needed to
read weights, so each becomes a stand-in that keeps nothing and does nothing; no foreign module is ever imported.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

# Of these packages and modules every class is accepted, which is a name whose last part begins with a capital.
_PACKAGES_OF_CLASSES = (
    # configurations
    "addict",
    "argparse",
    "attrdict",
    "box",
    "detectron2",
    "easydict",
    "fvcore",
    "ml_collections",
    "munch",
    "omegaconf",
    "yacs",
    # training code
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "mmcls",
    "mmcv",
    "mmdet",
    "mmengine",
    "mmpretrain",
    "mmseg",
    "pytorch_lightning",
    "timm",
    "torch.amp",
    "torch.cuda.amp",
    "torch.optim",
    "torch.torch_version",
    "torchvision",
    # numbers, and the standard library's plain values
    "collections",
    "decimal",
    "fractions",
    "numpy",
    "pathlib",
    "typing",
    "uuid",
)

_FURTHER_NAMES = frozenset(
    [f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "object", "range", "slice")]
    + [f"builtins.{name}" for name in ("str", "tuple")]
    # mmengine's HistoryBuffer refers to its own methods through getattr; here that yields one more stand-in.
    + ["builtins.getattr"]
    + ["collections.defaultdict", "collections.deque", "copyreg._reconstructor", "types.SimpleNamespace"]
    + [f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")]
    + ["numpy.dtype", "numpy.ndarray", "numpy.bool", "numpy.bool_", "numpy.str_", "numpy.bytes_"]
    + [f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + [f"numpy.float{bits}" for bits in (16, 32, 64)]
    # numpy 2 renamed numpy.core.
    + [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    + [f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")]
    + [f"numpy.random._pickle.__{name}_ctor" for name in ("randomstate", "generator", "bit_generator")]
    + ["numpy.random.bit_generator.__pyx_unpickle_SeedSequence"]
)


class ForeignObject:
    """Stands for an object, class or function of another library; forgets all that it is given."""

    def __new__(cls, *arguments: object) -> ForeignObject:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class ForeignMapping:
    """Stands for a class of mappings; its instances are plain `OrderedDict`s, the kind torch can fill."""

    def __new__(cls, *arguments: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # noqa: D102
        return OrderedDict()


class ForeignSequence:
    """Stands for a class of sequences; its instances are plain lists."""

    def __new__(cls, *arguments: object) -> list[Any]:  # type: ignore[misc]  # noqa: D102
        return []


StandIn = type[ForeignObject] | type[ForeignMapping] | type[ForeignSequence]


def libraries_of(names: Iterable[str]) -> tuple[str, ...]:
    """The libraries that full names belong to, sorted; "standard library" for Python's own."""
    roots = {name.partition(".")[0] for name in names}
    return tuple(sorted({"standard library" if root in sys.stdlib_module_names else root for root in roots}))


def is_harmless(name: str) -> bool:
    """Whether a stand-in may take the place of an object, by its full name, such as "yacs.config.CfgNode"."""
    if name in _FURTHER_NAMES:
        return True
    module, _, last = name.rpartition(".")
    is_class = last.lstrip("_")[:1].isupper()
    return is_class and any(f"{module}.".startswith(f"{package}.") for package in _PACKAGES_OF_CLASSES)
