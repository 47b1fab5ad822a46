"""Tiny data sets, written where a test may write: real files of every kind that the loaders read."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COCO_SIZES_HW = ((41, 67), (59, 37), (47, 53), (31, 61))


@dataclass
class CocoTree:
    """A COCO data set on disk, whose content a test may change and write again."""

    annotation_file: Path
    image_folder: Path
    content: dict[str, Any]

    def write(self) -> None:
        self.annotation_file.write_text(json.dumps(self.content))


@dataclass
class SemanticTree:
    """Images and label pictures in ADE20K's folders; the values are 0 to 4."""

    root: Path
    image_folder: Path
    label_folder: Path


def noise_image(size_hw: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


@pytest.fixture
def coco_tree(tmp_path: Path) -> CocoTree:
    folder = tmp_path / "val2017"
    folder.mkdir()
    images = []
    for number, (height, width) in enumerate(COCO_SIZES_HW):
        name = f"picture_{number}.png"
        Image.fromarray(noise_image((height, width), number)).save(folder / name)
        images.append({"id": 10 * number + 3, "file_name": name, "height": height, "width": width})
    tree = CocoTree(
        tmp_path / "annotations" / "instances_val2017.json",
        folder,
        {"images": images, "annotations": _annotations(), "categories": _categories()},
    )
    tree.annotation_file.parent.mkdir()
    tree.write()
    return tree


def _categories() -> list[dict[str, Any]]:
    # Ids with gaps and out of order: the loader sorts them.
    return [{"id": 90, "name": "cup"}, {"id": 1, "name": "dog"}, {"id": 17, "name": "cat"}]


def _annotations() -> list[dict[str, Any]]:
    """Image 3: two polygons and a crowd; 13: text run lengths, two-part polygon; 23: a crowd only; 33: nothing."""
    from pycocotools import mask as coco_mask

    crowd = np.zeros((41, 67), np.uint8, order="F")
    crowd[30:40, 40:60] = 1
    block = np.zeros((59, 37), np.uint8, order="F")
    block[7:18, 5:29] = 1
    text = {"size": [59, 37], "counts": coco_mask.encode(block)["counts"].decode()}
    two_parts = [[3.0, 30.0, 10.0, 30.0, 10.0, 43.0], [15.0, 31.0, 23.0, 31.0, 19.0, 40.0]]
    whole = {"size": [47, 53], "counts": [0, 47 * 53]}
    return [
        _entry(11, 3, 17, [4.0, 6.0, 20.0, 9.0], [[4.0, 6.0, 24.0, 6.0, 24.0, 15.0, 4.0, 15.0]]),
        _entry(12, 3, 90, [30.0, 2.0, 11.0, 13.0], [[30.0, 2.0, 41.0, 2.0, 41.0, 15.0, 30.0, 15.0]]),
        _entry(15, 3, 1, [40.0, 30.0, 20.0, 10.0], {"size": [41, 67], "counts": _runs(crowd)}, iscrowd=1),
        _entry(13, 13, 1, [5.0, 7.0, 24.0, 11.0], text),
        _entry(14, 13, 90, [3.0, 30.0, 20.0, 13.0], two_parts),
        _entry(16, 23, 17, [0.0, 0.0, 53.0, 47.0], whole, iscrowd=1),
    ]


def _entry(
    annotation_id: int, image_id: int, category_id: int, bbox: list[float], segmentation: object, iscrowd: int = 0
) -> dict[str, Any]:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "segmentation": segmentation,
        "area": bbox[2] * bbox[3],
        "iscrowd": iscrowd,
    }


def _runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.ravel(order="F"), [1 - mask.ravel(order="F")[-1]]])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes])).tolist()


@pytest.fixture
def semantic_tree(tmp_path: Path) -> SemanticTree:
    folders = [tmp_path / "ade" / kind / "training" for kind in ("images", "annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, size_hw in enumerate(COCO_SIZES_HW):
        values = np.random.default_rng(number).integers(0, 5, (5, 5), dtype=np.uint8)
        label = Image.fromarray(values).resize(size_hw[::-1], Image.Resampling.NEAREST)
        Image.fromarray(noise_image(size_hw, number)).save(folders[0] / f"scene_{number}.png")
        label.save(folders[1] / f"scene_{number}.png")
    return SemanticTree(tmp_path / "ade", *folders)


@pytest.fixture
def make_instances() -> Callable[..., Any]:
    from swin_dense.datasets.instances import Instances
    from swin_dense.datasets.outlines import Frame, Outline

    def make(size_hw: tuple[int, int], seed: int, count: int = 5) -> Instances:
        """Filled rectangles, polygons and run lengths in turn: the box of each is exactly the box of its mask.

        Label and id tell an object's row.
        """
        generator = np.random.default_rng(seed)
        height, width = size_hw
        boxes, outlines = np.zeros((count, 4), np.float32), []
        for row in range(count):
            x1, y1 = int(generator.integers(width - 3)), int(generator.integers(height - 3))
            x2, y2 = int(generator.integers(x1 + 3, width + 1)), int(generator.integers(y1 + 3, height + 1))
            boxes[row] = x1, y1, x2, y2
            mask = np.zeros(size_hw, np.uint8)
            mask[y1:y2, x1:x2] = 1
            polygon = np.array([x1, y1, x2, y1, x2, y2, x1, y2], np.float64)
            outlines.append(Outline((polygon,)) if row % 2 else Outline(runs=np.array(_runs(mask), np.uint32)))
        rows = np.arange(count)
        ids = (rows + 100).astype(np.int64)
        return Instances(boxes, rows.astype(np.int64), outlines, rows % 2 == 1, ids, Frame.of_file(size_hw))

    return make


TINY_MODEL = ("model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]", "model.backbone.num_heads=[1,1,2,2]")
TINY_RUN = (
    "optimizer.batch_size=2",
    "schedule.decay=step",
    "schedule.warmup_steps=0",
    "schedule.steps=4",
    "run.log_every_steps=1",
    "run.checkpoint_every_steps=2",
    "run.evaluate_every_steps=2",
    "run.pictures=2",
)
TINY_TASKS = {
    "instance": (
        "model.head.fpn_channels=8",
        "model.head.box_head_channels=16",
        "model.head.mask_head_channels=8",
        "model.head.samples_per_image=16",
        "model.head.score_threshold=0.0",
        "augmentation.short_edges=[64]",
        "augmentation.max_long_edge=100",
        "inference.short_edge=64",
        "inference.max_long_edge=100",
    ),
    "semantic": (
        "model.head.channels=8",
        "model.head.auxiliary_channels=8",
        "augmentation.crop_size_hw=[64,64]",
        "augmentation.scale=[128,64]",
        "inference.scale=[128,64]",
    ),
}


@dataclass(frozen=True)
class TinyRun:
    """A finished run of four steps."""

    task: str
    folder: Path
    words: tuple[str, ...]
    """The command line without --out."""

    @property
    def last_model(self) -> Path:
        return self.folder / "last.safetensors"


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generated training and four validation pictures, in the COCO and the ADE20K layout."""
    from swin_dense.datasets.shapes import write_shapes

    root = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(root, num_training=6, num_validation=4, image_side_range=(64, 90), seed=3)
    return root


@pytest.fixture(scope="session")
def tiny_words(shapes_root: Path) -> Callable[..., list[str]]:
    def words(task: str, *changes: str) -> list[str]:
        """The command line of a training run of seconds; later changes win."""
        return [f"shapes_{task}", f"data={shapes_root}", *TINY_MODEL, *TINY_RUN, *TINY_TASKS[task], *changes]

    return words


@contextmanager
def _single_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: threads that wait for each other on a busy machine are ten times slower than one."""
    with _single_thread():
        yield


def _train_tiny(task: str, words: list[str], folder: Path) -> TinyRun:
    from swin_dense.tools.main import main

    with _single_thread():
        assert main(["train", *words, "--out", str(folder), "--device", "cpu"]) == 0
    return TinyRun(task, folder, tuple(words))


@pytest.fixture(scope="session")
def instance_run(tiny_words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return _train_tiny("instance", tiny_words("instance"), tmp_path_factory.mktemp("runs") / "instance")


@pytest.fixture(scope="session")
def semantic_run(tiny_words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return _train_tiny("semantic", tiny_words("semantic"), tmp_path_factory.mktemp("runs") / "semantic")


COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train and val of three classes, each a colour under noise: 8 and 3 pictures of unequal sizes."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 8), ("val", 3)):
        for number, (name, colour) in enumerate(COLOURS.items()):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                random = np.random.default_rng([number, index, count])
                size_hw = random.integers(17, 30, 2)
                pixels = np.array(colour) + random.normal(0, 40, (*size_hw, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def classification_words(class_folders: Path) -> Callable[..., list[str]]:
    def words(*changes: str) -> list[str]:
        """The command line of a classifier's training run of seconds; later changes win."""
        small = ["model.backbone={patch_size: 2, embed_dim: 8, depths: [1, 1], num_heads: [1, 2], window_size: 4}"]
        small += ["augmentation.crop_size_hw=[16,16]", "inference.crop_size_hw=[16,16]", "schedule.epochs=null"]
        data = [f"data={class_folders}", "dataset.format=class_folders"]
        return ["classifier_cifar10", *data, *small, *TINY_RUN, *changes]

    return words


@pytest.fixture(scope="session")
def classification_run(
    classification_words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> TinyRun:
    folder = tmp_path_factory.mktemp("runs") / "classification"
    return _train_tiny("classification", classification_words(), folder)


@pytest.fixture(params=["instance", "semantic"])
def tiny_run(request: pytest.FixtureRequest) -> TinyRun:
    """The finished run of each task in turn."""
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture
def run_python() -> Callable[..., Any]:
    import os
    import subprocess
    import sys

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Python in a process of its own, in the repository's folder, on one thread."""
        root = Path(__file__).parents[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=180, **options
        )

    return run


@pytest.fixture(scope="module", params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Where the kernels in the modules KERNELS of a test module run: interpreted on the CPU, and on a GPU if any."""
    import importlib

    import torch

    pytest.importorskip("triton")
    if request.param == "compiled":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield torch.device("cuda")
        return

    def reload() -> None:
        """Triton decides at import whether its own functions and ours are compiled or interpreted."""
        for name in ("triton.language.standard", "triton.language", *request.module.KERNELS):
            importlib.reload(importlib.import_module(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        reload()
        yield torch.device("cpu")
    reload()


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
    import math

    import torch

    def fill(module: Any, seed: int = 0) -> Any:
        """Weights far from any initialisation, running statistics too; the temperatures of Swin V2 stay near 10."""
        generator = torch.Generator().manual_seed(seed)
        tensors = dict(module.state_dict(keep_vars=True))
        for name in sorted(tensors):
            value, noise = tensors[name].data, torch.randn(tensors[name].shape, generator=generator)
            if name.endswith("num_batches_tracked"):
                value.fill_(seed + 7)
            elif name.endswith("running_var"):
                value.copy_(noise.abs() + 0.5)
            elif name.endswith("logit_scale"):
                value.copy_(math.log(10) + 0.3 * noise)
            elif name.endswith("running_mean") or isinstance(tensors[name], torch.nn.Parameter):
                is_norm = value.ndim == 1 and name.endswith("weight")
                is_table = "table" in name or "position_embeddings" in name or "absolute_pos_embed" in name
                scale = 1.0 if value.ndim < 2 or is_table else 1 / math.sqrt(value[0].numel())
                value.copy_(1 + 0.3 * noise if is_norm else scale * noise)
        return module

    return fill
