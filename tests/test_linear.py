import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from swin_dense import linear as module
from swin_dense.linear import apply_linear, linear, onednn_is_right

ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest value


@pytest.fixture
def products(monkeypatch):
    """The dtypes of the products that oneDNN was asked for, where it is."""
    assert all(onednn_is_right(dtype) in (True, False) for dtype in ALLOWED)
    asked, product = [], module._product

    def counted(x, weight, bias, gelu):
        asked.append(x.dtype)
        return product(x, weight, bias, gelu)

    monkeypatch.setattr(module, "_product", counted)
    return asked


@pytest.fixture
def onednn(products):
    if not onednn_is_right(torch.float32):
        pytest.skip("no oneDNN")
    return products


def values(dtype=torch.float32, shape=(2, 3, 5, 7), channels=11):
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (channels, shape[-1]), (channels,)
    return [torch.randn(each, generator=generator).to(dtype).requires_grad_() for each in shapes]


def published(x, weight, bias, gelu):
    x = functional.linear(x, weight, bias)
    return functional.gelu(x) if gelu else x


def assert_near(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert (got - wanted).abs().max() <= ALLOWED[got.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_value_and_gradients_are_the_published(dtype, gelu, has_bias, products):
    x, weight, bias = values(dtype)
    inputs = [x, weight, bias][: 2 + has_bias]
    bias = bias if has_bias else None
    wanted, got = published(x, weight, bias, gelu), linear(x, weight, bias, gelu)
    assert_near(got, wanted)
    direction = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
    ):
        assert_near(one, other)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_near(linear(x, weight, bias, gelu), wanted)
    assert set(products) == ({dtype} if onednn_is_right(dtype) else set())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_wanted_gradients_are_made(wanted):
    inputs = [value.requires_grad_(index in wanted) for index, value in enumerate(values())]
    direction = torch.ones(2, 3, 5, 11)
    got = torch.autograd.grad(linear(*inputs), [inputs[index] for index in wanted], direction)
    others = torch.autograd.grad(functional.linear(*inputs), [inputs[index] for index in wanted], direction)
    for one, other in zip(got, others, strict=True):
        assert_near(one, other)


def test_gradients_have_gradients():
    seconds = []
    for function in (linear, functional.linear):
        inputs = values()
        gradients = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(each.square().sum() for each in gradients), inputs))
    for one, other in zip(*seconds, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change", [lambda x: x.transpose(0, 2), lambda x: x[:, ::2], lambda x: x[0, 0, 0], lambda x: x[:0]]
)
def test_inputs_of_any_layout(change):
    x, weight, bias = values()
    with torch.no_grad():
        wanted, got = functional.linear(change(x), weight, bias), linear(change(x), weight, bias)
    assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_forward(layer, forward):
    layer.forward = forward
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.Sequential(layer, nn.ReLU()),
        lambda layer: Doubled(7, 11),
        lambda layer: with_forward(layer, lambda x: x.sum(dim=-1)),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: layer.register_forward_hook(lambda _, x, y: y + 1) and layer,
        lambda layer: layer.register_forward_pre_hook(lambda _, x: (x[0] + 1,)) and layer,
    ],
)
def test_whatever_stands_in_a_layers_place_is_called(change):
    torch.manual_seed(0)
    layer = change(nn.Linear(7, 11))
    x = torch.randn(5, 7)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(apply_linear(layer, x), layer(x))
            assert torch.equal(apply_linear(layer, x, gelu=True), functional.gelu(layer(x)))


def test_plain_layers_are_computed_by_onednn(onednn):
    layer = pickle.loads(pickle.dumps(copy.deepcopy(nn.Linear(7, 11))))
    x = torch.randn(5, 7)
    with torch.no_grad():
        assert_near(apply_linear(layer, x, gelu=True), functional.gelu(layer(x)))
    assert onednn == [torch.float32]


def test_new_weights_are_used_at_once():
    layer, x = nn.Linear(7, 11), torch.randn(5, 7)
    with torch.no_grad():
        apply_linear(layer, x)
        layer.weight.data.mul_(3)
        assert_near(apply_linear(layer, x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_who_watches_or_transforms_sees_the_published_operations(onednn):
    x, weight, bias = (value.detach() for value in values(shape=(5, 7)))
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 5 * 7 * 11
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    assert torch.equal(torch.func.vmap(linear, (0, None, None))(x, weight, bias), functional.linear(x, weight, bias))
    slope = torch.func.grad(lambda x: linear(x, weight, bias).sum())(x)
    assert torch.allclose(slope, weight.sum(dim=0).expand(5, -1), atol=1e-5)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), weight, bias)).tangent
    assert torch.allclose(moved, x @ weight.t(), atol=1e-5)
    assert onednn == []


def test_onednn_switched_off_is_not_used(onednn, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    inputs = values()
    assert torch.equal(linear(*inputs), functional.linear(*inputs)) and onednn == []


def test_exporting_sees_the_published_operations():
    graph = str(torch.export.export(Applied(nn.Linear(7, 11)), (torch.randn(5, 7),)).graph)
    assert "mkldnn" not in graph and "swin_dense" not in graph


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_compiled_it_is_one_operator(context, onednn):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer, x, graphs = nn.Linear(7, 11), torch.randn(5, 7), []
    compiled = torch.compile(
        Applied(layer), fullgraph=True, backend=lambda graph, _: graphs.append(graph.print_readable(False)) or graph
    )
    with context():
        assert_near(compiled(x), functional.gelu(layer(x)))
        (graph,) = graphs
        assert "swin_dense.linear" in graph
        if torch.is_grad_enabled():
            inputs = list(layer.parameters())
            got, wanted = compiled(x).square().sum(), functional.gelu(layer(x)).square().sum()
            for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
                assert_near(one, other)
    torch.compiler.reset()


class Applied(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return apply_linear(self.layer, x, gelu=True)


def test_wrong_sizes_are_refused_as_published():
    x, weight, bias = values()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[..., :5], weight, bias)


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_product_that_fails_its_trial_is_not_used(fault, monkeypatch):
    def product(x, weight, bias, gelu):
        if fault == "missing":
            raise AttributeError("no such operator")
        return functional.linear(x, weight, bias) * 1.01

    monkeypatch.setattr(module, "_product", product)
    x, weight, bias = values()
    module._trial.cache_clear()
    try:
        assert not onednn_is_right(torch.float32)
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    finally:
        module._trial.cache_clear()
