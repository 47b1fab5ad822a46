from swin_dense.datasets.ade20k import ADE20K_LABELS


def test_ade20k_has_150_classes_one_below_their_values():
    assert len(ADE20K_LABELS) == 150
    table = ADE20K_LABELS.value_table()
    assert table[0] == 255 and table[255] == 255 and table[151] == -1
    assert table[1:151].tolist() == list(range(150))


def test_ade20k_names_stand_at_their_published_values():
    known = {1: "wall", 3: "sky", 13: "person", 21: "car", 45: "chest of drawers", 59: "screen door", 131: "screen"}
    known |= {142: "crt screen", 150: "flag"}
    assert {value: ADE20K_LABELS.names[ADE20K_LABELS.index_of(value)] for value in known} == known
