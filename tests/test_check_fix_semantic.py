import json

import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.check_fix_semantic import fix_semantic
from swin_dense.datasets.check_semantic import check_semantic, find_semantic_folders
from swin_dense.datasets.class_names import read_class_names
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError, DataError

LABELS = LabelMap(tuple("abcde"), tuple(range(5)))


def check_of(tree, label_map=LABELS):
    return check_semantic(find_semantic_folders(tree.root), label_map)


def test_copy_of_usable_data_is_links_to_it(semantic_tree, tmp_path):
    assert fix_semantic(check_of(semantic_tree), tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "changes.json").read_text()) == []
    for kind, folder in (("images", semantic_tree.image_folder), ("annotations", semantic_tree.label_folder)):
        copied = sorted((tmp_path / "out" / kind / "train").iterdir())
        assert [path.resolve() for path in copied] == sorted(path.resolve() for path in folder.iterdir())


def test_names_of_the_classes_come_along(semantic_tree, tmp_path):
    fix_semantic(check_of(semantic_tree), tmp_path / "known")
    assert read_class_names(tmp_path / "known" / "classes.txt") == LABELS.names
    fix_semantic(check_of(semantic_tree, None), tmp_path / "unknown")
    assert not (tmp_path / "unknown" / "classes.txt").exists()


def test_unknown_values_become_one_that_is_ignored(semantic_tree, tmp_path):
    # 255 is a class here, so the data's own ignored value has to do.
    labels = LabelMap(("a", "b", "c"), (0, 1, 255), (7,))
    changes = fix_semantic(check_of(semantic_tree, labels), tmp_path / "out")
    assert {change.kind for change in changes} == {"label-values"} and len(changes) == 4
    for path in semantic_tree.label_folder.iterdir():
        before = np.array(Image.open(path))
        after = np.array(Image.open(tmp_path / "out" / "annotations" / "train" / path.name))
        assert (after == np.where(before > 1, 7, before)).all()
    no_way_out = LabelMap(("a", "b", "c"), (0, 1, 255))
    with pytest.raises(DataError, match="nothing usable is left"):
        fix_semantic(check_of(semantic_tree, no_way_out), tmp_path / "none")


def test_folder_in_the_data_is_refused(semantic_tree):
    with pytest.raises(ConfigError, match="lies in the data itself"):
        fix_semantic(check_of(semantic_tree), semantic_tree.label_folder / "cleaned")


def test_data_without_anything_usable_has_no_cleaned_copy(semantic_tree, tmp_path):
    for path in semantic_tree.image_folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="training: nothing usable is left"):
        fix_semantic(check_of(semantic_tree), tmp_path / "out")
