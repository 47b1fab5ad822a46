import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import clip_boxes_to_image

from swin_dense.heads.box_batches import EMPTY_BOX, beside, clip_boxes, counts_are_known, emptied, is_box, stack_boxes


def random_boxes(count, seed=0):
    corner, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed)) * 90
    return torch.cat((corner, corner + size), dim=1) - 10


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_stacked_boxes_are_the_images_boxes_and_then_empty_places(counts):
    boxes = [random_boxes(count, seed) for seed, count in enumerate(counts)]
    stacked = stack_boxes(boxes)
    assert stacked.shape == (len(counts), max(counts), 4)
    assert is_box(stacked).sum(dim=1).tolist() == counts
    for image, own in zip(stacked, boxes, strict=True):
        assert torch.equal(image[: len(own)], own)
        assert image[len(own) :].tolist() == [list(EMPTY_BOX)] * (max(counts) - len(own))


def test_boxes_without_extent_are_boxes_and_empty_places_are_not():
    assert is_box(torch.tensor([[3.0, 4, 3, 4], [3, 4, 9, 4], [0, 0, 0, 0], EMPTY_BOX])).tolist() == [True] * 3 + [
        False
    ]


def test_emptied_boxes_are_empty_and_the_others_stay():
    boxes, chosen = random_boxes(7), torch.arange(7) % 3 == 0
    changed = emptied(boxes, chosen)
    assert torch.equal(is_box(changed), ~chosen) and torch.equal(changed[~chosen], boxes[~chosen])


def test_clipped_boxes_are_torchvisions_image_by_image():
    sizes_hw = [(41, 67), (13, 90), (500, 600)]
    boxes = torch.stack([random_boxes(11, seed) for seed in range(3)])
    clipped = clip_boxes(boxes, torch.tensor(sizes_hw)[:, None])
    for image, own, size_hw in zip(clipped, boxes, sizes_hw, strict=True):
        assert torch.equal(image, clip_boxes_to_image(own, size_hw))


def test_numbers_come_in_the_dtype_of_their_neighbour_or_their_own():
    like = torch.zeros(1, dtype=torch.float64)
    assert beside([(1, 2), (3, 4)], like).dtype == torch.float64
    assert beside([1, 2], like, torch.int64).tolist() == [1, 2]


def test_only_a_cpu_tells_numbers_without_a_wait():
    assert counts_are_known(torch.zeros(1)) and not counts_are_known(torch.zeros(1, device="meta"))
