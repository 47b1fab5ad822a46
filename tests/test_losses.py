import math

import pytest
import torch
from torch.nn import functional

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.heads import losses
from swin_dense.heads.losses import (
    classification_loss,
    mask_loss,
    offset_loss,
    overlap_loss,
    proposal_losses,
    segmentation_loss,
    upsampled_segmentation_loss,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def binary_cross_entropy(logit, target):
    return math.log(1 + math.exp(-logit)) if target else math.log(1 + math.exp(logit))


def cross_entropy(logits, label):
    return math.log(sum(map(math.exp, logits))) - logits[label]


def test_proposal_losses_follow_the_closed_form():
    logits, deltas, wanted = random(11), random(11, 4, seed=1), random(11, 4, seed=2)
    labels = torch.tensor([1.0, 0, -1, 1, 0, 0, -1, 1, 0, 0, 0])
    objectness_loss, box_loss = proposal_losses(logits, deltas, labels, wanted)
    samples = [row for row in range(11) if labels[row] >= 0]
    entropy = sum(binary_cross_entropy(float(logits[row]), int(labels[row])) for row in samples)
    distance = sum(float((deltas[row] - wanted[row]).abs().sum()) for row in (0, 3, 7))
    assert float(objectness_loss) == pytest.approx(entropy / 9)
    assert float(box_loss) == pytest.approx(distance / 9)


def test_proposal_losses_without_samples_or_objects_are_zero_with_gradients():
    logits, deltas = random(5).requires_grad_(), random(5, 4).requires_grad_()
    losses = proposal_losses(logits, deltas, torch.full((5,), -1), torch.full((5, 4), -math.inf))
    assert [float(loss.detach()) for loss in losses] == [0.0, 0.0]
    sum(losses).backward()
    assert not logits.grad.any() and not deltas.grad.any()


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_proposal_box_loss_is_a_parabola_below_beta_and_a_line_above(beta):
    deltas, wanted = random(5, 4), random(5, 4, seed=1)
    _, loss = proposal_losses(random(5), deltas, torch.ones(5), wanted, beta)
    gaps = (deltas - wanted).abs().flatten().tolist()
    distance = sum(gap * gap / (2 * beta) if gap < beta else gap - beta / 2 for gap in gaps)
    assert min(gaps) < beta < max(gaps) or beta == 0
    assert float(loss) == pytest.approx(distance / 5)


def test_classification_loss_follows_the_closed_form():
    logits, labels = random(7, 4), torch.tensor([0, 3, 1, 0, 2, 0, 3])
    entropy = sum(cross_entropy(row.tolist(), label) for row, label in zip(logits, labels.tolist(), strict=True))
    assert float(classification_loss(logits, labels)) == pytest.approx(entropy / 7)
    with_empty_places = torch.cat((logits, random(2, 4, seed=1))), torch.cat((labels, torch.tensor([-1, -1])))
    assert float(classification_loss(*with_empty_places)) == pytest.approx(entropy / 7)


def test_offset_loss_is_the_distance_of_the_objects_over_all_samples():
    deltas, wanted, labels = random(7, 4), random(7, 4, seed=1), torch.tensor([2, 0, -1, 1, 0, -1, 0])
    distance = sum(float((deltas[row] - wanted[row]).abs().sum()) for row in (0, 3))
    assert float(offset_loss(deltas, wanted, labels)) == pytest.approx(distance / 5)


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_losses_and_gradients_do_not_look_at_the_targets_of_empty_places(nothing):
    deltas, labels = random(3, 4).requires_grad_(), torch.tensor([1, 0, -1])
    wanted = torch.where(labels[:, None] > 0, random(3, 4, seed=1), nothing)
    (offset_loss(deltas, wanted, labels) + sum(proposal_losses(random(3), deltas, labels, wanted))).backward()
    assert deltas.grad[0].all() and not deltas.grad[1:].any()
    masks, pixels = random(3, 2, 4, 4).requires_grad_(), (random(3, 4, 4) > 0).double()
    mask_loss(masks, labels, pixels).backward()
    assert masks.grad[0, 1].all() and not masks.grad[0, 0].any() and not masks.grad[1:].any()


def slow_giou(one, other):
    """From the definition, box by box."""

    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    corners = [max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])]
    hull = [min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])]
    union = area(*one) + area(*other) - area(*corners)
    return area(*corners) / union - (area(*hull) - union) / area(*hull)


def test_overlap_loss_follows_the_definition():
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 4, 20, 9], [50, 50, 51, 60], [0, 0, 1000, 700]]).double()
    wanted = torch.tensor([[5.0, 2, 12, 30], [3, 4, 20, 9], [0, 0, 7, 5], [10, 20, 30, 40]]).double()
    distances = [1 - slow_giou(one, other) for one, other in zip(boxes.tolist(), wanted.tolist(), strict=True)]
    assert distances[1] == 0 and distances[2] > 1  # equal, and apart
    assert float(overlap_loss(boxes, wanted, 9)) == pytest.approx(sum(distances) / 9, rel=1e-6)


def test_overlap_loss_of_perfect_boxes_is_zero():
    boxes = torch.rand(5, 2).mul(90).repeat(1, 2) + torch.tensor([0.0, 0, 7, 11])
    assert float(overlap_loss(boxes, boxes, 5)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_samples", [0, 5])
def test_box_losses_without_objects_are_zero_with_gradients(num_samples):
    predicted = torch.zeros(0, 4, requires_grad=True)
    overlap_loss(predicted, torch.zeros(0, 4), num_samples).backward()
    offsets = random(num_samples, 4).requires_grad_()
    value = offset_loss(offsets, offsets.detach() + 1, torch.zeros(num_samples))
    value.backward()
    assert float(value.detach()) == 0.0 and not offsets.grad.any() and predicted.grad is not None


def test_classification_loss_without_samples_is_zero_with_gradients():
    logits = torch.zeros(0, 3, requires_grad=True)
    value = classification_loss(logits, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert float(value.detach()) == 0.0 and logits.grad is not None


def test_mask_loss_is_the_mean_entropy_of_the_true_class():
    logits, labels = random(3, 5, 4, 4), torch.tensor([1, 4, 2])
    targets = (random(3, 4, 4, seed=3) > 0).double()
    wanted = [
        binary_cross_entropy(float(logits[n, labels[n], i, j]), bool(targets[n, i, j]))
        for n in range(3)
        for i in range(4)
        for j in range(4)
    ]
    assert float(mask_loss(logits, labels, targets)) == pytest.approx(sum(wanted) / len(wanted))


def test_mask_loss_without_objects_is_zero_with_gradients():
    logits = torch.zeros(0, 5, 4, 4, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4))
    loss.backward()
    assert float(loss.detach()) == 0.0 and logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_segmentation_loss_counts_all_pixels_in_the_mean(dtype):
    logits = random(2, 3, 3, 5)
    labels = torch.randint(0, 3, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 1:] = IGNORED_LABEL
    wanted = sum(
        cross_entropy(logits[n, :, i, j].tolist(), int(labels[n, i, j]))
        for n in range(2)
        for i in range(3)
        for j in range(5)
        if labels[n, i, j] != IGNORED_LABEL
    )
    assert float(segmentation_loss(logits, labels.to(dtype))) == pytest.approx(wanted / 30)


def test_segmentation_loss_does_not_look_at_ignored_pixels():
    logits, labels = random(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[:, 2:] = IGNORED_LABEL
    changed = logits.clone()
    changed[:, :, 2:] = 99.0
    assert segmentation_loss(changed, labels) == segmentation_loss(logits, labels)


def test_segmentation_loss_of_ignored_pixels_only_is_zero_with_zero_gradient():
    logits = random(2, 3, 5, 7).requires_grad_()
    loss = segmentation_loss(logits, torch.full((2, 5, 7), IGNORED_LABEL))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not logits.grad.any()


# ---- Logits at another size than the labels.

SIZES = [((7, 11), (28, 44)), ((7, 11), (29, 41)), ((1, 1), (5, 3)), ((13, 3), (7, 31)), ((7, 5), (7, 5))]


@pytest.fixture(params=[1, 2**30])
def tiles(request, monkeypatch):
    """As small as they may be, so that there are several, or one that holds all images."""
    monkeypatch.setitem(losses.TILE_VALUES, "cpu", request.param)


def labels_of(size_hw, num_classes, count=2, dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, num_classes, (count, *size_hw), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED_LABEL
    return labels.to(dtype)


def enlarged_loss(logits, labels):
    size_hw = tuple(labels.shape[1:])
    return segmentation_loss(functional.interpolate(logits, size_hw, mode="bilinear", align_corners=False), labels)


def with_gradient(loss_of, logits, labels, factor=1.0):
    logits = logits.clone().requires_grad_()
    loss = loss_of(logits, labels)
    (factor * loss).backward()
    return loss.detach(), logits.grad


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("num_classes", [1, 3, 150])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_upsampled_segmentation_loss_is_that_of_enlarged_logits_with_its_gradient(size_in, size_out, num_classes):
    logits, labels = random(2, num_classes, *size_in), labels_of(size_out, num_classes)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        logits = logits.contiguous(memory_format=memory_format)
        for one, other in zip(
            with_gradient(upsampled_segmentation_loss, logits, labels),
            with_gradient(enlarged_loss, logits, labels),
            strict=True,
        ):
            assert one.shape == other.shape and float((one - other).abs().max()) < 1e-12
    with torch.no_grad():
        assert upsampled_segmentation_loss(logits, labels) == upsampled_segmentation_loss(
            logits.clone().requires_grad_(), labels
        )


@pytest.mark.usefixtures("tiles")
def test_upsampled_segmentation_loss_has_the_gradient_of_finite_differences():
    logits, labels = random(2, 3, 3, 4).requires_grad_(), labels_of((17, 19), 3)
    assert torch.autograd.gradcheck(lambda logits: upsampled_segmentation_loss(logits, labels), logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_upsampled_segmentation_loss_takes_labels_of_any_integers(dtype):
    logits, labels = random(2, 5, 7, 11), labels_of((29, 41), 5)
    assert upsampled_segmentation_loss(logits, labels.to(dtype)) == upsampled_segmentation_loss(logits, labels)


def test_upsampled_segmentation_loss_may_be_scaled_and_used_twice():
    logits, labels = random(2, 5, 7, 11), labels_of((29, 41), 5)
    _, gradient = with_gradient(upsampled_segmentation_loss, logits, labels)
    _, scaled = with_gradient(upsampled_segmentation_loss, logits, labels, factor=-0.4)
    assert torch.allclose(scaled, -0.4 * gradient, rtol=1e-12, atol=0)
    logits.requires_grad_()
    loss = upsampled_segmentation_loss(logits, labels)
    loss.backward(retain_graph=True)
    (loss * loss).backward()
    assert torch.allclose(logits.grad, (1 + 2 * loss.detach()) * gradient, rtol=1e-12, atol=0)


def test_upsampled_segmentation_loss_of_ignored_pixels_only_is_zero_with_zero_gradient():
    loss, gradient = with_gradient(upsampled_segmentation_loss, random(2, 3, 5, 7), torch.full((2, 21, 27), 255))
    assert float(loss) == 0 and not gradient.any()


def test_upsampled_segmentation_loss_under_autocast_is_that_of_its_logits_in_float32():
    logits, labels = random(2, 5, 7, 11).bfloat16(), labels_of((29, 41), 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = with_gradient(upsampled_segmentation_loss, logits, labels)
    wanted, wanted_gradient = with_gradient(enlarged_loss, logits.double(), labels)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert gradient.dtype == torch.bfloat16 and torch.allclose(gradient.double(), wanted_gradient, rtol=4e-3, atol=1e-9)


def test_upsampled_segmentation_loss_is_finite_where_a_label_is_certain_or_impossible():
    labels = torch.zeros(1, 12, 12).long()
    for logit in (300.0, -300.0):
        logits = torch.tensor([logit, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
        loss, gradient = with_gradient(upsampled_segmentation_loss, logits, labels)
        assert float(loss) == pytest.approx(max(-logit, 0))
        assert float(gradient.sum(dim=(2, 3))[0, 0]) == pytest.approx(min(logit, 0) / 300)


def test_upsampled_segmentation_loss_has_no_second_gradient():
    logits, labels = random(1, 3, 3, 4).requires_grad_(), labels_of((7, 9), 3, count=1)
    (gradient,) = torch.autograd.grad(upsampled_segmentation_loss(logits, labels), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        gradient.sum().backward()


def test_upsampled_segmentation_loss_never_makes_all_logits(monkeypatch):
    monkeypatch.setitem(losses.TILE_VALUES, "cpu", 2**12)
    seen = []
    cross_entropy = losses._cross_entropy
    monkeypatch.setattr(losses, "_cross_entropy", lambda x, *rest: seen.append(x.numel()) or cross_entropy(x, *rest))
    upsampled_segmentation_loss(random(2, 5, 32, 32), labels_of((128, 128), 5))
    assert max(seen) <= 2**12 and sum(seen) == 2 * 5 * 128 * 128


def test_upsampled_segmentation_loss_compiles_without_breaks():
    torch.compiler.reset()
    compiled = torch.compile(upsampled_segmentation_loss, fullgraph=True, backend="aot_eager")
    logits, labels = random(2, 5, 7, 11), labels_of((29, 41), 5)
    for one, other in zip(
        with_gradient(compiled, logits, labels), with_gradient(upsampled_segmentation_loss, logits, labels), strict=True
    ):
        assert torch.equal(one, other)
    torch.compiler.reset()
