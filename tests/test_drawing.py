import numpy as np
import pytest

from swin_dense.datasets.drawing import (
    class_colours,
    draw_classification,
    draw_instances,
    draw_semantic,
    side_by_side,
)
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

LABELS = LabelMap(names=("sky", "road", "tree"), raw_ids=(1, 2, 3))
NO_BOXES = np.zeros((0, 4), np.float32)


def grey(height, width, value=120):
    return np.full((height, width, 3), value, np.uint8)


def one_object(height=41, width=67):
    masks = np.zeros((1, height, width), bool)
    masks[0, 10:30, 20:50] = True
    return grey(height, width), np.array([[20, 10, 50, 30]], np.float32), ["tree"], masks


def near(pixel, colour, tolerance=3):
    return np.abs(pixel.astype(int) - colour).max() <= tolerance


def test_colours_are_distinct_and_more_begin_with_the_same():
    many = class_colours(150)
    assert len(set(many)) == 150
    for count in (1, 2, 20, 80):
        assert class_colours(count) == many[:count]
    first = np.array(class_colours(20), float)
    apart = np.linalg.norm(first[:, None] - first[None], axis=2) + 1e9 * np.eye(20)
    assert apart.min() > 30
    assert class_colours(0) == [] and len(class_colours(1000)) == 1000


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_kept():
    for size_hw, factor in (((41, 67), 8), ((160, 101), 3), ((300, 500), 1), ((331, 400), 1), ((1, 1), 320)):
        drawn = draw_instances(grey(*size_hw), NO_BOXES, [], None)
        assert drawn.shape == (size_hw[0] * factor, size_hw[1] * factor, 3) and drawn.dtype == np.uint8
    assert draw_instances(grey(41, 67), NO_BOXES, [], None, scale=2).shape == (82, 134, 3)


def test_image_without_objects_stays_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert np.array_equal(draw_instances(image, NO_BOXES, [], np.zeros((0, 37, 53), bool), scale=1), image)


def test_mask_is_translucent_inside_and_nothing_is_drawn_far_away():
    image, boxes, names, masks = one_object()
    colour = np.array(class_colours(3)[2])
    drawn = draw_instances(image, boxes, names, masks, label_map=LABELS, scale=4)
    assert near(drawn[27 * 4, 35 * 4], 120 * 0.55 + colour * 0.45)
    assert near(drawn[38 * 4, 60 * 4], 120) and near(drawn[35 * 4, 5 * 4], 120)
    assert near(drawn[30 * 4 - 1, 35 * 4], colour)


def test_hole_of_a_mask_shows_the_image():
    image, boxes, names, masks = one_object()
    masks[0, 15:25, 30:40] = False
    drawn = draw_instances(image, boxes, names, masks, scale=4)
    assert near(drawn[20 * 4, 35 * 4], 120)


def test_mask_outside_its_box_is_not_drawn():
    image, boxes, names, masks = one_object()
    masks[:] = True
    drawn = draw_instances(image, boxes, names, masks, scale=4)
    assert near(drawn[38 * 4, 60 * 4], 120)


def test_small_object_is_drawn_over_a_large_one_in_either_order():
    image = grey(41, 67)
    boxes = np.array([[5, 5, 60, 38], [25, 20, 40, 35]], np.float32)
    masks = np.zeros((2, 41, 67), bool)
    masks[0, 5:38, 5:60] = masks[1, 20:35, 25:40] = True
    forward = draw_instances(image, boxes, ["sky", "tree"], masks)
    backward = draw_instances(image, boxes[::-1], ["tree", "sky"], masks[::-1])
    assert np.array_equal(forward, backward)


def test_a_name_keeps_its_colour_whatever_else_is_drawn():
    image, boxes, _, masks = one_object()
    two = draw_instances(image, np.repeat(boxes, 2, 0), ["bus", "bus"], np.concatenate([masks, masks * False]), scale=4)
    one = draw_instances(image, boxes, ["bus"], masks, scale=4)
    assert near(one[27 * 4, 35 * 4], two[27 * 4, 35 * 4])


def test_scores_and_names_change_the_picture():
    image, boxes, names, masks = one_object()
    plain = draw_instances(image, boxes, names, masks)
    assert not np.array_equal(plain, draw_instances(image, boxes, names, masks, np.array([0.5])))
    assert not np.array_equal(
        draw_instances(image, boxes, names, masks, np.array([0.5])),
        draw_instances(image, boxes, names, masks, np.array([0.9])),
    )


@pytest.mark.parametrize(
    "box", [(-30, -30, 200, 200), (66, 40, 67, 41), (0, 0, 0, 0), (-9, -9, -5, -5), (80, 80, 99, 99)]
)
def test_boxes_at_and_beyond_the_border_are_drawn_without_failing(box):
    image, _, _, masks = one_object()
    drawn = draw_instances(image, np.array([box], np.float32), ["a very long class name " * 9], masks, np.array([1.0]))
    assert drawn.shape == (328, 536, 3)


def test_tags_of_equal_boxes_do_not_cover_each_other():
    image, boxes, _, masks = one_object()
    both = draw_instances(image, np.repeat(boxes, 2, 0), ["sky", "road"], np.repeat(masks, 2, 0), label_map=LABELS)
    for index in range(2):
        assert (both == np.array(class_colours(3)[index])).all(axis=2).sum() > 300


def test_nothing_given_is_changed():
    image, boxes, names, masks = one_object()
    before = image.copy(), boxes.copy(), masks.copy()
    draw_instances(image, boxes, names, masks)
    label = np.zeros((41, 67), np.uint8)
    draw_semantic(image, label, LABELS)
    assert all(np.array_equal(a, b) for a, b in zip(before, (image, boxes, masks), strict=True))
    assert not label.any()


def test_semantic_colours_mix_with_the_image_and_ignored_pixels_show_it():
    label = np.zeros((40, 60), np.uint8)
    label[:, 20:40], label[:, 40:] = 2, 255
    drawn = draw_semantic(grey(40, 60), label, LABELS, 0.5, scale=3)
    colours = np.array(class_colours(3))
    assert near(drawn[60, 30], 60 + colours[0] * 0.5) and near(drawn[60, 90], 60 + colours[2] * 0.5)
    assert near(drawn[60, 150], 120)


def test_legend_shows_the_classes_present_and_only_those():
    label = np.zeros((40, 60), np.uint8)
    label[:, 40:] = 2
    drawn = draw_semantic(grey(40, 60), label, LABELS, 0.5, scale=8)
    assert drawn.shape[1:] == (480, 3) and drawn.shape[0] > 320
    legend = drawn[320:]
    shown = [(legend == np.array(colour)).all(axis=2).sum() > 50 for colour in class_colours(3)]
    assert shown == [True, False, True]
    assert (legend == 255).all(axis=2).mean() > 0.5


def test_legend_of_many_classes_takes_more_rows():
    labels = LabelMap(names=tuple(f"class number {i}" for i in range(60)), raw_ids=tuple(range(60)))
    label = np.arange(2400, dtype=np.uint8).reshape(40, 60) % 60
    assert (
        draw_semantic(grey(40, 60), label, labels).shape[0]
        > draw_semantic(grey(40, 60), label * 0, labels).shape[0] + 200
    )


def test_nothing_labelled_has_no_legend():
    drawn = draw_semantic(grey(40, 60), np.full((40, 60), 255, np.uint8), LABELS, scale=2)
    assert np.array_equal(drawn, grey(80, 120))


def test_panels_of_different_heights_stand_under_their_titles():
    page = side_by_side([grey(30, 50, 10), grey(70, 20, 200)], ["annotated", "a title much wider than twenty pixels"])
    assert page.dtype == np.uint8 and page.shape[1] == 50 + 20 + 3 * 8 and page.shape[0] > 70 + 16
    top = int(np.flatnonzero((page[:, 10] == 10).all(axis=1))[0])
    assert (page[top : top + 30, 8:58] == 10).all() and (page[top : top + 70, 66:86] == 200).all()
    assert (page[top + 30 :, 8:58] == 255).all()
    assert (page[:top, 8:58] < 128).any() and (page[:top, 58:66] > 200).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: draw_instances(np.zeros((4, 5), np.uint8), NO_BOXES, [], None),
            r"image \(H, W, 3\) of uint8, got \(4, 5\)",
        ),
        (lambda: draw_instances(np.zeros((4, 5, 3)), NO_BOXES, [], None), "of float64"),
        (lambda: draw_instances(grey(4, 5), NO_BOXES, ["a"], None), "got {'boxes': 0, 'names': 1}"),
        (
            lambda: draw_instances(grey(4, 5), np.ones((1, 4)), ["a"], np.zeros((1, 5, 4))),
            r"size \(4, 5\), got \(5, 4\)",
        ),
        (lambda: draw_instances(grey(4, 5), np.full((1, 4), np.nan), ["a"], None), "Box 0 is not finite"),
        (lambda: draw_instances(grey(4, 5), NO_BOXES, [], None, scale=0), "scale must be a whole number of 1 or more"),
        (lambda: draw_semantic(grey(4, 5), np.zeros((5, 4), int), LABELS), r"same size, got \(4, 5\) and \(5, 4\)"),
        (lambda: draw_semantic(grey(4, 5), np.full((4, 5), 3), LABELS), "values from 3 to 3, wanted 0 to 2"),
        (lambda: side_by_side([], []), "one or more panels and as many titles, got 0 and 0"),
        (lambda: side_by_side([grey(4, 5)], ["a", "b"]), "got 1 and 2"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(DataError, match=message):
        call()


def row_colours(drawn, rows):
    """Colour at the left edge of each line below the picture, where every bar starts."""
    height = drawn.shape[0] - 24 * rows - 8
    return [tuple(int(value) for value in drawn[height + 4 + 24 * row + 3, 0]) for row in range(rows)]


def bar_lengths(drawn, rows):
    strip = drawn[drawn.shape[0] - 24 * rows - 8 :]
    return [int((strip[4 + 24 * row + 1] != 255).any(axis=1).sum()) for row in range(rows)]


def test_classification_shows_image_and_bars_as_long_as_scores():
    image = grey(80, 100)
    drawn = draw_classification(image, np.array([0.25, 0.75, 0.0]), LABELS, scale=4)
    assert drawn.shape == (4 * 80 + 3 * 24 + 8, 400, 3) and drawn.dtype == np.uint8
    assert (drawn[:320] == 120).all() and (image == 120).all()
    assert bar_lengths(drawn, 3) == [300, 100, 1]  # the highest score comes first


def test_true_class_is_marked_and_always_there():
    names = tuple(f"class {index}" for index in range(9))
    labels = LabelMap(names, tuple(range(9)))
    scores = np.linspace(0.5, 0.0, 9)
    without, high, low = (draw_classification(grey(80, 80), scores, labels, truth) for truth in (None, 1, 8))
    assert len(set(row_colours(without, 5))) == 1
    bar = row_colours(without, 5)[0]
    assert [colour == bar for colour in row_colours(high, 5)] == [True, False, True, True, True]
    assert [colour == bar for colour in row_colours(low, 5)] == [True] * 4 + [False]
    assert low.shape == without.shape


def test_classification_needs_a_score_for_each_class():
    with pytest.raises(DataError, match=r"one score for each of 3 classes, got \(2,\)"):
        draw_classification(grey(9, 9), np.zeros(2), LABELS)
