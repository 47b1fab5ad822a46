import pytest
import torch
from torch import nn

from swin_dense.heads.batch_norm import BatchNorm


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (0, 3, 5, 7)])
def test_batch_norm_of_no_statistics_uses_and_keeps_the_running_ones(shape):
    norm, plain = BatchNorm(3), nn.BatchNorm2d(3)
    for module in (norm, plain):
        module.running_mean.copy_(torch.tensor([1.0, 2, 3]))
        module.running_var.copy_(torch.tensor([4.0, 5, 6]))
    x = torch.rand(shape)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    y = norm.train()(x)
    assert torch.equal(y, plain.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    y.sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2), (2, 3, 5, 7)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs_everywhere_else(shape, training):
    norm, plain = BatchNorm(3).train(training), nn.BatchNorm2d(3).train(training)
    x = torch.rand(shape)
    assert torch.equal(norm(x), plain(x))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in norm.state_dict().items())
