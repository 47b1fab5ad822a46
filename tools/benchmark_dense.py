"""Host memory of one image full of objects, from the file to what the mask head should see, beside torchvision.

Both read the same picture and polygons, mirror them, keep the picture's size, and make the targets of as many sampled
boxes as Mask R-CNN trains its mask head on; torchvision by its own parts, with masks of the whole picture. Each does so
in a process of its own; measured is the most memory that the process ever held, and what that is above the same process
with everything imported and the annotations read.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from swin_dense.errors import ConfigError
from swin_dense.tools.markdown_page import markdown_table, wrapped

NUM_OBJECTS = 300
SIZE_HW = (1500, 2000)
_NUM_SAMPLES = 128  # a quarter of 512 boxes, as published
_MASK_SIZE = 28
_MIB = 2**20
_TITLE = f"MiB, one image of {SIZE_HW[0]} x {SIZE_HW[1]} pixels with {NUM_OBJECTS} objects"


def measure_dense(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns MiB, {"swin-dense": {"peak": ..., "above_start": ...}, "torchvision": the same}.

    Raises:
        ConfigError: The system has no /proc/PID/status.
    """
    from swin_dense.tools.tables import print_table

    if not Path("/proc/self/status").exists():
        raise ConfigError("--dense reads /proc/PID/status, which this system has not; it needs Linux.")
    loaders = {"swin-dense": load_ours, **({"torchvision": load_torchvision} if arguments.peers else {})}
    figures = measure_image(loaders, NUM_OBJECTS, SIZE_HW)
    print_table(_TITLE, figures)
    return figures


def dense_parts(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The same as parts of a section."""
    cells = {
        name: {column.replace("_", " "): f"{mib:,.0f}" for column, mib in row.items()} for name, row in figures.items()
    }
    sentence = (
        f"{_TITLE}: from the file to what the mask head should see of {_NUM_SAMPLES} sampled boxes; the most that a "
        "process held, and what that is above the same process before."
    )
    return [wrapped(sentence), markdown_table(cells)]


def measure_image(
    loaders: Mapping[str, Callable[[Path, Path], Callable[[], None]]], num_objects: int, size_hw: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """MiB that each loader's process takes for one image.

    Args:
        loaders: By name, from annotation file and image folder to a function that does the work.
        num_objects: Objects in the image.
        size_hw: Its (height, width).
    """
    from swin_dense.tools.benchmark_scenes import write_scenes

    figures = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = write_scenes(folder, 1, num_objects, size_hw=size_hw)
        for loader_name, load in loaders.items():
            answer = folder / "figures.json"
            process = multiprocessing.get_context("spawn").Process(target=_measure, args=(load, files, answer))
            process.start()
            process.join()
            if process.exitcode:
                raise ConfigError(f"--dense: {loader_name} ended with code {process.exitcode}; is memory short?")
            figures[loader_name] = json.loads(answer.read_text())
    return figures


def _measure(load: Callable[[Path, Path], Callable[[], None]], files: tuple[Path, Path], answer: Path) -> None:
    import torch

    torch.set_num_threads(1)
    work = load(*files)
    start = _status_bytes("VmRSS")
    work()
    peak = _status_bytes("VmHWM")
    answer.write_text(json.dumps({"peak": peak / _MIB, "above_start": (peak - start) / _MIB}))


def load_ours(annotation_file: Path, image_folder: Path) -> Callable[[], None]:
    """This library: masks stay in their boxes."""
    from swin_dense.datasets.coco import CocoDataset
    from swin_dense.datasets.transforms import instance_training
    from swin_dense.heads.mask_targets import mask_targets
    from swin_dense.heads.targets import training_target

    dataset = CocoDataset(annotation_file, image_folder, instance_training([SIZE_HW[0]], SIZE_HW[1], 1.0))

    def work() -> None:
        sample = dataset[0, 0]
        target = training_target(sample.target, sample.image.float() / 255, 32)  # type: ignore[arg-type]
        matched = _matched(len(target["boxes"]))
        assert mask_targets(target["masks"], target["boxes"][matched], matched, _MASK_SIZE).any()

    return work


def load_torchvision(annotation_file: Path, image_folder: Path) -> Callable[[], None]:
    """Torchvision's data set, transforms v2, and what its Mask R-CNN makes of them."""
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.models.detection.roi_heads import project_masks_on_boxes
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms import v2

    with redirect_stdout(io.StringIO()):  # pycocotools tells how it gets on
        peer = CocoDetection(
            image_folder, str(annotation_file), transforms=v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(1.0)])
        )
    dataset: Any = wrap_dataset_for_transforms_v2(peer, target_keys=("boxes", "labels", "masks"))
    resize = GeneralizedRCNNTransform(SIZE_HW[0], SIZE_HW[1], [0.5] * 3, [0.5] * 3)

    def work() -> None:
        image, target = dataset[0]
        _, targets = resize([image.float() / 255], [target])
        boxes, masks = targets[0]["boxes"], targets[0]["masks"]
        matched = _matched(len(boxes))
        assert project_masks_on_boxes(masks, boxes[matched], matched, _MASK_SIZE).any()

    return work


def _matched(num_objects: int) -> Any:  # noqa: ANN401 - a tensor, without torch at the top
    import torch

    return torch.arange(_NUM_SAMPLES) % num_objects


def _status_bytes(name: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most that it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
