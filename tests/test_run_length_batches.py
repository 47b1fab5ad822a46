import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from swin_dense.datasets.run_length_batches import compress_masks, measure_masks
from swin_dense.datasets.segmentations import parse_run_lengths
from swin_dense.errors import AnnotationError

SIZE_HW = (13, 17)


def random_masks(seed, count, size_hw=SIZE_HW):
    random = np.random.default_rng(seed)
    shares = random.choice([0, 0.02, 0.5, 1], count)
    masks = [np.asfortranarray(random.random(size_hw) < share, dtype=np.uint8) for share in shares]
    return [coco_mask.encode(mask) for mask in masks]


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 7))
def test_areas_equal_those_of_masks_one_by_one(seed, count):
    masks = random_masks(seed, count)
    expected = [parse_run_lengths(mask, SIZE_HW)[1::2].sum() for mask in masks]
    assert measure_masks(masks, SIZE_HW).tolist() == expected


def test_areas_of_long_runs_are_exact():
    size_hw = (8191, 7919)
    runs = [[8191 * 7919], [0, 8191 * 7919], [5, 8191 * 7919 - 6, 1], [0, 1, 8191 * 7919 - 1]]
    masks = compress_masks([{"size": size_hw, "counts": each} for each in runs], size_hw)
    assert measure_masks(masks, size_hw).tolist() == [0, 8191 * 7919, 8191 * 7919 - 6, 1]


def test_text_bytes_and_numbers_become_the_same_bytes():
    masks = random_masks(1, 5)
    texts = [{**mask, "counts": mask["counts"].decode()} for mask in masks]
    numbers = [{**mask, "counts": parse_run_lengths(mask, SIZE_HW).tolist()} for mask in masks]
    assert compress_masks(texts, SIZE_HW) == compress_masks(numbers, SIZE_HW) == compress_masks(masks, SIZE_HW) == masks


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_batch_is_refused_exactly_where_one_of_its_masks_is(data, seed):
    masks = random_masks(seed, 5)
    row = data.draw(st.integers(0, 4))
    text = bytearray(masks[row]["counts"])
    place = data.draw(st.integers(0, len(text) - 1))
    edit = data.draw(st.sampled_from(["change", "cut", "repeat"]))
    if edit == "change":
        text[place] = data.draw(st.integers(0, 255))
    elif edit == "cut":
        del text[place:]
    else:
        text[place:place] = text[place : place + 3]
    masks[row]["counts"] = bytes(text)
    try:
        parse_run_lengths(masks[row], SIZE_HW)
    except AnnotationError as error:
        with pytest.raises(AnnotationError) as raised:
            measure_masks(masks, SIZE_HW)
        assert str(raised.value) == f"mask {row}: {error}"
    else:
        assert len(measure_masks(masks, SIZE_HW)) == 5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"counts": "?0"}, "mask 1: segmentation needs the keys"),
        ({"size": [13, 17]}, "mask 1: segmentation needs the keys"),
        ({"size": [3, 5], "counts": b"?0"}, "mask 1: segmentation size must be"),
        ({"size": None, "counts": b"?0"}, "mask 1: segmentation size must be"),
        ({"size": [13, 17], "counts": "ÿ"}, "mask 1: counts holds characters"),
        ({"size": [13, 17], "counts": [1, 2]}, "mask 1: counts must add up to height x width = 221, got 3"),
        ({"size": [13, 17], "counts": None}, "mask 1: counts must be text or a list"),
    ],
)
def test_a_mask_of_another_form_is_named(mask, message):
    with pytest.raises(AnnotationError, match=message):
        compress_masks([random_masks(2, 1)[0], mask], SIZE_HW)
