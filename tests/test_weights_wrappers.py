import copy

import pytest
import torch
from torch import nn

from swin_dense.errors import CheckpointError
from swin_dense.weights.wrappers import unwrap_weights


def state(value=1.0):
    return {"layers.0.weight": torch.full((2, 3), value), "norm.bias": torch.full((3,), value)}


def value_of(found):
    assert found.tensors.keys() == state().keys()
    return found.tensors["norm.bias"][0].item()


@pytest.mark.parametrize(
    ("content", "wrapper"),
    [
        (state(), ""),
        ({"model": state()}, "model"),
        ({"state_dict": state(), "meta": {}, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "state_dict"),
        ({"module": state(), "epoch": 3}, "module"),
        ({"net": state()}, "net"),
        ({"model": {"state_dict": state()}}, "model.state_dict"),
        ({"ema": {"module": state(), "updates": 5}}, "ema.module"),
        ({"model": state(), "rng": torch.zeros(7)}, "model"),
        ({"model": None, "state_dict": state()}, "state_dict"),
        ({"model": {}, "model_ema": None, "net": state()}, "net"),
    ],
)
def test_weights_are_found_under_their_wrapper(content, wrapper):
    found = unwrap_weights(content)
    assert (found.source, found.wrapper, value_of(found)) == ("state dict", wrapper, 1.0)
    assert (found.class_names, found.about, found.notes) == (None, None, ())


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [
        ("state_dict_ema", "state_dict"),  # timm
        ("model_ema", "model"),  # torchvision's reference code
        ("ema", "model"),
        ("ema_model", "model"),
        ("params_ema", "params"),  # BasicSR
        ("teacher", "student"),  # DINO
        ("ema_state_dict", "model"),
    ],
)
def test_averaged_weights_are_taken_before_plain_ones(averaged, plain):
    content = {plain: state(1.0), averaged: state(2.0)}
    for ordered in (content, dict(reversed(content.items()))):
        found = unwrap_weights(ordered)
        assert (found.wrapper, value_of(found)) == (averaged, 2.0)
        assert found.notes == (f"averaged weights under '{averaged}'; '{plain}' not used",)


def test_mmengine_keeps_the_averages_under_state_dict():
    found = unwrap_weights({"state_dict": state(2.0), "ema_state_dict": {"steps": torch.tensor(7), **state(1.0)}})
    assert (found.wrapper, value_of(found)) == ("state_dict", 2.0)
    assert found.notes == ("averaged weights under 'state_dict'; 'ema_state_dict', those before averaging, not used",)


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel])
def test_prefixes_of_wrapping_modules_leave_no_trace(wrap):
    inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 2)]), "norm": nn.LayerNorm(3)})
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(inner) if wrap is nn.DataParallel else inner)
    found = unwrap_weights({"model_ema": averaged.state_dict()})
    assert found.tensors.keys() == inner.state_dict().keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in inner.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "module.norm.bias",
        "_orig_mod.norm.bias",
        "module._orig_mod.norm.bias",
        "_orig_mod.module.norm.bias",
        "module.module.norm.bias",
        "norm._orig_mod.bias",
        "_fsdp_wrapped_module.norm._checkpoint_wrapped_module.bias",
    ],
)
def test_prefixes_are_removed_wherever_they_stand(name):
    assert list(unwrap_weights({name: torch.ones(1)}).tensors) == ["norm.bias"]


@pytest.mark.parametrize("name", ["submodule.bias", "my_module.module.bias", "x_orig_mod.bias", "module", "steps.bias"])
def test_names_that_only_resemble_prefixes_stay(name):
    assert list(unwrap_weights({name: torch.ones(1)}).tensors) == [name]


def test_name_with_and_without_prefix_is_refused():
    with pytest.raises(CheckpointError, match=r"a\.pth: holds norm.bias twice"):
        unwrap_weights({"norm.bias": torch.ones(1), "module.norm.bias": torch.ones(1)}, "a.pth")


def test_old_copies_of_mmcv_are_dropped_with_a_note():
    found = unwrap_weights({**state(), "ema_layers_0_weight": torch.zeros(2, 3), "ema_norm_bias": torch.zeros(3)})
    assert value_of(found) == 1.0
    assert found.notes == ("2 tensors named 'ema_…', mmcv's copies before averaging, not used",)


def test_entries_that_are_no_tensors_are_counted():
    found = unwrap_weights({**state(), "version": 2, 7: torch.ones(1)})
    assert value_of(found) == 1.0
    assert found.notes == ("2 entries that are no tensors passed over, the first is 'version'",)


def test_parameters_become_plain_tensors_and_the_content_stays_as_it_was():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    content = {"model": {"module.w": parameter}}
    before = copy.copy(content["model"])
    (tensor,) = unwrap_weights(content).tensors.values()
    assert type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.dtype == torch.bfloat16
    assert content["model"].keys() == before.keys() and content["model"]["module.w"] is parameter


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("cat", "dog")}, ("cat", "dog")),
        ({"dataset_meta": {"classes": ["cat", "dog"], "palette": None}}, ("cat", "dog")),
        ({"dataset_meta": {"CLASSES": ("cat",)}, "CLASSES": ("old",)}, ("cat",)),
        ({"CLASSES": None}, None),
        ({"CLASSES": "cat"}, None),
        ({"CLASSES": [1, 2]}, None),
        ({"CLASSES": []}, None),
        (None, None),
        ([], None),
    ],
)
def test_class_names_are_those_of_the_meta_data(meta, names):
    assert unwrap_weights({"state_dict": state(), "meta": meta}).class_names == names


def endless():
    content = {"epoch": 3}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "its keys are: none"),
        (
            {"epoch": 3, "optimizer": {"state": torch.ones(1)}},
            "holds no tensors by name; its keys are: epoch, optimizer",
        ),
        ({"model": {"state_dict": {"a": 1}}}, "its keys are: model"),
        ({"model": {}}, "its keys are: model"),
        ({"model": {"n_averaged": torch.tensor(3)}}, "its keys are: model"),
        (endless(), "its keys are: epoch, model"),
        ([torch.ones(1)], "holds a list, expected tensors by name"),
        (torch.ones(1), "holds a Tensor, expected"),
        (nn.Linear(1, 1), "holds a Linear, expected"),
        (None, "holds a NoneType, expected"),
        ({"a.b": torch.ones(2, dtype=torch.complex64)}, "a.b is complex"),
        ({"a.b": torch.ones(2).to_sparse()}, "a.b is sparse"),
        ({"a.b": torch.ones(2, device="meta")}, "a.b is on the meta device"),
    ],
)
def test_content_without_usable_weights_is_refused(content, message):
    with pytest.raises(CheckpointError, match=f"^run 7: .*{message}") as caught:
        unwrap_weights(content, "run 7")
    assert "\n" not in str(caught.value)
