import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from swin_dense.heads.views import View, logits_in_original, mean_probabilities

SIZE_HW = (53, 97)


def image_of(size_hw, seed=0):
    return torch.rand(3, *size_hw, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes_in(size_hw, count=11):
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, count, 2, generator=generator, dtype=torch.float64) * torch.tensor(size_hw[::-1])
    return torch.cat((first.minimum(second), first.maximum(second)), dim=1)


VIEWS = [View(image_of((31, 59))), View(image_of((31, 59)), is_flipped=True), View(image_of((101, 203)))]


@pytest.mark.parametrize("view", VIEWS)
def test_boxes_go_to_the_original_and_back(view):
    boxes = boxes_in(view.size_hw)
    original = view.boxes_to_original(boxes, SIZE_HW)
    assert (original >= 0).all() and (original <= torch.tensor([97, 53, 97, 53])).all()
    assert (original[:, 2:] > original[:, :2]).all()
    assert torch.allclose(view.boxes_from_original(original, SIZE_HW), boxes, atol=1e-9)


def test_box_of_the_view_is_that_of_the_original():
    whole = torch.tensor([[0.0, 0, 59, 31]])
    left_half = torch.tensor([[0.0, 0, 29.5, 31]])
    for view in VIEWS[:2]:
        assert torch.allclose(view.boxes_to_original(whole, SIZE_HW), torch.tensor([[0.0, 0, 97, 53]]))
    assert torch.allclose(VIEWS[0].boxes_to_original(left_half, SIZE_HW), torch.tensor([[0.0, 0, 48.5, 53]]))
    assert torch.allclose(VIEWS[1].boxes_to_original(left_half, SIZE_HW), torch.tensor([[48.5, 0, 97, 53]]))


def test_boxes_that_reach_over_the_view_are_cut_at_the_border_of_the_original():
    boxes = VIEWS[0].boxes_to_original(torch.tensor([[-9.0, 4, 90, 99]]), SIZE_HW)
    assert boxes[0, 0] == 0 and boxes[0, 2:].tolist() == [97, 53]


def test_flipping_twice_changes_nothing():
    view = VIEWS[0].flipped()
    assert view.is_flipped and torch.equal(view.unflipped(view.image), VIEWS[0].image)
    assert not view.flipped().is_flipped and torch.equal(view.flipped().image, VIEWS[0].image)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 3, padding=1).double().requires_grad_(False)


def test_logits_of_a_flipped_view_are_those_of_the_view_where_the_model_is_symmetric(model):
    model.weight.data += model.weight.data.flip(3)
    view = VIEWS[0]
    logits = [logits_in_original(one, model, SIZE_HW) for one in (view, view.flipped())]
    assert logits[0].shape == (5, *SIZE_HW) and (logits[0] - logits[1]).abs().max() < 1e-12
    assert logits[0].std() > 0.01


def test_mean_is_that_of_the_probabilities_at_the_original_size(model):
    views = [View(image_of(size_hw), flipped) for size_hw in ((31, 59), (67, 131)) for flipped in (False, True)]
    total = 0
    for view in views:
        logits = model(view.image[None])
        logits = logits.flip(3) if view.is_flipped else logits
        total = total + interpolate(logits, size=SIZE_HW, mode="bilinear", align_corners=False)[0].softmax(dim=0)
    mean = mean_probabilities(iter(views), model, SIZE_HW)
    assert (mean - total / 4).abs().max() < 1e-12
    assert torch.allclose(mean.sum(dim=0), torch.ones(()).double())
    assert (mean_probabilities(views[::-1], model, SIZE_HW) - mean).abs().max() < 1e-12


def test_equal_views_have_their_own_mean(model):
    view = VIEWS[0]
    one, three = (mean_probabilities([view] * count, model, SIZE_HW) for count in (1, 3))
    assert torch.equal(one, logits_in_original(view, model, SIZE_HW).softmax(dim=0))
    assert (three - one).abs().max() < 1e-12
