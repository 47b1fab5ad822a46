import json
import pickle

import pytest

from swin_dense.datasets import coco_results_spool
from swin_dense.datasets.coco_results_spool import ResultsSpool


def entries(image_id, count=2):
    return [{"image_id": image_id, "score": 0.1 * row, "bbox": [0.1, 1 / 3, 5e-324, 2.0]} for row in range(count)]


@pytest.fixture(params=["in memory", "on disk"])
def spool(request, monkeypatch):
    if request.param == "on disk":
        monkeypatch.setattr(coco_results_spool, "_BYTES_IN_MEMORY", 1)
    spool = ResultsSpool()
    for image_id, count in ((9, 2), (0, 1), (5, 0), (3, 3)):
        spool.add(image_id, entries(image_id, count))
    return spool


EXPECTED = [*entries(0, 1), *entries(3, 3), *entries(9, 2)]


def test_results_come_back_exactly_in_the_order_of_ids_again_and_again(spool):
    assert list(spool) == EXPECTED and list(spool) == EXPECTED
    spool.add(7, entries(7))
    assert list(spool) == [*EXPECTED[:-2], *entries(7), *EXPECTED[-2:]]


def test_written_file_holds_what_is_listed(spool, tmp_path):
    path = tmp_path / "new" / "results.json"
    spool.write(path)
    assert json.loads(path.read_text()) == EXPECTED
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]


def test_no_results_are_an_empty_list(tmp_path):
    spool = ResultsSpool()
    spool.add(1, [])
    spool.write(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == list(spool) == []


def test_pickled_spools_merge_to_the_whole(spool):
    other = ResultsSpool()
    other.add(4, entries(4))
    other.merge(pickle.loads(pickle.dumps(spool)))
    assert list(other) == [*EXPECTED[:-2], *entries(4), *EXPECTED[-2:]] and list(spool) == EXPECTED
