"""Time that one process needs for an image with its objects, beside torchvision's transforms v2 with full-frame masks.

Both decode with Pillow, scale the short edge to 800 (long edge at most 1333) without antialiasing, mirror, and give
uint8 images, boxes and masks. A ratio is given only where the results agree:

- the same image size; torchvision is told the size, as it rounds down where the published models round to nearest,
- every one of our boxes within 1e-3 pixel of one of torchvision's, after clipping to the image; boxes under one pixel
  and objects without a mask pixel are left out here and counted,
- masks of at least 32² pixels with an IoU of 0.9 or more. They cannot be equal: torchvision draws the polygons in the
  file's picture and scales the masks, here the scaled polygons are drawn. In smaller masks the rim is too large a part.

What one process loads is what a worker of a loader does; so many of them are needed as a model's rate is a multiple.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from swin_dense.errors import DataError
from swin_dense.tools.benchmark import spread
from swin_dense.tools.benchmark_contest import OURS
from swin_dense.tools.benchmark_page import read_sections
from swin_dense.tools.benchmark_rates import needed_workers, training_rates
from swin_dense.tools.benchmark_tables import IMAGES_PER_S
from swin_dense.tools.markdown_page import markdown_list, markdown_table, wrapped

if TYPE_CHECKING:
    from torch import Tensor

    from swin_dense.datasets.coco import CocoDataset

_SHORT_EDGE, _MAX_LONG_EDGE = 800, 1333
_OBJECTS_EACH = 20
_BOX_TOLERANCE_PX = 1e-3
_LEAST_IOU = 0.9
_LEAST_AREA_PX = 32**2
_WORKERS_TITLE = "Workers that our models keep busy in training, each on a core like these"

Loaded = tuple["Tensor", "Tensor", "Tensor"]
"""(3, H, W) uint8 image, (N, 4) boxes xyxy in pixels, (N, H, W) uint8 masks."""


@dataclass(frozen=True)
class Agreement:
    """How well two loaders agree on some images.

    Attributes:
        objects: How many objects were compared.
        left_out: Objects that only the peer gives.
        worst_box_px: Largest difference of a box side.
        worst_iou: Least IoU of two masks of at least 32² pixels; 1 where there is none.
        sizes_equal: Whether every image has the same size.
    """

    objects: int
    left_out: int
    worst_box_px: float
    worst_iou: float
    sizes_equal: bool

    @property
    def holds(self) -> bool:
        """Whether both did the same work."""
        return self.sizes_equal and self.worst_box_px <= _BOX_TOLERANCE_PX and self.worst_iou >= _LEAST_IOU


def measure_loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns every figure."""
    from swin_dense.tools.benchmark_scenes import write_scenes

    with TemporaryDirectory() as folder:
        if arguments.annotations is None:
            files = write_scenes(Path(folder), arguments.pictures, _OBJECTS_EACH)
        else:
            files = arguments.annotations, arguments.images
        figures = _measure_files(*files, arguments)
    worker_images_per_s = 1000 / figures["ms_per_image"][OURS]["median"]
    figures |= {
        "worker_images_per_s": worker_images_per_s,
        "cores": os.cpu_count() or 1,
        "needed_workers": needed_workers(_rates(arguments), worker_images_per_s),
    }
    _print_figures(figures)
    return figures


def _rates(arguments: argparse.Namespace) -> dict[str, float]:
    """Images a second for which workers are counted: of the page that is written to, and what was asked for."""
    rates = {} if arguments.document is None else training_rates(read_sections(arguments.document))
    if arguments.images_per_second is not None:
        rates["asked for"] = arguments.images_per_second
    return rates


def _measure_files(annotation_file: Path, image_folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from swin_dense.datasets.coco import CocoDataset
    from swin_dense.datasets.transforms import instance_training

    transform = instance_training([_SHORT_EDGE], _MAX_LONG_EDGE, flip_probability=1.0)
    dataset = CocoDataset(annotation_file, image_folder, transform, skip_empty=True)
    step = max(1, len(dataset) // arguments.pictures)
    indices = range(0, len(dataset), step)[: arguments.pictures]
    loaders: dict[str, Callable[[int], object]] = {OURS: dataset.__getitem__}
    figures: dict[str, Any] = {"pictures": len(indices), "repeats": arguments.repeats}
    if arguments.peers:
        peer = TorchvisionLoader(annotation_file, image_folder, dataset)
        agreement = compare((_ours(dataset, index), peer.loaded(index)) for index in indices)
        figures["agreement"] = {**vars(agreement), "holds": agreement.holds}
        loaders["torchvision"] = peer
    with one_thread():
        times_ms = time_loaders(loaders, indices, arguments.repeats)
    figures["ms_per_image"] = {name: spread(values) for name, values in times_ms.items()}
    if arguments.peers and figures["agreement"]["holds"]:
        ratios = [theirs / own for own, theirs in zip(*times_ms.values(), strict=True)]
        figures["ratio"] = spread(ratios)
    return figures


class TorchvisionLoader:
    """torchvision's CocoDetection, wrapped for transforms v2, resized and mirrored as ours.

    Args:
        annotation_file: COCO JSON.
        image_folder: Folder of its images.
        dataset: Ours, whose images and sizes are taken.
    """

    def __init__(self, annotation_file: Path, image_folder: Path, dataset: CocoDataset) -> None:
        from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

        with redirect_stdout(io.StringIO()):  # pycocotools tells how it gets on
            peer = CocoDetection(image_folder, str(annotation_file), transforms=self._transform)
        self._row_of_id = {image_id: row for row, image_id in enumerate(peer.ids)}
        self._peer: Any = wrap_dataset_for_transforms_v2(peer, target_keys=("boxes", "labels", "masks"))
        self._dataset = dataset

    def __call__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Load an image of our data set."""
        return self._peer[self._row_of_id[self._dataset.image_ids[index]]]

    def loaded(self, index: int) -> Loaded:
        """The same in the form that is compared."""
        image, target = self(index)
        return image, target["boxes"], target["masks"]

    def _transform(self, image: Any, target: Any) -> tuple[Any, Any]:  # noqa: ANN401 - torchvision's are untyped
        from torchvision.transforms import v2

        from swin_dense.datasets.geometry import keep_ratio_size_hw

        size_hw = keep_ratio_size_hw((image.height, image.width), (_SHORT_EDGE, _MAX_LONG_EDGE))
        resize = v2.Resize(size_hw, antialias=False)
        return v2.Compose([v2.ToImage(), resize, v2.RandomHorizontalFlip(1.0)])(image, target)


def _ours(dataset: CocoDataset, index: int) -> Loaded:
    sample = dataset[index]
    masks: Any = sample.target["masks"]
    boxes: Any = sample.target["boxes"]
    return sample.image, boxes, masks.full()


def compare(pairs: Iterable[tuple[Loaded, Loaded]]) -> Agreement:
    """Compare what two loaders, ours and another, made of the same images.

    Raises:
        DataError: The peer has no object in an image.
    """
    import torch

    worst_box_px, worst_iou, objects, left_out = 0.0, 1.0, 0, 0
    for own, other in pairs:
        if own[0].shape != other[0].shape:
            return Agreement(0, 0, float("inf"), 0.0, sizes_equal=False)
        height, width = own[0].shape[1:]
        if not len(other[1]):
            raise DataError("benchmark: torchvision has no object in an image that has some here.")
        limits = torch.tensor([width, height, width, height])
        clipped = torch.as_tensor(other[1]).clamp(min=0).minimum(limits)
        differences_px = (own[1][:, None] - clipped[None]).abs().amax(dim=2)
        nearest_px, rows = differences_px.min(dim=1)
        worst_box_px = max([worst_box_px, *nearest_px.tolist()])
        worst_iou = min([worst_iou, *_ious(own[2].bool(), torch.as_tensor(other[2]).bool()[rows])])
        objects += len(own[1])
        left_out += len(other[1]) - len(own[1])
    return Agreement(objects, left_out, worst_box_px, worst_iou, sizes_equal=True)


def _ious(masks: Tensor, others: Tensor) -> list[float]:
    unions = (masks | others).flatten(1).sum(dim=1)
    overlaps = (masks & others).flatten(1).sum(dim=1)
    large = unions >= _LEAST_AREA_PX
    return (overlaps[large] / unions[large]).tolist()


def time_loaders(
    loaders: dict[str, Callable[[int], object]], indices: Sequence[int], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds an image in each repetition; image by image in turn, so that a busy machine slows all alike."""
    from swin_dense.tools.progress_bar import progress_bar

    times_ms: dict[str, list[float]] = {name: [] for name in loaders}
    with progress_bar("measuring") as show:
        for repeat in range(repeats + 1):  # the first one warms up
            show(repeat, repeats + 1)
            sums_s = dict.fromkeys(loaders, 0.0)
            for number, index in enumerate(indices):
                for name in list(loaders)[:: 1 if (number + repeat) % 2 else -1]:
                    started_s = time.perf_counter()
                    loaders[name](index)
                    sums_s[name] += time.perf_counter() - started_s
            if repeat:
                for name, seconds in sums_s.items():
                    times_ms[name].append(1000 * seconds / len(indices))
        show(repeats + 1, repeats + 1)
    return times_ms


@contextmanager
def one_thread() -> Iterator[None]:
    """What a worker of a loader has."""
    import cv2
    import torch

    before, before_cv2 = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cv2.setNumThreads(before_cv2)


def loading_parts(figures: Mapping[str, Any]) -> list[str]:
    """The same as parts of a section."""
    parts = [
        wrapped(
            "The time to load an image with its objects, as detectors are trained on it: decoded, its short edge "
            f"scaled to {_SHORT_EDGE} pixels (its long one to at most {_MAX_LONG_EDGE}), mirrored, with boxes and "
            f"masks. In one thread, as a worker of a loader has it; {figures['pictures']} images, "
            f"{figures['repeats']} repetitions; medians and their range."
        ),
        markdown_table(_loading_rows(figures)),
        markdown_list(_sentences(figures)),
    ]
    if figures["needed_workers"]:
        parts += [f"{_WORKERS_TITLE}:", markdown_table(_worker_rows(figures))]
    return parts


def _print_figures(figures: Mapping[str, Any]) -> None:
    from swin_dense.tools.tables import print_sentences, print_table

    title = f"an image, one thread, {figures['pictures']} images, {figures['repeats']} repetitions"
    print_table(title, _loading_rows(figures))
    print_sentences(_sentences(figures))
    if figures["needed_workers"]:
        print_table(_WORKERS_TITLE, _worker_rows(figures))


def _loading_rows(figures: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {
        name: {
            "ms": f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})",
            "images/s and worker": f"{1000 / values['median']:.1f}",
        }
        for name, values in figures["ms_per_image"].items()
    }


def _worker_rows(figures: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {
        name: {IMAGES_PER_S: f"{each['images_per_s']:,.2f}", "workers": str(each["workers"])}
        for name, each in figures["needed_workers"].items()
    }


def _sentences(figures: Mapping[str, Any]) -> list[str]:
    rate, cores = figures["worker_images_per_s"], figures["cores"]
    workers = (
        f"One worker loads {rate:.1f} images a second; where each has a core of its own, the {cores} of this machine "
        f"load {cores * rate:.1f}."
    )
    agreement = figures.get("agreement")
    if agreement is None:
        return [workers]
    found = (
        f"sizes {'equal' if agreement['sizes_equal'] else 'differ'}, "
        f"boxes differ by at most {agreement['worst_box_px']:.2g} px (allowed {_BOX_TOLERANCE_PX}), "
        f"least mask IoU {agreement['worst_iou']:.3f} (allowed {_LEAST_IOU}), "
        f"{agreement['objects']} objects, {agreement['left_out']} more in torchvision's"
    )
    if not agreement["holds"]:
        return [f"No ratio, as the results differ: {found}.", workers]
    ratio = figures["ratio"]
    times = f"{ratio['median']:.2f} times as long ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return [f"torchvision needs {times}.", f"Results agree: {found}.", workers]
