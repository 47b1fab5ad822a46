"""Measure this library beside others on your machine, in one run; the figures of two machines or days do not compare.

`--json` writes what is printed: {"machine": ..., "data": ...} with every repetition's time.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("swin-dense", "torch", "torchvision", "numpy", "pillow", "pycocotools", "albumentations")

HELP = "Measure speed and memory beside another library, in one run on this machine."
EXAMPLE = """  swin-dense benchmark data
  swin-dense benchmark data --annotations instances_val2017.json --images val2017 --repeats 9 --json data.json
  swin-dense benchmark data --memory --workers 1 8          (some minutes, 4 GB)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    text = "time to load an image with its objects, beside torchvision; or memory of the loader's workers"
    data = parts.add_parser("data", help=text, description=text, allow_abbrev=False)
    data.add_argument("--annotations", type=Path, metavar="JSON", help="COCO annotation file; default: generated data")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of its images")
    data.add_argument(
        "--peers", nargs="*", choices=["torchvision"], default=["torchvision"], help="default: torchvision"
    )
    data.add_argument("--repeats", type=int, default=7, metavar="N", help="how often to load every image; default: 7")
    data.add_argument("--pictures", type=int, default=20, metavar="N", help="how many images; default: 20")
    data.add_argument("--memory", action="store_true", help="measure memory instead, on a file of COCO's size")
    data.add_argument(
        "--workers", type=int, nargs="+", default=[1, 8], metavar="N", help="with --memory: how many; default: 1 8"
    )
    data.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error arose")
    data.add_argument("--json", type=Path, metavar="FILE", help="write every figure")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write what was asked for."""
    from swin_dense.tools.tables import write_json

    _require_fitting(arguments)
    machine = describe_machine()
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    if arguments.memory:
        from swin_dense.tools.benchmark_memory import measure_memory as measure
    else:
        from swin_dense.tools.benchmark_data import measure_loading as measure
    figures = measure(arguments)
    write_json(arguments.json, {"machine": machine, "data": figures})
    return 0


def describe_machine() -> dict[str, str]:
    """Date, processor and versions, without which a figure says nothing."""
    described = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": f"cpu ({_processor()}, {os.cpu_count()} cores)",
        "python": platform.python_version(),
    }
    return described | {name: version(name) for name in _PACKAGES}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _require_fitting(arguments: argparse.Namespace) -> None:
    from swin_dense.errors import ConfigError

    if (arguments.annotations is None) != (arguments.images is None):
        raise ConfigError("--annotations and --images go together.")
    if arguments.memory and arguments.annotations is not None:
        raise ConfigError("--memory measures a generated annotation file; leave out --annotations and --images.")
    for name in ("repeats", "pictures"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if min(arguments.workers) < 1:
        raise ConfigError(f"--workers must be at least 1 each, got {arguments.workers}.")


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range of repeated measurements: {"median": ..., "min": ..., "max": ..., "all": ...}."""
    from statistics import median

    return {"median": median(values), "min": min(values), "max": max(values), "all": values}


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
