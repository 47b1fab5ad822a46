import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_palette import Palette, read_palette, read_palette_labels
from swin_dense.errors import DataError

PALETTE = Palette(("sky", "road", "car"), ((128, 128, 128), (128, 64, 128), (64, 0, 128)), ((0, 0, 0),))


@pytest.fixture
def folders(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()

    def add(stem, label, size_hw=(5, 7)):
        Image.fromarray(np.zeros((*size_hw, 3), np.uint8)).save(tmp_path / "images" / f"{stem}.jpg")
        label.save(tmp_path / "labels" / f"{stem}.png")

    def read(findings, **options):
        return list(read_palette_labels(tmp_path / "images", tmp_path / "labels", PALETTE, findings, **options))

    return add, read


def coloured(indices):
    """A picture of the palette's colours; index 3 is the ignored one."""
    return np.array((*PALETTE.colours, *PALETTE.ignored), np.uint8)[indices]


@pytest.mark.parametrize(
    "text",
    [
        "128 128 128 sky\n128 64 128\troad surface\n64 0 128  car\n",
        "# colours\n\n128, 128, 128, sky\n128, 64, 128, road surface\n64, 0, 128, car\n",
        "# label:color_rgb:parts:actions\nsky:128,128,128::\nroad surface:128,64,128::\ncar:64,0,128:wheel,door:\n",
    ],
)
def test_both_forms_of_palette_say_the_same(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    assert read_palette(tmp_path / "p.txt") == Palette(("sky", "road surface", "car"), PALETTE.colours)
    ignored = read_palette(tmp_path / "p.txt", ("sky",))
    assert ignored == Palette(("road surface", "car"), PALETTE.colours[1:], PALETTE.colours[:1])
    assert ignored.label_map.raw_ids == (0, 1)


def test_every_wrong_line_of_a_palette_is_named(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("1 2 3 a\n1 2 b\n1 2 256 c\n1 2 3 d\n4 5 6 a\n-1 5 6 e\n")
    with pytest.raises(DataError) as error:
        read_palette(path)
    text = str(error.value)
    assert "5 faults" in text
    assert "line 2: wanted" in text and "'1 2 b'" in text
    assert "line 3: red, green and blue must be 0 to 255, got 1 2 256" in text
    assert "line 4: (1, 2, 3) stands in line 1 already" in text and "line 5: 'a' stands in line 1 already" in text
    assert "line 6: red, green and blue" in text


def test_palette_without_classes_or_with_unknown_ignored_names_is_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("1 2 3 void\n")
    with pytest.raises(DataError, match="wanted 1 to 255 classes, got 0"):
        read_palette(path, ("void",))
    with pytest.raises(DataError, match="no line has the name 'Void'"):
        read_palette(path, ("Void",))
    with pytest.raises(DataError, match=r"none\.txt: the palette cannot be read"):
        read_palette(tmp_path / "none.txt")


def test_colours_become_indices_whether_rgb_or_with_a_palette_in_the_file(folders):
    add, read = folders
    indices = np.random.default_rng(0).integers(0, 4, (5, 7))
    rgb = Image.fromarray(coloured(indices))
    add("a", rgb)
    add("b", rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=4))
    findings = Findings()
    labels = read(findings)
    assert not findings.faults and [label.file_name for label in labels] == ["a.jpg", "b.jpg"]
    for label in labels:
        assert label.values.dtype == np.uint8
        assert np.array_equal(label.values, np.where(indices == 3, 255, indices))


def test_unknown_colours_are_listed_with_pixels_and_pictures(folders):
    add, read = folders
    for stem, count in (("a", 2), ("b", 3)):
        colours = coloured(np.zeros((5, 7), int))
        colours[0, :count] = 9, 8, 7
        add(stem, Image.fromarray(colours))
    colours[1, 0] = 1, 2, 3
    add("c", Image.fromarray(colours))
    findings = Findings()
    read(findings)
    assert len(findings.faults) == 2
    assert "no colour 9 8 7: 8 px in 3 pictures, the first is " in findings.faults[0]
    assert "labels/a.png. Add a line for it, or pass --unknown ignore" in findings.faults[0]
    assert "no colour 1 2 3: 1 px in 1 pictures" in findings.faults[1] and "c.png" in findings.faults[1]


def test_unknown_colours_can_be_ignored_and_are_counted(folders):
    add, read = folders
    colours = coloured(np.ones((5, 7), int))
    colours[0, :2] = 9, 8, 7
    add("a", Image.fromarray(colours))
    findings = Findings()
    (label,) = read(findings, ignore_unknown=True)
    assert not findings.faults and findings.notes == {"pixels of unknown colours (ignored)": 2, "unknown colours": 1}
    assert (label.values == 255).sum() == 2 and (label.values == 1).sum() == 33


def test_pictures_of_class_numbers_are_recognised(folders):
    add, read = folders
    add("a", Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)))
    findings = Findings()
    read(findings)
    assert "hold class numbers already" in findings.faults[-1]


def test_sizes_must_agree(folders):
    add, read = folders
    add("a", Image.fromarray(coloured(np.zeros((5, 7), int))), size_hw=(7, 5))
    findings = Findings()
    assert read(findings) == []
    assert "a.jpg: the annotations say height x width 5 x 7, the picture is 7 x 5" in findings.faults[0]
