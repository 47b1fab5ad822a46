import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from swin_dense.attention import WindowAttention
from swin_dense.blocks import DropPath
from swin_dense.config import STAGE_NAMES, SwinConfig, variant_config
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.features import FeatureSpec
from swin_dense.swin import SwinTransformer, create_backbone
from swin_dense.window_attention import attention_implementation
from swin_dense.windows import ShiftedWindows

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), drop_path_rate=0.0)
EVERY_STAGE_SHIFTS = dataclasses.replace(TINY, depths=(2, 2, 2, 2))


def randomise(module, seed=0):
    """Weights far from any initialisation, so that nothing cancels: tables of std 1, random norms and biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.5 * noise
        elif name.endswith("weight"):
            noise = noise / math.sqrt(parameter[0].numel())
        parameter.data.copy_(noise)
    return module


def built(config, seed=0):
    return randomise(SwinTransformer(config).double().eval(), seed)


def random_images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_difference(one, other):
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).abs().max().detach()) for name in one)


# ---- The dense rule in words: no roll, no partition, every pair of cells of the padded map.


def plain_layer_norm(x, norm):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_padded(x, rows, columns):
    """(h, w, C) at the top left of zeros (rows, columns, C)."""
    out = x.new_zeros(rows, columns, x.shape[2])
    out[: x.shape[0], : x.shape[1]] = x
    return out


def plain_logit_terms(rows, columns, window, shift, table):
    """(cells, cells, heads): -inf outside the same shifted window, else the pair's bias, with -100 between regions."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    after_y, after_x = (y - shift) % rows, (x - shift) % columns  # the cyclic shift moves cells up and left
    window_of = (after_y // window) * columns + after_x // window
    wrapped = (y < shift).long() * 2 + (x < shift).long()  # cells the shift carried around the border
    place_y, place_x = after_y % window, after_x % window
    offset_y = place_y[:, None] - place_y[None, :] + window - 1
    offset_x = place_x[:, None] - place_x[None, :] + window - 1
    same_window = window_of[:, None] == window_of[None, :]
    row = torch.where(same_window, offset_y * (2 * window - 1) + offset_x, 0)
    terms = table[row] - 100.0 * (wrapped[:, None] != wrapped[None, :])[:, :, None]
    return terms.masked_fill(~same_window[:, :, None], -math.inf)


def plain_attention(x, block, window, shift):
    height, width, channels = x.shape
    rows, columns = math.ceil(height / window) * window, math.ceil(width / window) * window
    heads = block.attn.num_heads
    cells = plain_padded(x, rows, columns).reshape(rows * columns, channels)
    qkv = cells @ block.attn.qkv.weight.T + block.attn.qkv.bias
    query, key, value = (part.reshape(-1, heads, channels // heads) for part in qkv.split(channels, dim=1))
    logits = torch.einsum("ihc,jhc->ijh", query, key) / math.sqrt(channels // heads)
    logits = logits + plain_logit_terms(rows, columns, window, shift, block.attn.relative_position_bias_table)
    weights = (logits - logits.amax(dim=1, keepdim=True)).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    out = torch.einsum("ijh,jhc->ihc", weights, value).reshape(-1, channels)
    out = out @ block.attn.proj.weight.T + block.attn.proj.bias
    return out.reshape(rows, columns, channels)[:height, :width]


def plain_mlp(x, mlp):
    return plain_gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias


def plain_merging(x, merging):
    rows, columns = math.ceil(x.shape[0] / 2), math.ceil(x.shape[1] / 2)
    x = plain_padded(x, 2 * rows, 2 * columns)
    joined = torch.stack(
        [
            torch.cat([x[2 * i, 2 * j], x[2 * i + 1, 2 * j], x[2 * i, 2 * j + 1], x[2 * i + 1, 2 * j + 1]])
            for i in range(rows)
            for j in range(columns)
        ]
    ).reshape(rows, columns, -1)
    return plain_layer_norm(joined, merging.norm) @ merging.reduction.weight.T


def plain_patch_embedding(image, embed):
    side = embed.patch_size
    rows, columns = math.ceil(image.shape[1] / side), math.ceil(image.shape[2] / side)
    image = plain_padded(image.permute(1, 2, 0), rows * side, columns * side)
    patches = image.reshape(rows, side, columns, side, -1)
    x = torch.einsum("ipjqc,dcpq->ijd", patches, embed.proj.weight) + embed.proj.bias
    return plain_layer_norm(x, embed.norm)


def plain_dense_swin(backbone, image):
    features = {}
    x = plain_patch_embedding(image, backbone.patch_embed)
    for stage, layer in enumerate(backbone.layers):
        window = backbone.config.stage_window_size(stage)
        for index, block in enumerate(layer.blocks):
            x = x + plain_attention(plain_layer_norm(x, block.norm1), block, window, window // 2 * (index % 2))
            x = x + plain_mlp(plain_layer_norm(x, block.norm2), block.mlp)
        norm = getattr(backbone, f"norm{stage}")
        features[STAGE_NAMES[stage]] = plain_layer_norm(x, norm).permute(2, 0, 1)[None]
        if layer.downsample is not None:
            x = plain_merging(x, layer.downsample)
    return features


@pytest.mark.parametrize(
    ("size_hw", "window"),
    [
        ((37, 53), 7),
        ((97, 131), 7),
        ((37, 53), 4),
        ((97, 131), 4),
        ((56, 84), 7),  # the first map divides into windows
        ((3, 5), 7),
        ((29, 6), (2, 3, 5, 1)),
    ],
)
def test_dense_rule_is_attention_over_all_pairs_of_the_padded_map(size_hw, window):
    backbone = built(dataclasses.replace(EVERY_STAGE_SHIFTS, window_size=window))
    images = random_images(1, 3, *size_hw)
    with torch.no_grad():
        got, wanted = backbone(images), plain_dense_swin(backbone, images[0])
    assert largest_difference(got, wanted) < 1e-9
    assert float(wanted["c5"].std()) > 0.1


@pytest.mark.parametrize("window", [7, 4])
def test_dense_rule_has_the_gradients_of_the_plain_form(window):
    backbone = built(dataclasses.replace(EVERY_STAGE_SHIFTS, window_size=window))
    images = random_images(1, 3, 37, 53).requires_grad_()
    wanted_by = [images, *backbone.parameters()]
    gradients = []
    for features in (backbone(images), plain_dense_swin(backbone, images[0])):
        seeds = [random_images(*map.shape, seed=7) for map in features.values()]
        gradients.append(torch.autograd.grad(list(features.values()), wanted_by, seeds))
    for got, wanted in zip(*gradients, strict=True):
        assert float((got - wanted).abs().max()) < 1e-9 * max(1.0, float(wanted.abs().max()))


# ---- The other rules are their parents.


def torchvision_key(name):
    for ours, theirs in (("patch_embed.proj", "features.0.0"), ("patch_embed.norm", "features.0.2"), ("norm3", "norm")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if not name.startswith("layers."):
        return None
    _, stage, part, rest = name.split(".", 3)
    if part == "downsample":
        return f"features.{2 * int(stage) + 2}.{rest}"
    return f"features.{2 * int(stage) + 1}.{rest}".replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


def torchvision_twin(backbone):
    config = backbone.config
    window = [config.window_size] * 2
    twin = TorchvisionSwin([4, 4], config.embed_dim, list(config.depths), list(config.num_heads), window).double()
    weights = {torchvision_key(name): value for name, value in backbone.state_dict().items() if torchvision_key(name)}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("relative_position_index") or name.startswith("head.") for name in missing)
    return twin.eval()


def torchvision_features(twin, backbone, images):
    features, x = {}, images
    for index, part in enumerate(twin.features):
        x = part(x)
        if index % 2 == 1:
            features[STAGE_NAMES[index // 2]] = getattr(backbone, f"norm{index // 2}")(x).permute(0, 3, 1, 2)
    return features


@pytest.mark.parametrize("size_hw", [(96, 160), (112, 56), (28, 28), (100, 132), (4, 12)])
@pytest.mark.parametrize("window", [7, 4])
def test_classification_rule_is_torchvisions_network(size_hw, window):
    rule = dataclasses.replace(EVERY_STAGE_SHIFTS, window_size=window, window_rule="classification")
    backbone, images = built(rule), random_images(2, 3, *size_hw)
    with torch.no_grad():
        wanted = torchvision_features(torchvision_twin(backbone), backbone, images)
        assert largest_difference(backbone(images), wanted) < 1e-9


def test_classification_and_dense_rule_differ_only_where_a_map_fits_one_window():
    config = dataclasses.replace(EVERY_STAGE_SHIFTS, window_size=4)
    dense = built(config)
    classification = built(dataclasses.replace(config, window_rule="classification"))
    with torch.no_grad():
        large, small = random_images(1, 3, 136, 180), random_images(1, 3, 60, 180)
        assert largest_difference(dense(large), classification(large)) == 0
        assert largest_difference(dense(large), torchvision_features(torchvision_twin(dense), dense, large)) < 1e-9
        assert largest_difference(dense(small), classification(small)) > 1e-2


def timm_twin(backbone, size_hw):
    config = backbone.config
    twin = TimmSwin(
        img_size=size_hw,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        num_classes=0,
    ).double()
    weights = {}
    for name, value in backbone.state_dict().items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage + 1}.")
        weights[name.replace("norm3.", "norm.") if name.startswith("norm3.") else name] = value
    missing, _ = twin.load_state_dict(weights, strict=False)
    assert not missing
    return twin.eval()


@pytest.mark.parametrize("size_hw", [(136, 180), (128, 204), (256, 128), (144, 292)])
def test_timm_rule_is_timms_network(size_hw):
    config = dataclasses.replace(EVERY_STAGE_SHIFTS, window_size=4, window_rule="timm")
    backbone, images = built(config), random_images(1, 3, *size_hw)
    twin = timm_twin(backbone, size_hw)
    wanted = {}
    with torch.no_grad():
        x = twin.patch_embed(images)
        for stage, layer in enumerate(twin.layers):
            x = layer(x)
            wanted[STAGE_NAMES[stage]] = getattr(backbone, f"norm{stage}")(x).permute(0, 3, 1, 2)
        assert largest_difference(backbone(images), wanted) < 1e-9


def test_timm_rule_differs_from_dense_where_windows_do_not_divide():
    config = dataclasses.replace(EVERY_STAGE_SHIFTS, window_size=4)
    images = random_images(1, 3, 136, 180)
    with torch.no_grad():
        dense, timm = (built(dataclasses.replace(config, window_rule=rule))(images) for rule in ("dense", "timm"))
    assert largest_difference(dense, timm) > 1e-2


def test_shift_mask_value_is_added_between_regions():
    images = random_images(1, 3, 37, 53)
    values = [-100.0, -1e4, float("-inf"), 0.0]
    with torch.no_grad():
        closed, lower, infinite, none = (
            built(dataclasses.replace(EVERY_STAGE_SHIFTS, shift_mask_value=value))(images) for value in values
        )
    assert largest_difference(closed, lower) < 1e-9
    assert largest_difference(closed, infinite) < 1e-9
    assert largest_difference(closed, none) > 1e-2


# ---- Sizes, shapes and costs.


@pytest.mark.parametrize(
    "size_hw",
    [(97, 131), (224, 224), (300, 421), (1, 1), pytest.param((800, 1333), marks=pytest.mark.slow)],
)
def test_swin_t_maps_have_the_promised_shapes(size_hw):
    backbone = create_backbone("swin_t").eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, *size_hw))
    assert list(features) == list(backbone.feature_specs) == list(STAGE_NAMES)
    for name, spec in backbone.feature_specs.items():
        rows, columns = (math.ceil(side / spec.stride) for side in size_hw)
        assert features[name].shape == (1, spec.channels, rows, columns)
        assert features[name].isfinite().all()


def multiply_adds(module, *arguments):
    with FlopCounterMode(display=False) as counter:
        module(*arguments)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("variant", "million_parameters", "giga_multiply_adds"),
    [("swin_t", 27.52, 95.6), ("swin_s", 48.84, 187.6), ("swin_b", 86.75, 331.1), ("swin_l", 195.00, 739.4)],
)
def test_variants_cost_what_was_published(variant, million_parameters, giga_multiply_adds):
    with torch.device("meta"):
        backbone = create_backbone(variant).eval()
        cost = multiply_adds(backbone, torch.empty(1, 3, 800, 1280))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    assert parameters == pytest.approx(million_parameters * 1e6, rel=2e-3)
    assert cost == pytest.approx(giga_multiply_adds * 1e9, rel=2e-3)


@pytest.mark.parametrize(("window", "wanted"), [(4, 163_577_856), (64, 3_372_220_416)])
def test_window_attention_is_linear_in_the_map_for_a_fixed_window(window, wanted):
    # Equations 1 and 2 of the paper at h = w = 64, C = 96: 4 h w C^2 + 2 M^2 h w C.
    assert 4 * 64 * 64 * 96**2 + 2 * window**2 * 64 * 64 * 96 == wanted
    with torch.device("meta"):
        attention = WindowAttention(96, 3, window, qkv_bias=True)
        windows = ShiftedWindows(window, (0, 0), True, -100.0)
        assert multiply_adds(lambda x: attention(x, windows), torch.empty(1, 64, 64, 96)) == wanted


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 40), (3, 2), (29, 31), (33, 64)])
@pytest.mark.parametrize("rule", ["dense", "classification", "timm"])
def test_any_size_gives_finite_maps_of_the_promised_shape(size_hw, rule):
    backbone = SwinTransformer(dataclasses.replace(TINY, window_rule=rule)).eval()
    features = backbone(torch.rand(2, 3, *size_hw))
    for name, spec in backbone.feature_specs.items():
        assert features[name].shape == (2, spec.channels, *(math.ceil(side / spec.stride) for side in size_hw))
        assert features[name].isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 5},
        {"patch_size": 2},
        {"patch_size": 3},
        {"patch_norm": False},
        {"qkv_bias": False},
        {"window_size": (2, 3, 5, 7)},
        {"output_norm": False},
        {"mlp_ratio": 2.5},
        {"absolute_pos_embed_hw": (5, 7)},
        {"depths": (2,), "num_heads": (1,), "out_features": ("c2",)},
    ],
)
def test_unusual_configurations_keep_the_contract(changes):
    config = dataclasses.replace(TINY, **changes)
    backbone = SwinTransformer(config).eval()
    features = backbone(torch.rand(1, config.in_channels, 37, 53))
    got = {
        name: FeatureSpec(map.shape[1], config.patch_size * 2 ** STAGE_NAMES.index(name))
        for name, map in features.items()
    }
    assert got == backbone.feature_specs
    for name, spec in backbone.feature_specs.items():
        assert features[name].shape[2:] == (math.ceil(37 / spec.stride), math.ceil(53 / spec.stride))
    assert (backbone.layers[0].blocks[0].attn.qkv.bias is None) == (not config.qkv_bias)
    names = [name for name, _ in backbone.named_parameters()]
    assert any(name.startswith("patch_embed.norm") for name in names) == config.patch_norm
    assert any(name.startswith("norm") for name in names) == config.output_norm


def test_output_norm_is_the_only_difference_between_raw_and_normed_maps():
    normed = built(TINY)
    raw = SwinTransformer(dataclasses.replace(TINY, output_norm=False)).double().eval()
    raw.load_state_dict({k: v for k, v in normed.state_dict().items() if not k.startswith("norm")})
    images = random_images(1, 3, 37, 53)
    with torch.no_grad():
        for stage, (name, map) in enumerate(raw(images).items()):
            wanted = getattr(normed, f"norm{stage}")(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert torch.equal(normed(images)[name], wanted)


@pytest.mark.parametrize("names", [("c2",), ("c3",), ("c5", "c2"), ("c3", "c4")])
def test_out_features_build_nothing_that_is_not_used(names):
    whole = built(TINY)
    part = SwinTransformer(dataclasses.replace(TINY, out_features=names)).double().eval()
    last = max(STAGE_NAMES.index(name) for name in names)
    assert len(part.layers) == last + 1
    assert part.layers[-1].downsample is None
    norms = {name.split(".")[0] for name, _ in part.named_parameters() if name.startswith("norm")}
    assert norms == {f"norm{STAGE_NAMES.index(name)}" for name in names}
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in part.state_dict()})
    images = random_images(1, 3, 37, 53)
    with torch.no_grad():
        features, wanted = part(images), whole(images)
    assert list(features) == sorted(names)
    assert all(torch.equal(features[name], wanted[name]) for name in names)


# ---- Laws of batches, modes and gradients.


def test_batch_is_each_image_alone():
    backbone, images = built(EVERY_STAGE_SHIFTS), random_images(3, 3, 37, 53)
    with torch.no_grad():
        together = backbone(images)
        for index in range(3):
            alone = backbone(images[index : index + 1])
            assert largest_difference({k: v[index : index + 1] for k, v in together.items()}, alone) < 1e-12


def test_forward_changes_neither_images_nor_state():
    backbone, images = built(EVERY_STAGE_SHIFTS), random_images(1, 3, 36, 52)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    copy = images.clone()
    first, second = backbone(images), backbone(images)
    assert torch.equal(images, copy)
    assert largest_difference(first, second) == 0
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_backbone_can_be_transformed():
    backbone = randomise(SwinTransformer(TINY)).double().eval()
    images = torch.rand(2, 3, 37, 53, dtype=torch.float64)

    def number(parameters, images):
        return sum(feature.sum() for feature in torch.func.functional_call(backbone, parameters, images).values())

    parameters = dict(backbone.named_parameters())
    gradients = torch.func.grad(number)({name: value.detach() for name, value in parameters.items()}, images)
    wanted = torch.autograd.grad(number(parameters, images), list(parameters.values()))
    for (name, gradient), value in zip(gradients.items(), wanted, strict=True):
        assert torch.allclose(gradient, value, rtol=1e-9, atol=1e-9), name


def test_drop_path_keeps_the_branch_in_evaluation_and_its_mean_in_training():
    torch.manual_seed(3)
    drop, x = DropPath(0.3), torch.full((4001, 2, 3), 5.0)
    assert torch.equal(drop.eval()(x, torch.ones_like), x + 1)
    dropped = drop.train()(x, torch.ones_like) - x
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample.amin(dim=1), per_sample.amax(dim=1))  # whole samples
    assert sorted(per_sample.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)
    assert "rate=0.300" in repr(drop)


def test_drop_path_computes_the_branch_of_kept_samples_only():
    drop, x, seen = DropPath(0.5).train(), torch.arange(11.0)[:, None], []
    torch.manual_seed(1)
    out = drop(x, lambda some: seen.append(some) or some + 1)
    (kept,) = seen
    assert 0 < len(kept) < 11
    assert torch.equal(out, torch.where(torch.isin(x, kept), x + 2 * (x + 1), x))


def test_drop_path_is_the_same_where_operations_are_watched():
    drop, x = DropPath(0.5).train(), torch.rand(7, 3, dtype=torch.float64)
    torch.manual_seed(1)
    wanted = drop(x, torch.sin)
    torch.manual_seed(1)
    with FlopCounterMode(display=False):
        assert torch.allclose(drop(x, torch.sin), wanted, atol=1e-15)


@pytest.mark.parametrize("implementation", ["reference", "gathered"])
@pytest.mark.parametrize("version", [1, 2])
def test_dropped_branches_leave_zeros_as_gradients(version, implementation):
    config = dataclasses.replace(TINY, version=version)
    backbone = randomise(SwinTransformer(config)).train()
    for module in backbone.modules():
        if isinstance(module, DropPath):
            module.rate = 1 - 1e-9
    with attention_implementation(implementation):
        sum(feature.sum() for feature in backbone(torch.rand(1, 3, 37, 53)).values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert ".blocks." not in name or not parameter.grad.any(), name


def test_drop_path_drops_both_branches_of_a_block():
    config = SwinConfig(embed_dim=8, depths=(1, 1), num_heads=(1, 1), out_features=("c2", "c3"), drop_path_rate=0.5)
    block = randomise(SwinTransformer(config)).layers[1].blocks[0].train()
    assert block.drop_path.rate == 0.5
    x = torch.rand(1, 5, 3, 16)
    attention, mlp = block.attend(block.norm1(x)), lambda y: block.mlp(block.norm2(y))
    with_attention = x + 2 * attention
    wanted = {
        "none": x,
        "attention": with_attention,
        "mlp": x + 2 * mlp(x),
        "both": with_attention + 2 * mlp(with_attention),
    }
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        out = block(x)
        seen |= {name for name, value in wanted.items() if torch.allclose(out, value, atol=1e-5)}
    assert seen == set(wanted)


def test_drop_path_acts_in_training_only():
    backbone = randomise(SwinTransformer(dataclasses.replace(TINY, drop_path_rate=0.5)))
    images = torch.rand(2, 3, 37, 53)
    torch.manual_seed(0)
    assert largest_difference(backbone.train()(images), backbone.train()(images)) > 1e-3
    assert largest_difference(backbone.eval()(images), backbone.eval()(images)) == 0


@pytest.mark.parametrize("frozen", [0, 1, 2, 4])
def test_frozen_stages_freeze_exactly_the_first_parts(frozen):
    config = dataclasses.replace(TINY, frozen_stages=frozen, drop_path_rate=0.5, absolute_pos_embed_hw=(3, 5))
    backbone = SwinTransformer(config)
    prefixes = ["patch_embed.", "absolute_pos_embed"] if frozen else []
    prefixes += [f"{part}{stage}." for stage in range(frozen) for part in ("layers.", "norm")]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(prefixes)), name

    assert backbone.train() is backbone
    for name, module in backbone.named_modules():
        if name and name != "layers":
            assert module.training != (name + ".").startswith(tuple(prefixes)), name
    assert backbone.eval() is backbone
    assert not any(module.training for module in backbone.modules())
    backbone.train()
    assert not any(module.training for stage in range(frozen) for module in backbone.layers[stage].modules())


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    backbone = randomise(SwinTransformer(dataclasses.replace(TINY, frozen_stages=2, drop_path_rate=0.2))).train()
    sum(map.square().mean() for map in backbone(torch.rand(1, 3, 37, 53)).values()).backward()
    for parameter in backbone.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_checkpoint_stages_change_neither_features_nor_gradients():
    images = random_images(2, 3, 37, 53)
    results = []
    for stages in ((), (0, 2), (0, 1, 2, 3)):
        backbone = built(dataclasses.replace(TINY, checkpoint_stages=stages, drop_path_rate=0.4)).train()
        torch.manual_seed(5)
        features = backbone(images)
        sum(map.square().sum() for map in features.values()).backward()
        results.append((features, [parameter.grad for parameter in backbone.parameters()]))
    for features, gradients in results[1:]:
        assert largest_difference(features, results[0][0]) == 0
        assert all(torch.equal(one, other) for one, other in zip(gradients, results[0][1], strict=True))


@pytest.mark.parametrize("rule", ["dense", "classification", "timm"])
def test_every_parameter_gets_a_finite_gradient(rule):
    changes = {"window_rule": rule, "absolute_pos_embed_hw": (3, 5), "drop_path_rate": 0.2}
    backbone = SwinTransformer(dataclasses.replace(EVERY_STAGE_SHIFTS, **changes)).train()
    torch.manual_seed(1)
    features = backbone(torch.rand(4, 3, 69, 101))
    sum((map * torch.rand_like(map)).sum() for map in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_autocast_gives_bfloat16_maps_near_those_of_float32():
    backbone = SwinTransformer(EVERY_STAGE_SHIFTS).eval()
    images = torch.rand(2, 3, 37, 53)
    wanted = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images)
    assert largest_difference(features, wanted) < 0.1
    sum(map.float().sum() for map in features.values()).backward()


# ---- Position embedding, state, initialisation, building.


def test_absolute_position_embedding_is_added_and_interpolated():
    config = dataclasses.replace(TINY, absolute_pos_embed_hw=(5, 7))
    backbone = built(config)
    plain = SwinTransformer(TINY).double().eval()
    plain.load_state_dict({k: v for k, v in backbone.state_dict().items() if k != "absolute_pos_embed"})
    for size_hw in ((20, 28), (37, 53)):
        images = random_images(1, 3, *size_hw)
        grid = (math.ceil(size_hw[0] / 4), math.ceil(size_hw[1] / 4))
        table = backbone.absolute_pos_embed.detach()
        if grid != (5, 7):
            table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        plain.patch_embed.register_forward_hook(lambda m, i, out, table=table: out + table.permute(0, 2, 3, 1))
        with torch.no_grad():
            assert largest_difference(backbone(images), plain(images)) == 0
        plain.patch_embed._forward_hooks.clear()


def test_state_dict_round_trip_gives_the_same_features():
    config = dataclasses.replace(TINY, absolute_pos_embed_hw=(3, 5))
    one, other, images = built(config, seed=1), built(config, seed=2), random_images(1, 3, 37, 53)
    with torch.no_grad():
        assert largest_difference(one(images), other(images)) > 1e-2
        other.load_state_dict(one.state_dict(), strict=True)
        assert largest_difference(one(images), other(images)) == 0


def test_parameter_names_are_the_published_ones():
    names = set(SwinTransformer(dataclasses.replace(TINY, absolute_pos_embed_hw=(3, 5))).state_dict())
    wanted = {"absolute_pos_embed", *(f"patch_embed.{n}.{p}" for n in ("proj", "norm") for p in ("weight", "bias"))}
    for stage, depth in enumerate(TINY.depths):
        wanted |= {f"norm{stage}.weight", f"norm{stage}.bias"}
        if stage < 3:
            merging = f"layers.{stage}.downsample"
            wanted |= {f"{merging}.reduction.weight", f"{merging}.norm.weight", f"{merging}.norm.bias"}
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            wanted |= {f"{prefix}.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
            wanted.add(f"{prefix}.attn.relative_position_bias_table")
    assert names == wanted


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    backbone = SwinTransformer(dataclasses.replace(TINY, embed_dim=32, absolute_pos_embed_hw=(9, 9)))
    block = backbone.layers[2].blocks[1]
    for weight in (block.mlp.fc1.weight, block.attn.relative_position_bias_table, backbone.absolute_pos_embed):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    for bias in (block.mlp.fc1.bias, block.attn.qkv.bias, block.norm1.bias):
        assert not bias.any()
    assert (block.norm1.weight == 1).all()


def test_create_backbone_sets_fields_and_refuses_unknown_ones():
    backbone = create_backbone("swin_t", in_channels=4, out_features=("c3",))
    assert backbone.config == variant_config("swin_t", in_channels=4, out_features=("c3",))
    with pytest.raises(ConfigError, match="did you mean 'swin_t'"):
        create_backbone("swin_tt")
    with pytest.raises(CheckpointError, match=r"there is no file no_such\.pth, and there are no published weights"):
        create_backbone("swin_t", weights="no_such.pth", out_features=("c2",))


def test_create_backbone_loads_weights(tmp_path):
    wanted = create_backbone("swin_t", out_features=("c2",))
    torch.save(wanted.state_dict(), tmp_path / "weights.pth")
    got = create_backbone("swin_t", weights=str(tmp_path / "weights.pth"), out_features=("c2",))
    assert all(torch.equal(value, got.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_meta_device_materialises_to_a_working_model():
    with torch.device("meta"):
        backbone = SwinTransformer(TINY)
    assert all(parameter.is_meta for parameter in backbone.parameters())


# ---- Compilation and export.

SMALL = SwinConfig(embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, out_features=("c2", "c3"))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_breaks_it_equals_eager_at_two_sizes():
    backbone = randomise(SwinTransformer(SMALL).eval())
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for size_hw in ((61, 47), (37, 75)):
            images = torch.rand(1, 3, *size_hw)
            assert largest_difference(compiled(images), backbone(images)) < 1e-5


@pytest.mark.usefixtures("fresh_compiler")
def test_exported_with_free_height_and_width_it_equals_eager_at_other_sizes():
    backbone = randomise(SwinTransformer(SMALL).eval())
    images = torch.rand(1, 3, 60, 92)
    program = torch.export.export(backbone, (images,), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))
    # torch guards the memory layout of the cropped map too; the graph itself holds no number of the example.
    exported = program.module(check_guards=False)
    with torch.no_grad():
        for size_hw in ((60, 92), (64, 96), (120, 84), (61, 47), (28, 100)):
            images = torch.rand(1, 3, *size_hw)
            assert largest_difference(exported(images), backbone(images)) < 1e-5
