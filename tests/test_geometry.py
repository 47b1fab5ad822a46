import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swin_dense.datasets.geometry import (
    Crop,
    Flip,
    Pad,
    Resize,
    channels_first,
    draw_crop,
    keep_ratio_size_hw,
    scaled_size_hw,
)
from swin_dense.datasets.outlines import Frame, Outline

SIZE_HW = (41, 67)


def mask_boxes(masks):
    """Of `BoxMasks`: the bounding boxes."""
    return np.concatenate([masks.corners_xy, masks.corners_xy + masks.sizes_hw.flip(1)], axis=1).astype(np.float32)


operations = st.lists(
    st.one_of(
        st.just(Flip()),
        st.builds(Resize, st.tuples(st.integers(5, 90), st.integers(5, 90))),
        st.builds(Pad, st.tuples(st.integers(5, 90), st.integers(5, 90)), st.just((0, 0, 0)), st.just(255)),
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.2, 1), st.floats(0.2, 1)),
    ),
    max_size=4,
)


def apply(steps, instances):
    """Applies operations, and crops given in parts of the image."""
    for step in steps:
        if isinstance(step, tuple):
            size_hw = instances.size_hw
            crop_hw = (max(1, int(size_hw[0] * step[2])), max(1, int(size_hw[1] * step[3])))
            step = Crop(int((size_hw[0] - crop_hw[0]) * step[0]), int((size_hw[1] - crop_hw[1]) * step[1]), crop_hw)
        instances = step.instances(instances)
    return instances


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations, st.integers(0, 10**6), st.integers(0, 8))
def test_box_mask_label_crowd_and_id_never_come_apart(make_instances, steps, seed, count):
    instances, masks = apply(steps, make_instances(SIZE_HW, seed, count)).with_masks()
    assert np.array_equal(instances.labels + 100, instances.annotation_ids)
    assert np.array_equal(instances.labels % 2 == 1, instances.is_crowd)
    # However often it was resized, a mask is drawn once, so its edges are within a pixel.
    assert np.abs(instances.boxes_xyxy - mask_boxes(masks)).max(initial=0) <= 1.01
    assert instances.boxes_xyxy.dtype == np.float32 and instances.labels.dtype == np.int64
    assert masks.image_size_hw == instances.size_hw and len(masks) == len(instances)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations, st.integers(0, 10**6))
def test_operations_move_boxes_and_frame_alike(make_instances, steps, seed):
    before = make_instances(SIZE_HW, seed)
    # Crops clip boxes, and padding draws the masks.
    steps = [step for step in steps if not isinstance(step, tuple | Pad)]
    after = apply(steps, before)
    for row, box in zip(after.labels, after.boxes_xyxy, strict=True):
        x1, y1, x2, y2 = after.frame.of_polygon(before.boxes_xyxy[row].astype(np.float64))
        assert np.allclose(box, [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)], atol=1e-3)


def test_flip_twice_is_the_identity(make_instances):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    instances = make_instances(SIZE_HW, seed=0)
    flip = Flip()
    assert not np.array_equal(flip.image(image), image)
    assert np.array_equal(flip.image(flip.image(image)), image)
    again = flip.instances(flip.instances(instances))
    assert np.array_equal(again.boxes_xyxy, instances.boxes_xyxy)
    assert again.frame == instances.frame and again.outlines == instances.outlines


# How the pixels of one (41, 67, 3) picture, or of a part of it, can lie in memory.
PIXELS = np.random.default_rng(4).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
LAYOUTS = {
    "whole": PIXELS,
    "cut out": PIXELS[3:20, 5:64],
    "one row": PIXELS[7:8],
    "one pixel": PIXELS[7:8, 9:10],
    "mirrored": PIXELS[::-1, ::-1],
    "other channel order": PIXELS[..., ::-1],
    "transposed": PIXELS.transpose(1, 0, 2),
    "channels first": np.ascontiguousarray(PIXELS.transpose(2, 0, 1)).transpose(1, 2, 0),
    "repeated": np.broadcast_to(PIXELS[:1], PIXELS.shape),  # not writable
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_operations_equal_numpy_in_any_memory_layout(layout):
    image = LAYOUTS[layout]
    height, width = image.shape[:2]
    planes = channels_first(image)
    assert planes.flags.c_contiguous and np.array_equal(planes, image.transpose(2, 0, 1))
    assert np.array_equal(Flip().image(image), image[:, ::-1])
    assert np.array_equal(Flip().label(image[..., 1]), image[:, ::-1, 1])
    padded = Pad((71, 73), (124, 116, 104), 255).image(image)
    assert padded.shape == (71, 73, 3) and np.array_equal(padded[:height, :width], image)
    assert (padded[height:] == (124, 116, 104)).all() and (padded[:, width:] == (124, 116, 104)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_channels_first_keeps_values_type_and_its_input(dtype):
    image = PIXELS.astype(dtype)
    planes = channels_first(image)
    assert planes.dtype == dtype and np.array_equal(planes, PIXELS.transpose(2, 0, 1))
    planes[:] = 0
    assert np.array_equal(image, PIXELS)


def test_draw_crop_takes_every_place_and_no_other():
    generator = np.random.default_rng(0)
    drawn = [draw_crop((7, 5), (4, 4), generator) for _ in range(200)]
    assert {(crop.top, crop.left) for crop in drawn} == {(top, left) for top in range(4) for left in range(2)}
    assert {crop.size_hw for crop in drawn} == {(4, 4)}


def test_flip_moves_box_and_mask_alike(make_instances):
    flipped, masks = Flip().instances(make_instances(SIZE_HW, seed=3)).with_masks()
    assert np.array_equal(flipped.boxes_xyxy, mask_boxes(masks))
    plain = make_instances(SIZE_HW, seed=3).with_masks()[1]
    assert np.array_equal(masks.full(), plain.full().flip(2))


def test_resize_equals_cv2_without_antialias():
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    for size_hw in ((19, 23), (101, 83), SIZE_HW):
        assert np.array_equal(Resize(size_hw).image(image), cv2.resize(image, size_hw[::-1]))


def test_resize_of_labels_makes_no_new_value():
    label = np.random.default_rng(0).choice([0, 3, 7, 255], SIZE_HW).astype(np.uint8)
    for size_hw in ((19, 23), (101, 83)):
        resized = Resize(size_hw).label(label)
        assert resized.shape == size_hw and resized.dtype == np.uint8
        assert set(np.unique(resized)) <= {0, 3, 7, 255}


def test_crop_leaves_out_objects_beside_it(make_instances):
    instances = make_instances(SIZE_HW, seed=0)
    right = int(instances.boxes_xyxy[:, 0].min())
    assert right > 0
    cropped = Crop(0, 0, (41, right)).instances(instances)
    assert len(cropped) == 0 and cropped.size_hw == (41, right) and cropped.boxes_xyxy.shape == (0, 4)


def test_operations_leave_their_input_alone(make_instances):
    instances = make_instances(SIZE_HW, seed=0)
    image = np.full((*SIZE_HW, 3), 9, np.uint8)
    boxes = instances.boxes_xyxy.copy()
    for operation in (Flip(), Resize((20, 30)), Crop(3, 4, (20, 30))):
        operation.image(image)
        operation.instances(instances)
    pad = Pad((50, 70), (0, 0, 0), 255)
    pad.image(image)
    pad.instances(instances)
    assert np.array_equal(boxes, instances.boxes_xyxy) and instances.frame == Frame.of_file(SIZE_HW)
    assert (image == 9).all()


def test_pad_fills_image_and_label_at_bottom_and_right():
    pad = Pad((5, 9), (124, 116, 104), 255)
    image, label = pad.image(np.zeros((7, 6, 3), np.uint8)), pad.label(np.zeros((7, 6), np.uint8))
    assert image.shape == (7, 9, 3) and image[0, 8].tolist() == [124, 116, 104] and not image[:, :6].any()
    assert label.shape == (7, 9) and (label[:, 6:] == 255).all() and not label[:, :6].any()


def test_pad_leaves_masks_where_they_are_and_outlines_out_of_the_new_pixels(make_instances):
    instances = make_instances(SIZE_HW, seed=2)
    instances.outlines[1] = Outline((np.array([50.0, 30, 90, 30, 90, 60, 50, 60]),))  # overshoots the image
    padded, masks = Pad((53, 71), (0, 0, 0), 255).instances(instances).with_masks()
    plain = instances.with_masks()[1].full()
    assert np.array_equal(masks.full()[:, :41, :67], plain) and masks.full().sum() == plain.sum()
    assert padded.size_hw == (53, 71) and np.array_equal(padded.boxes_xyxy, mask_boxes(masks))


@pytest.mark.parametrize(
    ("size_hw", "edges", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((300, 900), (800, 1333), (444, 1333)),
        ((683, 512), (2048, 512), (683, 512)),
        ((128, 128), (112, 200), (112, 112)),
        ((3, 5000), (800, 1333), (1, 1333)),
    ],
)
def test_keep_ratio_size_follows_mmcv(size_hw, edges, expected):
    assert keep_ratio_size_hw(size_hw, edges) == expected


def test_scaled_size_rounds_half_up_and_is_at_least_one():
    assert scaled_size_hw((5, 1), 0.5) == (3, 1)
    assert scaled_size_hw((1, 1), 0.01) == (1, 1)
