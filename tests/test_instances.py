import numpy as np
import pytest

from swin_dense.datasets.instances import Instances
from swin_dense.errors import DataError


def test_select_keeps_the_fields_of_an_object_together(make_instances):
    instances = make_instances((17, 23), seed=0)
    chosen = instances.select(np.array([3, 0]))
    assert chosen.labels.tolist() == [3, 0] and chosen.annotation_ids.tolist() == [103, 100]
    assert chosen.is_crowd.tolist() == [True, False]
    assert np.array_equal(chosen.boxes_xyxy, instances.boxes_xyxy[[3, 0]])
    assert np.array_equal(chosen.masks, instances.masks[[3, 0]])


def test_instances_refuse_unequal_lengths(make_instances):
    one = make_instances((5, 7), seed=0, count=2)
    with pytest.raises(DataError, match=r"every field needs one row per object.*'masks': 1"):
        Instances(one.boxes_xyxy, one.labels, one.masks[:1], one.is_crowd, one.annotation_ids)


def test_instances_refuse_float_labels(make_instances):
    one = make_instances((5, 7), seed=0, count=2)
    with pytest.raises(DataError, match="labels must be int64, got float64"):
        Instances(one.boxes_xyxy, one.labels * 1.0, one.masks, one.is_crowd, one.annotation_ids)


def test_empty_has_the_image_size_and_no_object():
    empty = Instances.empty((5, 7))
    assert len(empty) == 0 and empty.size_hw == (5, 7) and empty.boxes_xyxy.shape == (0, 4)
    assert len(empty.without_vanished()) == 0


def test_without_vanished_drops_empty_masks_and_flat_boxes(make_instances):
    instances = make_instances((17, 23), seed=1)
    instances.masks[1] = 0
    instances.boxes_xyxy[3, 2] = instances.boxes_xyxy[3, 0]
    assert instances.without_vanished().labels.tolist() == [0, 2, 4]
