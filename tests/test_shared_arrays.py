import copy
import multiprocessing
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from swin_dense.datasets import shared_arrays
from swin_dense.datasets.shared_arrays import FileNames, SharedArrays


@dataclass(frozen=True)
class Record(SharedArrays):
    large: np.ndarray
    small: np.ndarray
    name: str


def record():
    return Record(np.arange(20_011, dtype=np.float64), np.arange(3), "a")


def same(one, other):
    return np.array_equal(one.large, other.large) and np.array_equal(one.small, other.small) and one.name == other.name


def write_first(record, answers):
    answers.put((float(record.large[5]), record.small.tolist(), record.name))
    record.large[5] = -1.0
    answers.put("done")


def answers_of_new_process(sent):
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=write_first, args=(sent, answers))
    process.start()
    read = answers.get(), answers.get()
    process.join()
    return read[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sent: pickle.loads(pickle.dumps(sent))])
def test_copies_are_independent(copied):
    sent = record()
    other = copied(sent)
    assert same(sent, other)
    other.large[5] = -1.0
    assert sent.large[5] == 5.0


@pytest.mark.slow
def test_a_new_process_has_the_same_memory():
    sent = record()
    assert answers_of_new_process(sent) == (5.0, [0, 1, 2], "a")
    assert sent.large[5] == -1.0
    assert answers_of_new_process(sent)[0] == -1.0  # and so has the next one
    assert same(sent, pickle.loads(pickle.dumps(sent)))


@pytest.mark.slow
def test_a_new_process_has_its_own_memory_where_there_is_no_room(monkeypatch):
    monkeypatch.setattr(shared_arrays, "_has_room", lambda num_bytes: False)
    sent = record()
    assert answers_of_new_process(sent) == (5.0, [0, 1, 2], "a")
    assert sent.large[5] == 5.0


def test_file_names_come_back_as_they_were():
    names = ["a.png", "", "b/c d.jpg", "gr\u00fcn \u20ac \U0001f600.png", "half \ud800.png", "a.png"]
    kept = FileNames(names)
    assert list(kept) == names and len(kept) == 6
    assert [kept[row] for row in range(6)] == names
    assert list(FileNames([])) == []
    for row in (-1, 6):
        with pytest.raises(IndexError, match=f"row {row} is not in 0..5"):
            kept[row]
