import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from swin_dense.attention import CosineWindowAttention
from swin_dense.config import variant_config
from swin_dense.errors import ConfigError
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import mask_rcnn
from swin_dense.heads.upernet import upernet
from swin_dense.swin import SwinTransformer
from swin_dense.training.optimizer import build_optimizer, change_settings, parameter_groups
from swin_dense.weights import backbone_names, head_names
from swin_dense.weights.rules import to_file_names

PUBLISHED_SUBSTRINGS = ("norm", "relative_position_bias_table", "absolute_pos_embed")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.qkv = nn.Linear(4, 12)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2))
        self.patch_embed = nn.Conv2d(3, 4, 2)
        self.norm1 = nn.LayerNorm(4)
        self.attn = Attention()


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.conv = nn.Conv2d(4, 5, 3)
        self.bn = nn.BatchNorm2d(5)


def names_of(groups):
    return {group["weight_decay"]: [name for name, _ in group["params"]] for group in groups}


def test_parameter_groups_equal_the_published_name_rule_on_modules_so_named():
    model = Segmenter()
    names = [name for name, _ in model.named_parameters()]
    exempt = [name for name in names if any(piece in name for piece in PUBLISHED_SUBSTRINGS)]
    assert names_of(parameter_groups(model, learning_rate=1.0, weight_decay=0.05)) == {
        0.05: [name for name in names if name not in exempt],
        0.0: exempt,
    }


@pytest.mark.parametrize(
    ("build", "rules", "decaying"),
    [
        (mask_rcnn, head_names.OPENMMLAB_MASK_RCNN, "rpn_head.rpn_conv.bias"),
        (cascade_mask_rcnn, head_names.OPENMMLAB_CASCADE_MASK_RCNN, "roi_head.bbox_head.2.shared_convs.3.bn.weight"),
        (upernet, head_names.OPENMMLAB_UPERNET, "decode_head.psp_modules.0.1.bn.bias"),
    ],
)
def test_decay_is_that_of_the_published_rule_for_every_parameter_of_the_published_models(build, rules, decaying):
    with torch.device("meta"):
        model = build(variant_config("swin_t", absolute_pos_embed_hw=(56, 56)), num_classes=7)
    own = {name: torch.zeros(()).expand(parameter.shape) for name, parameter in model.named_parameters()}
    published = to_file_names(own, (*rules, *backbone_names.OFFICIAL_DENSE))
    assert not published.rest and set(published.origins.values()) == set(own)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.05)
    decays = {name: group["weight_decay"] == 0.05 for group in groups for name, _ in group["params"]}
    for published_name, name in published.origins.items():
        spared = any(piece in published_name for piece in PUBLISHED_SUBSTRINGS)
        assert decays[name] is not spared, published_name
    assert decays[published.origins[decaying]]


def test_parameter_groups_go_by_role_not_by_name():
    model = nn.ModuleDict({"first": nn.LayerNorm(3), "batch_norm": nn.BatchNorm1d(3), "normaliser": nn.Linear(3, 3)})
    groups = names_of(parameter_groups(model, learning_rate=1.0, weight_decay=0.01))
    assert groups[0.0] == ["first.weight", "first.bias"]
    assert groups[0.01] == ["batch_norm.weight", "batch_norm.bias", "normaliser.weight", "normaliser.bias"]


def test_parameter_groups_spare_the_position_network_and_the_scale_of_swin_v2():
    attention = CosineWindowAttention(4, 2, 3, qkv_bias=True, pretrained_window_size=3)
    groups = names_of(parameter_groups(attention, learning_rate=1.0, weight_decay=0.01))
    assert groups[0.0] == ["logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"]
    assert groups[0.01] == ["q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"]


def test_parameter_groups_leave_out_frozen_parameters_and_empty_groups():
    model = Segmenter()
    model.backbone.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.05)
    assert [group["weight_decay"] for group in groups] == [0.05]
    assert [name for name, _ in groups[0]["params"]] == ["conv.weight", "conv.bias", "bn.weight", "bn.bias"]


def test_parameter_groups_hold_a_shared_parameter_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    (group,) = parameter_groups(model, learning_rate=1.0, weight_decay=0.1)
    assert [name for name, _ in group["params"]] == ["a.weight", "a.bias", "b.bias"]


DEPTHS = (1, 2, 3, 1)


def fine_tuning_layer(name):
    """SimMIM's rule by names, and the position embedding, which it forgets."""
    parts = name.removeprefix("backbone.").split(".")
    if parts[0] in ("patch_embed", "absolute_pos_embed"):
        return 0
    if parts[0] != "layers":
        return sum(DEPTHS) + 1
    stage = int(parts[1])
    return sum(DEPTHS[:stage]) + int(parts[3]) + 1 if parts[2] == "blocks" else sum(DEPTHS[: stage + 1])


@pytest.mark.parametrize("variant", ["swin_t", "swin_v2_t"])
def test_layer_decay_is_that_of_the_published_fine_tuning_for_every_parameter(variant):
    with torch.device("meta"):
        model = upernet(variant_config(variant, depths=DEPTHS, absolute_pos_embed_hw=(9, 9)), num_classes=3, channels=8)
    groups = parameter_groups(model, learning_rate=0.5, weight_decay=0.05, layer_decay=0.9)
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.5 * 0.9 ** (sum(DEPTHS) + 1 - fine_tuning_layer(name))), name
    assert groups[0]["lr"] == 0.5 and [group["lr"] for group in groups] == sorted(
        (group["lr"] for group in groups), reverse=True
    )
    assert len(groups) == 2 * (sum(DEPTHS) + 2)


def test_layer_decay_leaves_the_weight_decay_of_every_parameter():
    model = SwinTransformer(
        variant_config("swin_t", embed_dim=8, depths=(1, 1), num_heads=(1, 1), out_features=("c3",))
    )
    plain, scaled = (
        {
            name: group["weight_decay"]
            for group in parameter_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=layer_decay)
            for name, _ in group["params"]
        }
        for layer_decay in (1.0, 0.5)
    )
    assert plain == scaled


@pytest.mark.parametrize(
    ("layer_decay", "text"),
    [
        (0.0, "layer_decay must be above 0 and at most 1, got 0.0"),
        (1.1, "layer_decay must be above 0 and at most 1, got 1.1"),
        (0.9, "layer_decay=0.9 needs a model with a SwinTransformer inside; set it to 1"),
    ],
)
def test_layer_decay_refuses_what_it_cannot_scale(layer_decay, text):
    with pytest.raises(ConfigError, match=text):
        build_optimizer(nn.Linear(2, 2), learning_rate=1e-4, weight_decay=0.05, layer_decay=layer_decay)


def test_build_optimizer_decays_only_the_first_group():
    model = Segmenter()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.bn.weight.eq(0.95).all() and model.conv.bias.eq(0.95).all()
    assert model.backbone.norm1.weight.eq(1.0).all() and model.backbone.attn.relative_position_bias_table.eq(1.0).all()


def test_build_optimizer_state_names_the_parameters():
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=1e-4, weight_decay=0.05)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_build_optimizer_refuses_a_frozen_model():
    with pytest.raises(ConfigError, match=r"no trainable parameter.*Unfreeze"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), learning_rate=1e-4, weight_decay=0.05)


def test_build_optimizer_refuses_a_negative_learning_rate():
    with pytest.raises(ConfigError, match="learning rate"):
        build_optimizer(nn.Linear(2, 2), learning_rate=-1.0, weight_decay=0.05)


def test_changed_settings_take_hold_and_equal_ones_change_nothing():
    model = Segmenter()
    optimizer = build_optimizer(model, learning_rate=0.5, weight_decay=0.25)
    scheduler = LambdaLR(optimizer, lambda step: 0.1)

    def settings():
        return [(group["lr"], group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]

    before = settings()
    change_settings(optimizer, scheduler, model, learning_rate=0.5, weight_decay=0.25)
    assert settings() == before and scheduler.base_lrs == [0.5, 0.5]
    change_settings(optimizer, scheduler, model, learning_rate=2.0, weight_decay=0.125)
    assert settings() == [pytest.approx((0.2, 2.0, 0.125)), pytest.approx((0.2, 2.0, 0.0))]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.2)] * 2


def test_changed_settings_take_hold_in_every_layer():
    model = SwinTransformer(
        variant_config("swin_t", embed_dim=8, depths=(1, 1), num_heads=(1, 1), out_features=("c3",))
    )
    optimizer = build_optimizer(model, learning_rate=0.5, weight_decay=0.25, layer_decay=0.5)
    scheduler = LambdaLR(optimizer, lambda step: 0.1)
    change_settings(optimizer, scheduler, model, learning_rate=0.25, weight_decay=0.25, layer_decay=0.8)
    fresh = build_optimizer(model, learning_rate=0.25, weight_decay=0.25, layer_decay=0.8)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [group["lr"] for group in fresh.param_groups]
    assert scheduler.base_lrs == [group["lr"] for group in fresh.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [rate / 10 for rate in scheduler.base_lrs]
    )
