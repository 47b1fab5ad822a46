import matplotlib.figure
import pytest
from PIL import Image

from swin_dense.tools.curves import draw_curves
from swin_dense.training.metrics_file import read_metrics

ROWS = [
    {"step": 1, "loss": 3.0, "loss_mask": 1.0, "learning_rate": 0.1},
    {"step": 2, "loss": 2.0, "loss_mask": 0.5, "learning_rate": 0.1, "val_mask_AP50": 0.25},
    {"step": 3, "val_mask_AP50": 0.5, "val_loss": 2.5, "val_loss_mask": 0.75, "val_loss_new": 1.0},
]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def test_curves_are_the_losses_and_the_scores(drawn, tmp_path):
    draw_curves(ROWS, tmp_path / "curves.png")
    losses, scores = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.get_lines()}
    assert lines == {
        "loss": [[1, 3.0], [2, 2.0]],
        "loss mask": [[1, 1.0], [2, 0.5]],
        "validation loss": [[3, 2.5]],
        "_validation loss mask": [[3, 0.75]],
        "_validation loss new": [[3, 1.0]],
    }
    lines = {line.get_label(): line.get_xydata().tolist() for line in scores.get_lines()}
    assert lines == {"mask AP50": [[2, 0.25], [3, 0.5]]}
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * picture.height


def test_validation_loss_is_dashed_in_the_colour_of_its_training_loss(drawn, tmp_path):
    draw_curves(ROWS, tmp_path / "curves.png")
    axes, _ = drawn[0].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for name, of_validation in (("loss", "validation loss"), ("loss mask", "_validation loss mask")):
        assert lines[name].get_color() == lines[of_validation].get_color()
        assert (lines[name].get_linestyle(), lines[of_validation].get_linestyle()) == ("-", "--")
    assert lines["loss"].get_color() != lines["loss mask"].get_color()
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["loss", "loss mask", "validation loss"]


@pytest.mark.parametrize("rows", [[], ROWS[:1], [{"step": 1, "val_mIoU": 0.5}]])
def test_curves_of_little_are_drawn_too(rows, tmp_path):
    draw_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_every_loss_and_score_of_a_run_is_drawn(tiny_run, drawn, tmp_path):
    rows = read_metrics(tiny_run.folder / "metrics.csv")
    draw_curves(rows, tmp_path / "curves.png")
    names = {name for row in rows for name in row if name.startswith(("loss", "val"))}
    shown = {f"{axes.get_title()}: {line.get_label()}" for axes in drawn[0].axes for line in axes.get_lines()}
    assert len(shown) == len(names) >= 5 and {"val_loss"} < {name for name in names if name.startswith("val_loss")}
