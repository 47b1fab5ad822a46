import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from swin_dense.datasets.cifar10 import read_cifar10
from swin_dense.errors import DataError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"data_batch_1": 5, "data_batch_2": 3, "test_batch": 4}


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with cifar-10-batches-py as it is distributed, but of few pictures; the checksums are theirs."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents = {"batches.meta": {"label_names": NAMES}}
    for seed, (name, count) in enumerate(BATCHES.items()):
        generator = np.random.default_rng(seed)
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": generator.integers(0, 10, count).tolist()}
    checksums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    lists = {"train_list": [name for name in BATCHES if name != "test_batch"], "test_list": ["test_batch"]}
    for attribute, names in lists.items():
        monkeypatch.setattr(CIFAR10, attribute, [[name, checksums[name]] for name in names])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": checksums["batches.meta"]})
    return folder, contents


def test_pictures_and_classes_are_those_of_the_files(cifar):
    folder, contents = cifar
    for split, names in (("train", ["data_batch_1", "data_batch_2"]), ("val", ["test_batch"])):
        images = read_cifar10(folder.parent, split)
        assert images.label_map.names == tuple(NAMES) and images.label_map.raw_ids == tuple(range(10))
        assert images.labels.tolist() == [label for name in names for label in contents[name]["labels"]]
        rows = np.concatenate([contents[name]["data"] for name in names])
        assert len(images.sources) == len(rows)
        for index, (picture, row) in enumerate(zip(images.sources, rows, strict=True)):
            assert picture.stem == f"{split}_{index:05d}"
            assert picture.pixels.shape == (32, 32, 3) and picture.pixels.dtype == np.uint8
            assert np.array_equal(picture.pixels.transpose(2, 0, 1).ravel(), row)  # red plane, green, blue


def test_the_batches_folder_itself_and_the_archive_give_the_same(cifar, tmp_path):
    folder, _ = cifar
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar-10-python.tar.gz", "w:gz") as file:
        file.add(folder, arcname=folder.name)
    wanted = read_cifar10(folder.parent, "val")
    for root in (folder, packed):
        got = read_cifar10(root, "val")
        assert got.labels.tolist() == wanted.labels.tolist()
        for one, other in zip(got.sources, wanted.sources, strict=True):
            assert np.array_equal(one.pixels, other.pixels)
    assert [path.name for path in packed.iterdir()] == ["cifar-10-python.tar.gz"]


def test_missing_files_say_where_to_get_them(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz, got holiday\.jpg\. Get .* at https://www\.cs\.tor"):
        read_cifar10(tmp_path, "train")


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_changed_or_missing_files_are_refused_before_they_are_unpacked(cifar, name):
    folder, _ = cifar
    path = folder / name
    path.write_bytes(path.read_bytes() + b"x")
    for _ in range(2):
        with pytest.raises(DataError, match=r"cifar-10-batches-py: not the files of CIFAR-10 as they are distributed"):
            read_cifar10(folder.parent, "val")
        path.unlink(missing_ok=True)


def test_damaged_archive_is_refused(tmp_path):
    for content in (b"", b"no archive", b"\x1f\x8b\x08\x00half"):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: "):
            read_cifar10(tmp_path, "train")


def test_other_splits_are_refused(tmp_path):
    with pytest.raises(DataError, match="split must be 'train' or 'val', got 'test'"):
        read_cifar10(tmp_path, "test")
