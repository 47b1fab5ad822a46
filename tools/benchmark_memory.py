"""Memory of a loader's workers on an annotation file as large as COCO's for training.

Measured is the sum of the proportional set sizes (`Pss` in /proc/PID/smaps_rollup) of the main process and all workers:
a page that n processes share counts 1/n in each, so the sum is what they take together. Each worker first looks up the
name, id and size of every image, loads some whole samples and looks for cyclic garbage once, which writes to all that
Python knows: so it has touched what it touches in many epochs. The same is done with a file of a few images; the
difference is what the data set takes, without interpreter and libraries.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from swin_dense.errors import ConfigError
from swin_dense.tools.benchmark_scenes import NUM_COCO_ANNOTATIONS, NUM_COCO_IMAGES
from swin_dense.tools.markdown_page import markdown_table, wrapped

if TYPE_CHECKING:
    from swin_dense.datasets.coco import CocoDataset

_SMALL = (64, 512)
_SAMPLES_EACH = 8
_START_METHODS = ("fork", "spawn")
_MIB = 2**20

_Figures = dict[str, dict[str, float]]


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns MiB by start method and number of workers, {"fork": {"8": {"all": ..., ...}}}.

    Raises:
        ConfigError: The system has no /proc/PID/smaps_rollup.
    """
    from swin_dense.tools.tables import print_table

    if not Path("/proc/self/smaps_rollup").exists():
        raise ConfigError("--memory reads /proc/PID/smaps_rollup, which this system has not; it needs Linux.")
    counts = sorted(set(arguments.workers))
    large = measure_file(NUM_COCO_IMAGES, NUM_COCO_ANNOTATIONS, counts)
    small = measure_file(*_SMALL, counts)
    figures = {method: _differences(large[method], small[method]) for method in _START_METHODS}
    for method, rows in figures.items():
        print_table(_title(method), {f"{count} workers": row for count, row in rows.items()})
        print(_growth(rows))
    return figures


def memory_parts(figures: Mapping[str, _Figures]) -> list[str]:
    """The same as parts of a section."""
    parts: list[str] = []
    for method, rows in figures.items():
        cells = {
            f"{count} workers": {name.replace("_", " "): f"{mib:,.0f}" for name, mib in row.items()}
            for count, row in rows.items()
        }
        parts += [wrapped(f"{_title(method)}."), markdown_table(cells), f"{_growth(rows)}."]
    return parts


def _title(method: str) -> str:
    return (
        f"MiB of main process and workers together (sum of Pss), workers started by {method}; "
        f"{NUM_COCO_IMAGES:,} images, {NUM_COCO_ANNOTATIONS:,} annotations"
    )


def _growth(rows: _Figures) -> str:
    first, *_, last = *rows, *rows
    growth = rows[last]["data_set"] / rows[first]["data_set"]
    return f"The data set takes {growth:.2f} times as much with {last} workers as with {first}"


def _differences(large: dict[str, float], small: dict[str, float]) -> _Figures:
    return {
        count: {"all": large[count], "with_64_images": small[count], "data_set": large[count] - small[count]}
        for count in large
    }


def measure_file(num_images: int, num_annotations: int, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """MiB of main process and workers, {start method: {number of workers: MiB}}, in a process of its own."""
    from swin_dense.tools.benchmark_scenes import write_large_annotations

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_large_annotations(folder / "instances.json", num_images, num_annotations)
        _link_pictures(folder, num_images)
        process = multiprocessing.get_context("spawn").Process(target=_measure, args=(folder, list(counts)))
        process.start()
        process.join()
        if process.exitcode:
            raise ConfigError(f"--memory: the measuring process ended with code {process.exitcode}; is memory short?")
        return json.loads((folder / "figures.json").read_text())


def _link_pictures(folder: Path, num_images: int) -> None:
    """One picture under all names."""
    from PIL import Image

    picture = folder / "picture.jpg"
    Image.new("RGB", (640, 480)).save(picture)
    images = folder / "images"
    images.mkdir()
    for number in range(1, num_images + 1):
        (images / f"{number:012}.jpg").symlink_to(picture)


def _measure(folder: Path, counts: Sequence[int]) -> None:
    from swin_dense.datasets.coco import CocoDataset

    dataset = CocoDataset(folder / "instances.json", folder / "images")
    figures = {
        method: {str(count): _loading_pss_mib(dataset, count, method) for count in counts} for method in _START_METHODS
    }
    (folder / "figures.json").write_text(json.dumps(figures))


class TouchedDataset:
    """Looks up every image of a data set before it gives a sample.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: CocoDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> int:
        """Do so, load a few samples and return the process's id."""
        for row in range(len(self)):
            self._dataset.image_path(row), self._dataset.image_ids[row], self._dataset.sizes_hw[row]
        for row in range(index, len(self), len(self) // _SAMPLES_EACH):
            self._dataset[row]
        gc.collect()
        return os.getpid()


def _loading_pss_mib(dataset: CocoDataset, count: int, method: str) -> float:
    """MiB of this process and its workers after each of these has given one sample of `TouchedDataset`."""
    from torch.utils.data import DataLoader

    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as asked for
    loader: Any = DataLoader  # its types know of torch's data sets only
    batches = loader(
        TouchedDataset(dataset),
        sampler=range(count),
        batch_size=None,
        num_workers=count,
        prefetch_factor=1,
        persistent_workers=True,  # they are still there when all samples are
        multiprocessing_context=method,
    )
    pids = set(batches)
    return (pss_bytes(os.getpid()) + sum(map(pss_bytes, pids))) / _MIB


def pss_bytes(pid: int) -> int:
    """A process's proportional set size."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
