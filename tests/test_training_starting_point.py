import random

import pytest
import torch
from torch import nn

from swin_dense.training.starting_point import StartingPoint, running_statistics


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_going_back_undoes_a_forward_pass(value):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = StartingPoint.of(model)
    first = model(torch.full((2, 2, 5, 3), value)), random.random()
    assert not torch.equal(model[1].running_var, before["1.running_var"])
    start.go_back()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = model(torch.full((2, 2, 5, 3), value)), random.random()
    assert torch.equal(first[0], again[0]) or value != value
    assert first[1] == again[1]


def test_running_statistics_are_those_of_batch_norms():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2), nn.BatchNorm2d(3, track_running_stats=False))
    model.register_buffer("table", torch.zeros(4))
    assert [tensor.shape for tensor in running_statistics(model)] == [(2,), (2,), ()]
