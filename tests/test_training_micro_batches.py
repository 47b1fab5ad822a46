import pytest
import torch
from torch import nn

from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import add_gradient, add_gradient_in_parts, even_slices
from swin_dense.training.starting_point import StartingPoint


class Numbers:
    """Images are rows, some of which have objects: the ones below 0.5."""

    def __init__(self, rows):
        self.rows = rows

    def split(self, parts):
        return [Numbers(self.rows[part]) for part in even_slices(len(self.rows), parts)]


def rows_of(count, dtype=torch.float64):
    return Numbers(torch.rand(count, 3, generator=torch.Generator().manual_seed(4), dtype=dtype))


def losses_with(model):
    """One mean over all rows, one over the few that have objects, one over nothing."""

    def losses(batch):
        output = model(batch.rows).square()
        objects = output[batch.rows[:, 0] < 0.5]
        return {
            "all": LossTerm(output.mean(), len(output)),
            "objects": LossTerm(0.3 * objects.sum() / max(1, len(objects)), len(objects)),
            "nothing": LossTerm(output.sum() * 0, 0),
        }

    return losses


@pytest.mark.parametrize("count", [0, 1, 5, 7])
@pytest.mark.parametrize("parts", [1, 2, 5, 11])
def test_even_slices_are_a_partition(count, parts):
    slices = list(even_slices(count, parts))
    assert [index for part in slices for index in range(count)[part]] == list(range(count))
    lengths = [len(range(count)[part]) for part in slices]
    assert len(slices) == max(1, min(parts, count)) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_add_up_to_the_gradient_and_the_losses_of_the_whole(parts):
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2).double(), rows_of(7)
    for divisor in (1, 3):
        whole = add_gradient(losses_with(model), batch, divisor)
        expected = model.weight.grad.clone()
        model.zero_grad()
        in_parts = add_gradient_in_parts(losses_with(model), batch.split(parts), divisor, lambda: None)
        torch.testing.assert_close(model.weight.grad, expected, rtol=0, atol=1e-14)
        assert {name: float(loss) for name, loss in in_parts.items()} == pytest.approx(
            {name: float(loss) for name, loss in whole.items()}, abs=1e-14
        )
        assert not any(loss.requires_grad for loss in (*whole.values(), *in_parts.values()))
        model.zero_grad()


def test_gradients_add_to_those_that_are_there():
    model, batch = nn.Linear(3, 2).double(), rows_of(5)
    add_gradient(losses_with(model), batch, 1)
    once = model.weight.grad.clone()
    add_gradient_in_parts(losses_with(model), batch.split(2), 1, lambda: None)
    torch.testing.assert_close(model.weight.grad, 2 * once, rtol=0, atol=1e-14)


def test_both_passes_see_the_same_random_numbers_and_statistics_move_once():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).double()
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    start = StartingPoint.of(model)
    add_gradient_in_parts(losses_with(model), rows_of(7).split(2), 1, start.go_back)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert int(model[0].num_batches_tracked) == 2
