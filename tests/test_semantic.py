import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic import SemanticDataset
from swin_dense.datasets.semantic_transforms import semantic_training
from swin_dense.errors import DataError, ImageError

LABELS = LabelMap(("road", "tree", "car", "sky"), (1, 2, 3, 4), ignored_values=(0,))
TRAINING = semantic_training((90, 60), crop_size_hw=(48, 64))


def dataset_of(tree, transform=None, labels=LABELS, **options):
    return SemanticDataset(tree.image_folder, tree.label_folder, labels, transform, **options)


def load(dataset, num_workers):
    batches = TrainingBatches(len(dataset), 2, seed=5, num_batches=6)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    return [(sample.name, sample.image.numpy().tobytes(), sample.label.numpy().tobytes()) for sample in samples]


def test_samples_have_the_stated_types_and_sizes(semantic_tree):
    dataset = dataset_of(semantic_tree)
    assert len(dataset) == 4 and dataset.names == ("scene_0", "scene_1", "scene_2", "scene_3")
    sample = dataset[1]
    assert sample.image.shape == (3, 59, 37) and sample.image.dtype == torch.uint8
    assert sample.label.shape == (59, 37) and sample.label.dtype == torch.uint8
    assert (sample.index, sample.name, sample.original_size_hw) == (1, "scene_1", (59, 37))


def test_values_become_class_indices(semantic_tree):
    values = np.asarray(Image.open(semantic_tree.label_folder / "scene_0.png"))
    _, label = dataset_of(semantic_tree).raw(0)
    assert np.array_equal(label, np.where(values == 0, 255, values - 1))


def test_training_labels_hold_no_new_class(semantic_tree):
    dataset = dataset_of(semantic_tree, TRAINING)
    for epoch in range(5):
        sample = dataset[epoch, 2]
        assert sample.label.shape == (48, 64) and sample.original_size_hw == (47, 53)
        assert set(sample.label.unique().tolist()) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_samples_are_the_same_for_any_number_of_workers(semantic_tree, num_workers):
    dataset = dataset_of(semantic_tree, TRAINING)
    alone = load(dataset, 0)
    assert alone == load(dataset, num_workers)
    assert len({image for _, image, _ in alone}) == len(alone)


def test_seeds_differ_and_dataset_can_be_pickled(semantic_tree):
    first = pickle.loads(pickle.dumps(dataset_of(semantic_tree, TRAINING, seed=1)))
    second = dataset_of(semantic_tree, TRAINING, seed=2)
    assert not torch.equal(first[0].image, second[0].image)
    assert torch.equal(first[0].image, pickle.loads(pickle.dumps(first[0])).image)


def test_unknown_value_is_named_with_its_pixel_count(semantic_tree):
    path = semantic_tree.label_folder / "scene_2.png"
    values = np.full((47, 53), 1, np.uint16)
    values[0, :7], values[1, 0] = 300, 9
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=r"scene_2\.png: .* does not know the value 9 \(1 px\), 300 \(7 px\)"):
        dataset_of(semantic_tree)[2]


@pytest.mark.parametrize("value", [-1, -(2**31), 65536, 2**31 - 1])
def test_values_outside_16_bits_are_unknown_where_both_ends_are_classes(semantic_tree, value):
    labels = LabelMap(("low", "high"), (0, 65535))
    values = np.random.default_rng(0).choice(np.array([0, 65535, 255], np.int32), (47, 53))
    (semantic_tree.label_folder / "scene_2.png").unlink()
    path = semantic_tree.label_folder / "scene_2.tif"
    Image.fromarray(values).save(path)
    dataset = dataset_of(semantic_tree, labels=labels)
    assert np.array_equal(dataset.label(2), np.where(values == 65535, 1, values))
    assert dataset.paths(2) == (semantic_tree.image_folder / "scene_2.png", path)
    values[3, 4] = value
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=rf"scene_2\.tif: .* does not know the value {value} \(1 px\)"):
        dataset.label(2)


def test_paths_are_those_of_the_files_whatever_their_endings(semantic_tree):
    (semantic_tree.image_folder / "scene_1.png").rename(semantic_tree.image_folder / "scene_1.a \u20ac.JPG")
    (semantic_tree.label_folder / "scene_1.png").rename(semantic_tree.label_folder / "scene_1.a \u20ac.bmp")
    dataset = dataset_of(semantic_tree)
    images, labels = zip(*map(dataset.paths, range(4)), strict=True)
    assert sorted(images) == sorted(semantic_tree.image_folder.iterdir())
    assert sorted(labels) == sorted(semantic_tree.label_folder.iterdir())
    assert tuple(path.stem for path in images) == tuple(path.stem for path in labels) == dataset.names


def test_unequal_sizes_are_refused(semantic_tree):
    Image.fromarray(np.ones((48, 53), np.uint8)).save(semantic_tree.label_folder / "scene_2.png")
    with pytest.raises(ImageError, match=r"scene_2\.png: the annotations say .* 48 x 53, the picture is 47 x 53"):
        dataset_of(semantic_tree)[2]


def test_missing_partners_are_named(semantic_tree):
    (semantic_tree.label_folder / "scene_1.png").rename(semantic_tree.label_folder / "other.png")
    with pytest.raises(DataError, match=r"scene_1\.png: there is no label picture of that name .* \(1 of 4"):
        dataset_of(semantic_tree)
    (semantic_tree.image_folder / "scene_1.png").unlink()
    with pytest.raises(DataError, match=r"other\.png: there is no image of that name"):
        dataset_of(semantic_tree)


def test_empty_folder_and_repeated_stem_are_refused(semantic_tree, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"found none\. Got: an empty folder"):
        SemanticDataset(tmp_path / "empty", semantic_tree.label_folder, LABELS)
    (semantic_tree.image_folder / "scene_1.jpg").touch()
    with pytest.raises(DataError, match=r"scene_1\.jpg and scene_1\.png have the same name"):
        dataset_of(semantic_tree)


def test_missing_folder_and_wrong_index_are_refused(semantic_tree, tmp_path):
    with pytest.raises(DataError, match="wanted a folder of images; there is none"):
        SemanticDataset(tmp_path / "none", semantic_tree.label_folder, LABELS)
    with pytest.raises(IndexError, match=r"index 4 is not in 0\.\.3"):
        dataset_of(semantic_tree)[4]


def test_paths_give_image_and_label(semantic_tree):
    names = [path.parent for path in dataset_of(semantic_tree).paths(0)]
    assert names == [semantic_tree.image_folder, semantic_tree.label_folder]
