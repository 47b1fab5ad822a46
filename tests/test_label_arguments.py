import argparse

import pytest

from swin_dense.datasets.ade20k import ADE20K_LABELS
from swin_dense.errors import ConfigError, DataError
from swin_dense.tools.label_arguments import add_label_arguments, label_map_of


def label_map(*words):
    parser = argparse.ArgumentParser()
    add_label_arguments(parser)
    return label_map_of(parser.parse_args(words))


def test_classes_come_from_a_name_a_file_or_a_number(tmp_path):
    assert label_map() is None
    assert label_map("--classes", "ade20k") == ADE20K_LABELS
    (tmp_path / "names.txt").write_text("road\ntree\n")
    named = label_map("--classes", str(tmp_path / "names.txt"), "--first-value", "3", "--ignored-values", "0", "9")
    assert (named.names, named.raw_ids, named.ignored_values) == (("road", "tree"), (3, 4), (0, 9))
    counted = label_map("--classes", "2")
    assert (counted.names, counted.raw_ids) == (("class 0", "class 1"), (0, 1))


def test_what_contradicts_itself_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="value 1 is both a class and an ignored value"):
        label_map("--classes", "3", "--ignored-values", "1")
    with pytest.raises(ConfigError, match="holds values from 0 to 65535, got -1"):
        label_map("--classes", "3", "--first-value", "-1")
    with pytest.raises(ConfigError, match="classes ade20k: the values 1 to 150 are its classes"):
        label_map("--classes", "ade20k", "--ignored-values", "7")
    with pytest.raises(DataError, match=r"no_names\.txt"):
        label_map("--classes", str(tmp_path / "no_names.txt"))
