import math
import pickle

import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.heads.upernet import upernet
from swin_dense.tools.validation_losses import ValidationLosses, with_total
from swin_dense.training.loss_terms import LossTerm

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)


def term(mean, count):
    return LossTerm(torch.tensor(mean), count)


def collected(images):
    losses = ValidationLosses()
    for index, terms in images.items():
        losses.add(index, terms)
    return losses


def test_losses_of_the_set_are_those_of_one_batch():
    torch.manual_seed(0)
    segmenter = upernet(TINY, 3, channels=8, auxiliary_channels=8).double().eval()
    images, labels = torch.rand(5, 3, 17, 23).double(), torch.randint(0, 3, (5, 17, 23))
    with torch.no_grad():
        alone = [segmenter.loss_terms(image[None], label[None]) for image, label in zip(images, labels, strict=True)]
        wanted = segmenter(images, labels)
    found = collected(dict(enumerate(alone))).means()
    assert found == {name: pytest.approx(float(loss), rel=1e-12) for name, loss in wanted.items()}


def test_an_image_weighs_as_much_as_it_counts():
    images = {0: {"a": term(2.0, 3), "b": term(0.0, 0)}, 1: {"a": term(6.0, 1), "b": term(5.0, 7)}}
    assert collected(images).means() == {"a": 3.0, "b": 5.0}
    assert collected({0: images[0]}).means() == {"a": 2.0, "b": 0.0}
    assert ValidationLosses().means() == {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
def test_shares_of_processes_merge_to_the_same_bits(world_size):
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(11)
    images = {
        index: {"a": LossTerm(scale * torch.rand((), generator=generator), index + 1)}
        for index, scale in enumerate(scales)
    }
    parts = [collected({index: images[index] for index in range(rank, 11, world_size)}) for rank in range(world_size)]
    first, *others = parts[::-1]
    for other in others:
        first.merge(pickle.loads(pickle.dumps(other)))
    assert first.means() == collected(images).means()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_hidden(bad):
    losses = collected({0: {"a": term(bad, 2), "b": term(1.0, 1)}, 1: {"a": term(-math.inf, 1), "b": term(1.0, 1)}})
    assert math.isnan(losses.means()["a"]) and losses.means()["b"] == 1.0


def test_the_sum_stands_before_its_parts():
    assert list(with_total({"loss_a": 1.0, "loss_b": 0.25}).items()) == [
        ("loss", 1.25),
        ("loss_a", 1.0),
        ("loss_b", 0.25),
    ]
    assert with_total({}) == {}
