import copy

import pytest
import torch

from swin_dense.classification import classifier
from swin_dense.compilation import compile, compiled_calls
from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.heads import mask_rcnn, upernet
from swin_dense.swin import SwinTransformer

TINY = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 1, 1), window_size=3, drop_path_rate=0.0)


@pytest.fixture
def backend():
    torch.compiler.reset()

    def keep(graph, _):
        keep.graphs.append(graph)
        return graph.forward

    keep.graphs = []
    yield keep
    assert keep.graphs
    torch.compiler.reset()


def backbone(seed=0):
    torch.manual_seed(seed)
    return SwinTransformer(TINY).eval()


def random_images(height, width):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))


def test_results_names_and_copies_stay(backend):
    plain, model = backbone(), backbone()
    assert compile(model, backend=backend) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    images = random_images(37, 29)
    for name, value in plain(images).items():
        assert torch.allclose(model(images)[name], value, atol=1e-5)
        assert torch.allclose(copy.deepcopy(model)(images)[name], value, atol=1e-5)


def test_each_size_is_compiled_once_and_no_more_than_said(backend):
    model = compile(backbone(), max_sizes=2, backend=backend)
    with torch.no_grad():
        model(random_images(31, 23))
        model(random_images(31, 23))
        model(random_images(23, 31))
        with pytest.warns(UserWarning, match="SwinTransformer was compiled for 2 sizes of images; others run"):
            third = model(random_images(29, 29))
        model(random_images(41, 29))
        model(random_images(23, 31))
    assert compiled_calls(model) == {"": {"compiled sizes": 2, "compiled calls": 4, "other calls": 2}}
    assert torch.equal(third["c2"], backbone()(random_images(29, 29))["c2"])


def test_training_counts_as_a_kind_of_its_own(backend):
    model = compile(classifier(TINY, num_classes=3), backend=backend)
    model.train()(random_images(32, 32)).sum().backward()
    with torch.no_grad():
        model.eval()(random_images(32, 32))
    assert compiled_calls(model)[""]["compiled sizes"] == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_on_a_cpu_attention_is_one_operator_with_all_gradients(backend):
    plain, model = backbone(), backbone()
    compile(model, fullgraph=True, backend=backend)
    images, seen = random_images(37, 29), []
    for one in (plain, model):
        loss = sum(stage_map.sin().sum() for stage_map in one(images).values())
        seen.append(torch.autograd.grad(loss, list(one.parameters())))
    for got, wanted in zip(seen[1], seen[0], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    (graph,) = backend.graphs
    code = graph.print_readable(False)
    assert "gathered_window_attention" in code and "roll" not in code


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at inputs' own
def test_segmenters_train_and_predict_with_their_parts_compiled(backend):
    torch.manual_seed(0)
    plain = upernet(TINY, num_classes=4, channels=8, auxiliary_channels=8, dropout=0.0)
    model = compile(copy.deepcopy(plain), backend=backend)
    images, labels = random_images(40, 33), torch.randint(0, 4, (2, 40, 33))
    for name, loss in plain(images, labels).items():
        assert float(model(images, labels)[name].detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    model.eval().predict_labels(images)
    assert list(compiled_calls(model)) == ["backbone", "decode_head", "auxiliary_head"]
    assert compiled_calls(model)["decode_head"]["compiled sizes"] == 2


def test_detectors_detect_with_backbone_and_pyramid_compiled(backend):
    torch.manual_seed(0)
    plain = mask_rcnn(TINY, num_classes=2, fpn_channels=8, box_head_channels=8, mask_head_channels=8).eval()
    model = compile(copy.deepcopy(plain), backend=backend)
    images = [random_images(45, 61)[0]]
    with torch.no_grad():
        assert torch.allclose(model(images)[0]["scores"], plain(images)[0]["scores"], atol=1e-5)
    assert {name: calls["compiled calls"] for name, calls in compiled_calls(model).items()} == {"backbone": 1, "fpn": 1}


def test_models_that_were_not_compiled_have_no_calls():
    assert compiled_calls(backbone()) == {}


def test_bound_below_one_is_refused():
    with pytest.raises(ConfigError, match="max_sizes must be at least 1, got 0"):
        compile(backbone(), max_sizes=0)
