import pytest

from swin_dense.datasets.class_names import read_class_names
from swin_dense.errors import DataError


def test_class_names_are_read_from_lines_and_tables(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("road\n\ntree, tall\n")
    assert read_class_names(path) == ("road", "tree, tall")
    path.write_text("Idx,Ratio,Name\n1,0.1,wall\n2,0.2,screen;door\n3,0.1,screen;silver;screen\n")
    assert read_class_names(path) == ("wall", "screen door", "screen silver")
    path.write_text("Idx,Name\n1\n")
    with pytest.raises(DataError, match="line 2 has no column 'Name'"):
        read_class_names(path)
    for text, message in (("", "got none"), ("a\nb\na\n", "got 'a' twice")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_class_names(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt")
