import json
import pickle

import numpy as np
import pytest

from swin_dense.datasets.labels import LabelMap, require_same_labels
from swin_dense.errors import ConfigError, DataError

LABELS = LabelMap(("dog", "cat", "cup"), (1, 17, 90), ignored_values=(0,))


def test_label_map_round_trips_through_json_and_pickle():
    assert LabelMap.from_dict(json.loads(json.dumps(LABELS.to_dict()))) == LABELS
    assert pickle.loads(pickle.dumps(LABELS)) == LABELS


def test_index_of_is_the_inverse_of_raw_ids():
    assert [LABELS.index_of(raw_id) for raw_id in LABELS.raw_ids] == [0, 1, 2]
    with pytest.raises(DataError, match="no class has the id 2; known ids are 1, 17, 90"):
        LABELS.index_of(2)


def test_value_table_maps_classes_ignored_and_unknown_values():
    table = LABELS.value_table()
    assert table.shape == (65536,) and table.dtype == np.int16
    assert table[[1, 17, 90, 0, 255, 2, 65535]].tolist() == [0, 1, 2, 255, 255, -1, -1]


def test_value_table_takes_255_as_a_class_when_it_is_one():
    assert LabelMap(("road",), (255,)).value_table()[255] == 0


@pytest.mark.parametrize(
    ("names", "raw_ids", "ignored", "message"),
    [
        ((), (), (), "has no class"),
        (("a",), (1, 2), (), "got 1 names and 2 ids"),
        (("a", "a"), (1, 2), (), "name 'a' stands for two classes"),
        (("a", "b"), (1, 1), (), "raw id 1 stands for two classes"),
        (("a", " "), (1, 2), (), "class 1 has the name ' '"),
        (("a",), ("1",), (), "raw_ids must hold integers, got '1'"),
        (("a",), (1,), (1,), "value 1 is both a class and an ignored value"),
    ],
)
def test_label_map_refuses_contradictions(names, raw_ids, ignored, message):
    with pytest.raises(ConfigError, match=message):
        LabelMap(names, raw_ids, ignored)


def test_value_table_refuses_what_no_label_picture_holds():
    with pytest.raises(ConfigError, match="from 0 to 65535, got 70000"):
        LabelMap(("a",), (70000,)).value_table()
    many = tuple(range(256))
    with pytest.raises(ConfigError, match="can hold 255 classes beside the ignored one, got 256"):
        LabelMap(tuple(map(str, many)), many).value_table()


def test_require_same_labels_shows_both_lists():
    require_same_labels(LABELS, LabelMap(LABELS.names, LABELS.raw_ids), "val.json")
    with pytest.raises(DataError, match=r"val\.json: .*1 dog, 17 cat, 90 cup; got 2: 1 cat, 17 dog"):
        require_same_labels(LABELS, LabelMap(("cat", "dog"), (1, 17)), "val.json")


def test_from_dict_refuses_unknown_keys():
    with pytest.raises(ConfigError, match="wanted the keys names, raw_ids"):
        LabelMap.from_dict({"names": ["a"], "ids": [1]})
