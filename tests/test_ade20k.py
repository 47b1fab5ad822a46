import pytest

from swin_dense.datasets.ade20k import ADE20K_LABELS, ade20k_labels
from swin_dense.errors import ConfigError


def test_ade20k_has_150_classes_one_below_their_values():
    assert len(ADE20K_LABELS) == 150
    table = ADE20K_LABELS.value_table()
    assert table[0] == 255 and table[255] == 255 and table[151] == -1
    assert table[1:151].tolist() == list(range(150))


def test_ade20k_names_stand_at_their_published_values():
    known = {1: "wall", 3: "sky", 13: "person", 21: "car", 45: "chest of drawers", 59: "screen door", 131: "screen"}
    known |= {142: "crt screen", 150: "flag"}
    assert {value: ADE20K_LABELS.names[ADE20K_LABELS.index_of(value)] for value in known} == known


@pytest.mark.parametrize(("first_value", "ignored_values"), [(0, ()), (0, [0]), (1, (0,))])
def test_what_ade20k_says_of_its_values_may_be_repeated(first_value, ignored_values):
    assert ade20k_labels(first_value, ignored_values) == ADE20K_LABELS


@pytest.mark.parametrize(("first_value", "ignored_values"), [(2, ()), (-1, ()), (0, (11,)), (1, (0, 11))])
def test_other_meanings_of_values_are_refused(first_value, ignored_values):
    with pytest.raises(ConfigError, match=rf"first value {first_value} and ignored values .*Name your own classes"):
        ade20k_labels(first_value, ignored_values)
