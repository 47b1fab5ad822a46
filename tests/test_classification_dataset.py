import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.classification_dataset import (
    ClassificationDataset,
    ClassifiedImages,
    MemoryImage,
    find_class_folders,
    read_class_folders,
    read_source,
)
from swin_dense.datasets.classification_transforms import classification_training
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError, ImageError

TRAINING = classification_training((24, 31), photometric=True)
COUNTS = {"b": 2, "a": 3, "C": 1}


@pytest.fixture
def folder(tmp_path):
    """Three classes of noise, written in no order, with a hidden folder and a file that is no picture."""
    root = tmp_path / "pictures"
    for seed, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for number in reversed(range(count)):
            pixels = np.random.default_rng([seed, number]).integers(0, 256, (37 + number, 41, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.{'PNG' if number else 'bmp'}")
    (root / ".cache").mkdir()
    (root / "a" / "notes.txt").touch()
    (root / "readme.md").touch()
    return root


def load(dataset, num_workers):
    batches = TrainingBatches(len(dataset), 2, seed=5, num_batches=6)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    return [(sample.name, sample.label, sample.image.numpy().tobytes()) for batch in loader for sample in batch]


def test_classes_are_the_folders_by_name_and_pictures_theirs_in_order(folder):
    images = read_class_folders(folder)
    assert images.label_map == LabelMap(("C", "a", "b"), (0, 1, 2))
    assert images.labels.tolist() == [0, 1, 1, 1, 2, 2]
    wanted = ["C/0.bmp", "a/0.bmp", "a/1.PNG", "a/2.PNG", "b/0.bmp", "b/1.PNG"]
    assert [str(path.relative_to(folder)) for path in images.sources] == wanted
    assert list(images.sources[1:4:2]) == [folder / "a" / "0.bmp", folder / "a" / "2.PNG"]
    assert [ClassificationDataset(images).name(index) for index in range(6)] == wanted


def test_samples_have_the_stated_types_and_sizes(folder):
    sample = ClassificationDataset(read_class_folders(folder))[2]
    assert sample.image.shape == (3, 38, 41) and sample.image.dtype == torch.uint8
    assert (sample.label, sample.index, sample.name) == (1, 2, "a/1.PNG")
    with Image.open(folder / "a" / "1.PNG") as image:
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), np.asarray(image))


def test_pictures_in_memory_and_in_files_give_the_same_samples(folder):
    files = read_class_folders(folder)
    memory = [MemoryImage(path.stem, read_source(path)) for path in files.sources]
    before = [picture.pixels.copy() for picture in memory]
    one = ClassificationDataset(files, TRAINING, seed=3)
    other = ClassificationDataset(ClassifiedImages(memory, files.labels, files.label_map), TRAINING, seed=3)
    for index in range(6):
        assert torch.equal(one[4, index].image, other[4, index].image)
    assert other.name(5) == "1"
    assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(memory, before, strict=True))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_samples_are_the_same_for_any_number_of_workers(folder, num_workers):
    dataset = ClassificationDataset(read_class_folders(folder), TRAINING)
    alone = load(dataset, 0)
    assert alone == load(dataset, num_workers)
    assert len({image for _, _, image in alone}) == len(alone)


def test_seeds_differ_and_dataset_can_be_pickled(folder):
    images = read_class_folders(folder)
    first = pickle.loads(pickle.dumps(ClassificationDataset(images, TRAINING, seed=1)))
    assert not torch.equal(first[0].image, ClassificationDataset(images, TRAINING, seed=2)[0].image)
    assert first.sources[3] == images.sources[3]


def test_damaged_picture_and_wrong_index_are_refused(folder):
    (folder / "a" / "1.PNG").write_bytes(b"no picture")
    dataset = ClassificationDataset(read_class_folders(folder))
    with pytest.raises(ImageError, match=r"a/1\.PNG: not a picture that can be read"):
        dataset[2]
    with pytest.raises(IndexError, match=r"index 6 is not in 0\.\.5"):
        dataset[6]
    with pytest.raises(IndexError):
        dataset[-1]


def spoil(folder, kind):
    if kind == "empty class":
        (folder / "empty").mkdir()
        (folder / "empty" / "x.txt").touch()
    elif kind == "nested":
        (folder / "a" / "more").mkdir()
    elif kind == "stray":
        (folder / "b" / "1.PNG").rename(folder / "1.PNG")
    elif kind == "one class":
        for name in ("a", "b"):
            for path in (folder / name).iterdir():
                path.unlink()
            (folder / name).rmdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty class", r"empty: the class 'empty' has no pictures \(.*\)\. Got: x\.txt\."),
        ("nested", r"a/more: a folder inside the class 'a'"),
        ("stray", r"every picture in one of them, got the picture 1\.PNG"),
        ("one class", r"wanted two or more folders, one for each class, .*got \.cache, C, readme\.md"),
    ],
)
def test_folders_of_another_kind_are_refused_by_name(folder, kind, message):
    spoil(folder, kind)
    with pytest.raises(DataError, match=message):
        read_class_folders(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none: wanted a folder with one folder of pictures for each class"):
        read_class_folders(tmp_path / "none")


def test_splits_are_found_and_a_folder_without_them_serves_both(folder, tmp_path):
    assert find_class_folders(folder, "train") == find_class_folders(folder, "val") == folder
    root = tmp_path / "splits"
    (root / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"split 'val' not found\. .* in val2017 or val or validation\. Got: train\."):
        find_class_folders(root, "val")
    (root / "val" / "a").mkdir(parents=True)
    assert find_class_folders(root, "train") == root / "train" and find_class_folders(root, "val") == root / "val"
    # Folders of pictures that are called like splits are classes.
    (folder / "train").mkdir()
    (folder / "train" / "x.png").touch()
    assert find_class_folders(folder, "train") == folder
