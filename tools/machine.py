"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

_PACKAGES = (
    "swin-dense",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "pycocotools",
    "albumentations",
    "segmentation-models-pytorch",
    "timm",
)


def describe_machine() -> dict[str, str]:
    """Date, processor, GPUs where there are any, and versions, without which a figure says nothing."""
    described = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": f"cpu ({device_name('cpu')})",
        **_gpus(),
        "python": platform.python_version(),
    }
    return described | {name: version(name) for name in _PACKAGES}


def device_name(device: str) -> str:
    """What kind of device it is, such as "NVIDIA H200" or "AMD EPYC, 2 cores".

    Args:
        device: As torch names it: "cpu", "cuda" or "cuda:1".
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    count = os.cpu_count()
    return f"{_processor()}, {count} {'core' if count == 1 else 'cores'}"


def machine_line(machine: Mapping[str, str]) -> str:
    """The same in one line."""
    return "  ".join(f"{name} {value}" for name, value in machine.items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _gpus() -> dict[str, str]:
    import torch

    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return {"gpu": ", ".join(f"{count} x {name}" for name, count in names.items())} if names else {}
