import pytest
import torch
from torch import nn

from swin_dense.errors import ConfigError
from swin_dense.training.weight_average import WeightAverage


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 5))
    model[3].weight = model[0].weight  # shared
    return model.double()


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bits(model):
    return {name: tensor.view(torch.int64) for name, tensor in copied(model).items()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def move(model, seed):
    """As an update does: new weights, and new running statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        model[1](model[0](torch.rand(7, 3, generator=generator, dtype=torch.float64)))


def averaged(average, model):
    with average.applied():
        return copied(model)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9998])
def test_average_follows_its_formula(decay):
    model = make_model()
    average, expected = WeightAverage(model, decay), copied(model)
    for update in range(12):
        move(model, update)
        average.update()
        d = min(decay, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            whole = not value.is_floating_point()
            expected[name] = value.clone() if whole else d * expected[name] + (1 - d) * value
    found = averaged(average, model)
    assert average.updates == 12 and int(found["1.num_batches_tracked"]) == 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_average_of_what_never_changes_is_that_bit_for_bit():
    model = make_model()
    model[2].requires_grad_(False)
    average = WeightAverage(model, 0.99)
    for update in range(30):
        move(model, update)
        average.update()
    found = averaged(average, model)
    assert torch.equal(found["2.weight"], model[2].weight) and not torch.equal(found["0.weight"], model[0].weight)


def test_model_gets_its_own_weights_back_bit_for_bit():
    model = make_model()
    model[0].bias.data[:] = torch.tensor([-0.0, float("nan"), float("inf"), 5e-324, 1.0], dtype=torch.float64)
    average = WeightAverage(model, 0.9)
    move(model, 1)
    average.update()
    before, places = bits(model), [tensor.data_ptr() for tensor in model.parameters()]
    with pytest.raises(KeyError), average.applied():
        assert not torch.equal(bits(model)["0.weight"], before["0.weight"]) and model[3].weight is model[0].weight
        raise KeyError
    assert_same(bits(model), before)
    assert places == [tensor.data_ptr() for tensor in model.parameters()]


def test_applying_leaves_the_average_as_it_is():
    model = make_model()
    average = WeightAverage(model, 0.9)
    for update in range(3):
        move(model, update)
        average.update()
    assert_same(averaged(average, model), averaged(average, model))


def test_what_is_written_while_applied_stays_in_the_average():
    model = make_model()
    average = WeightAverage(model, 0.9)
    with average.applied():
        model[1].running_mean.fill_(7.0)
    assert model[1].running_mean.eq(0.0).all()
    assert averaged(average, model)["1.running_mean"].eq(7.0).all()


def test_restored_average_goes_on_bit_for_bit():
    model = make_model()
    average = WeightAverage(model, 0.8)
    move(model, 1)
    average.update()
    state = average.state_dict()
    saved = {
        "updates": state["updates"],
        "tensors": {name: tensor.clone() for name, tensor in state["tensors"].items()},
    }
    weights = copied(model)
    other_model = make_model(seed=5)
    other = WeightAverage(other_model, 0.8)
    other.load_state_dict(saved)
    other_model.load_state_dict(weights)
    for each_model, each in ((model, average), (other_model, other)):
        move(each_model, 2)
        each.update()
    assert_same(averaged(average, model), averaged(other, other_model))
    assert other.updates == 2


def test_restarted_average_is_the_model():
    model = make_model()
    average = WeightAverage(model, 0.8)
    move(model, 1)
    average.update()
    average.restart()
    assert average.updates == 0
    assert_same(averaged(average, model), copied(model))


def test_average_holds_a_shared_parameter_once():
    assert "3.weight" not in WeightAverage(make_model(), 0.8).state_dict()["tensors"]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_average_refuses_a_decay_out_of_range(decay):
    with pytest.raises(ConfigError, match="must be at least 0 and below 1, got"):
        WeightAverage(make_model(), decay)
