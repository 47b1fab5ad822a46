import numpy as np
import pytest

from swin_dense.tools.instance_prediction import InstancePrediction


@pytest.fixture
def prediction():
    masks = [{"size": [1, 1], "counts": text} for text in ("a", "b", "c")]
    boxes, scores = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([0.9, 0.5, 0.1], np.float32)
    return InstancePrediction(boxes, np.array([4, 5, 6]), scores, masks)


def test_above_keeps_rows_together(prediction):
    kept = prediction.above(0.5)
    assert kept.labels.tolist() == [4, 5] and kept.masks_rle == prediction.masks_rle[:2]
    assert np.array_equal(kept.boxes_xyxy, prediction.boxes_xyxy[:2])
    assert np.array_equal(kept.scores, prediction.scores[:2])


def test_select_takes_rows_in_their_order(prediction):
    chosen = prediction.select(np.array([2, 0]))
    assert chosen.labels.tolist() == [6, 4] and [mask["counts"] for mask in chosen.masks_rle] == ["c", "a"]
    assert np.array_equal(chosen.boxes_xyxy, prediction.boxes_xyxy[[2, 0]])
    assert len(prediction.select(np.zeros(0, np.int64)).scores) == 0
