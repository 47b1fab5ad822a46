import numpy as np
import pytest

from swin_dense.datasets.instances import Instances
from swin_dense.datasets.outlines import Outline
from swin_dense.errors import DataError


def test_select_keeps_the_fields_of_an_object_together(make_instances):
    instances = make_instances((17, 23), seed=0)
    chosen = instances.select(np.array([3, 0]))
    assert chosen.labels.tolist() == [3, 0] and chosen.annotation_ids.tolist() == [103, 100]
    assert chosen.is_crowd.tolist() == [True, False]
    assert np.array_equal(chosen.boxes_xyxy, instances.boxes_xyxy[[3, 0]])
    assert chosen.outlines == [instances.outlines[3], instances.outlines[0]] and chosen.frame == instances.frame
    assert instances.select(instances.labels > 2).labels.tolist() == [3, 4]


def test_instances_refuse_unequal_lengths(make_instances):
    one = make_instances((5, 7), seed=0, count=2)
    with pytest.raises(DataError, match=r"every field needs one row per object.*'outlines': 1"):
        Instances(one.boxes_xyxy, one.labels, one.outlines[:1], one.is_crowd, one.annotation_ids, one.frame)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", np.zeros(2), "labels must be int64, got float64"),
        ("boxes_xyxy", np.zeros((2, 5), np.float32), r"wanted boxes \(N, 4\), got \(2, 5\)"),
        ("boxes_xyxy", np.zeros((2, 4)), "boxes_xyxy must be float32, got float64"),
    ],
)
def test_instances_refuse_other_types_and_shapes(make_instances, field, value, message):
    one = make_instances((5, 7), seed=0, count=2)
    with pytest.raises(DataError, match=message):
        Instances(**{**vars(one), field: value})


def test_empty_has_the_image_size_and_no_object():
    empty = Instances.empty((5, 7))
    assert len(empty) == 0 and empty.size_hw == (5, 7) and empty.boxes_xyxy.shape == (0, 4)
    kept, masks = empty.with_masks()
    assert len(kept) == 0 and masks.full().shape == (0, 5, 7)


def test_masks_come_with_their_objects_and_without_those_that_have_no_pixel(make_instances):
    instances = make_instances((17, 23), seed=1)
    outside = Outline((np.array([40.0, 40, 50, 40, 50, 50]),))
    nothing = Outline(runs=np.array([17 * 23], np.uint32))
    instances.outlines[1], instances.outlines[4] = outside, nothing
    kept, masks = instances.with_masks()
    assert kept.labels.tolist() == [0, 2, 3] and kept.annotation_ids.tolist() == [100, 102, 103]
    corners = np.concatenate([masks.corners_xy, masks.corners_xy + masks.sizes_hw.flip(1)], axis=1)
    assert np.array_equal(kept.boxes_xyxy, corners)
    assert all(masks.crop(row).all() for row in range(3)) and masks.image_size_hw == (17, 23)


def test_drawn_keeps_masks_and_bounds_them(make_instances):
    instances = make_instances((17, 23), seed=1)
    instances.boxes_xyxy[:] += 1  # somewhere else
    instances.outlines[2] = Outline(runs=np.array([17 * 23], np.uint32))
    drawn = instances.drawn()
    kept, masks = drawn.with_masks()
    assert len(kept) == len(drawn) == 4 and drawn.labels.tolist() == [0, 1, 3, 4]
    assert np.array_equal(masks.full(), instances.with_masks()[1].full())
    corners = np.concatenate([masks.corners_xy, masks.corners_xy + masks.sizes_hw.flip(1)], axis=1)
    assert np.array_equal(drawn.boxes_xyxy, corners) and drawn.boxes_xyxy.dtype == np.float32
    assert len(Instances.empty((17, 23)).drawn()) == 0


def test_followed_by_keeps_both_in_order_and_needs_one_frame(make_instances):
    first, second = make_instances((17, 23), seed=1, count=2), make_instances((17, 23), seed=2, count=3)
    both = first.followed_by(second)
    assert both.labels.tolist() == [0, 1, 0, 1, 2] and both.outlines == [*first.outlines, *second.outlines]
    for name in ("boxes_xyxy", "is_crowd", "annotation_ids"):
        assert np.array_equal(getattr(both, name), np.concatenate([getattr(first, name), getattr(second, name)]))
    with pytest.raises(DataError, match="only those of one frame can be joined"):
        first.followed_by(make_instances((17, 29), seed=2))


def test_objects_without_a_box_do_not_move_on(make_instances):
    instances = make_instances((17, 23), seed=1)
    boxes = instances.boxes_xyxy.copy()
    boxes[3, 2] = boxes[3, 0]
    assert instances.moved(boxes, instances.frame).labels.tolist() == [0, 1, 2, 4]
    assert len(instances) == 5
