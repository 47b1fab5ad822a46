import torch
from torch.utils.flop_counter import FlopCounterMode

from swin_dense.watched import operations_are_watched


def test_only_what_sees_operations_watches():
    assert not operations_are_watched()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert not operations_are_watched()
    with FlopCounterMode(display=False):
        assert operations_are_watched()
    with torch.autograd.forward_ad.dual_level():
        assert operations_are_watched()
    assert not operations_are_watched()


def test_transforming_watches():
    seen = torch.func.vmap(lambda x: x * (2 if operations_are_watched() else 3))(torch.ones(3))
    assert seen.tolist() == [2.0] * 3
    assert torch.func.grad(lambda x: x * (2 if operations_are_watched() else 3))(torch.tensor(1.0)) == 2


def test_exporting_watches_and_compiling_does_not():
    class Scaled(torch.nn.Module):
        def forward(self, x):
            return x * (2 if operations_are_watched() else 3)

    one = torch.ones(1)
    assert torch.export.export(Scaled(), (one,)).module()(one) == 2
    assert torch.compile(Scaled(), fullgraph=True, backend="eager")(one) == 3
