import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.label_folders import NO_CLASS, LabelFolders, label_map_of_values
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_evaluation import ConfusionMatrix
from swin_dense.errors import DataError, ImageError

LABELS = LabelMap(("road", "tree", "car"), (1, 2, 7), ignored_values=(0,))
VALUES = np.array([0, 1, 2, 7], np.uint8)


def write(folder, pictures):
    folder.mkdir(exist_ok=True)
    for name, values in pictures.items():
        Image.fromarray(np.asarray(values, np.uint8)).save(folder / f"{name}.png")
    return folder


def random_pictures(seed):
    generator = np.random.default_rng(seed)
    return {f"scene_{n}": generator.choice(VALUES, (11 + n, 17 - n)) for n in range(3)}


def scores_of(folders):
    confusion = ConfusionMatrix(folders.label_map)
    for index in range(len(folders)):
        confusion.add(*folders.pair(index))
    return confusion.compute()


def test_pairs_are_class_indices_by_name(tmp_path):
    truth, found = random_pictures(0), random_pictures(1)
    folders = LabelFolders(write(tmp_path / "p", found), write(tmp_path / "a", truth), LABELS)
    assert folders.names == ("scene_0", "scene_1", "scene_2") and len(folders) == 3
    table = np.full(256, 255)
    table[[1, 2, 7]] = 0, 1, 2
    for index, name in enumerate(folders.names):
        prediction, label = folders.pair(index)
        assert np.array_equal(label, table[truth[name]])
        assert np.array_equal(prediction, np.where(found[name] == 0, 3, table[found[name]]))


def test_annotations_as_predictions_are_perfect(tmp_path):
    folder = write(tmp_path / "a", random_pictures(0))
    scores = scores_of(LabelFolders(folder, folder, LABELS))
    assert scores["mIoU"] == scores["aAcc"] == 1.0 and scores["absent"] == [NO_CLASS]


def test_a_pixel_without_prediction_costs_its_class_and_nothing_else(tmp_path):
    label = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    found = np.array([[1, 1, 1, 0, 2, 2, 0, 1]])
    folders = LabelFolders(write(tmp_path / "p", {"a": found}), write(tmp_path / "a", {"a": label}), LABELS)
    scores = scores_of(folders)
    assert scores["per_class"]["road"]["IoU"] == 0.75 and scores["per_class"]["tree"]["IoU"] == 1.0
    assert scores["mIoU"] == 0.875 and scores["aAcc"] == pytest.approx(5 / 6)


def test_values_of_the_annotations_are_classes_where_nobody_names_them(tmp_path):
    folder = write(tmp_path / "a", {"a": [[3, 255, 9]], "b": [[3, 0, 0]]})
    told = []
    label_map = label_map_of_values(folder, lambda done, total: told.append((done, total)))
    assert label_map.raw_ids == (0, 3, 9) and label_map.names == ("value 0", "value 3", "value 9")
    assert told == [(1, 2), (2, 2)]
    with pytest.raises(DataError, match="every pixel is 255"):
        label_map_of_values(write(tmp_path / "b", {"a": [[255, 255]]}))


def test_what_does_not_fit_is_named(tmp_path):
    truth = write(tmp_path / "a", {"a": [[1, 2]], "b": [[1, 2]]})
    with pytest.raises(DataError, match=r"b.png: there is no prediction of that name in .*p \(1 of 2 lack"):
        LabelFolders(write(tmp_path / "p", {"a": [[1, 2]]}), truth, LABELS)
    with pytest.raises(DataError, match=r"c.png: there is no annotation of that name"):
        LabelFolders(write(tmp_path / "q", {"a": [[1, 2]], "b": [[1, 2]], "c": [[1, 1]]}), truth, LABELS)
    larger = LabelFolders(write(tmp_path / "r", {"a": [[1, 2, 1]], "b": [[5, 2]]}), truth, LABELS)
    with pytest.raises(ImageError, match=r"a.png: the prediction is 1 x 3 pixels .* its annotation 1 x 2"):
        larger.pair(0)
    with pytest.raises(DataError, match=r"r/b.png: .* does not know the value 5 \(1 px\)"):
        larger.pair(1)
