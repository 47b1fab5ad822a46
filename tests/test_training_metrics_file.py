import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.errors import DataError
from swin_dense.training.metrics_file import MetricsFile, read_metrics


def test_metrics_file_round_trip_with_growing_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.append(10, {"loss": 0.1})
    metrics.append(20, {"loss": 0.2, "box, AP": None})
    metrics.append(20, {"box, AP": 1 / 3})
    metrics.append(30, {"loss": 1e-30})
    assert read_metrics(path) == [
        {"step": 10, "loss": 0.1},
        {"step": 20, "loss": 0.2, "box, AP": 1 / 3},
        {"step": 30, "loss": 1e-30},
    ]
    assert path.read_text().splitlines()[0] == 'step,loss,"box, AP"'
    assert os.listdir(tmp_path) == ["metrics.csv"]


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False)), max_size=6))
def test_metrics_file_gives_back_every_number_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    metrics = MetricsFile(path)
    for step, row in enumerate(rows):
        metrics.append(step, row)
    assert read_metrics(path) == [{"step": step, **row} for step, row in enumerate(rows)]


def test_resumed_metrics_equal_the_uninterrupted_ones(tmp_path):
    whole, resumed = tmp_path / "whole.csv", tmp_path / "resumed.csv"
    for path, steps in ((whole, range(1, 7)), (resumed, range(1, 6))):
        metrics = MetricsFile(path)
        for step in steps:
            metrics.append(step, {"loss": step / 7, **({"score": 0.5} if step == 2 else {})})
    metrics = MetricsFile(resumed, resume_step=3)
    assert [row["step"] for row in read_metrics(resumed)] == [1, 2, 3]
    for step in (4, 5, 6):
        metrics.append(step, {"loss": step / 7})
    assert resumed.read_bytes() == whole.read_bytes()


def test_metrics_survive_every_cut_of_the_last_line(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.append(1, {"Maß": 0.25})
    kept = len(path.read_bytes())
    metrics.append(2, {"Maß": 0.5})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_metrics(path) == ([{"step": 1, "Maß": 0.25}] if length >= kept else [])
        MetricsFile(path, resume_step=9).append(3, {"Maß": 0.75})
        assert read_metrics(path)[-1] == {"step": 3, "Maß": 0.75}


def test_metrics_file_starts_anew_at_step_zero(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path).append(1, {"loss": 1.0})
    MetricsFile(path)
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", ["2,x", "2", "2,1,1", ",1"])
def test_read_metrics_names_the_line_that_is_no_row(tmp_path, line):
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,loss\n1,1\n{line}\n3,1\n")
    with pytest.raises(DataError, match=rf"metrics.csv: line 3: expected numbers for step, loss, got '{line}'"):
        read_metrics(path)


def test_read_metrics_names_the_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none.csv: metrics cannot be read \(No such file"):
        read_metrics(tmp_path / "none.csv")
