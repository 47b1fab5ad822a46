import math

import pytest
import torch
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from swin_dense.config import SwinConfig
from swin_dense.conventions import IGNORED_LABEL
from swin_dense.errors import ConfigError, DataError
from swin_dense.heads import upsampling
from swin_dense.heads.losses import segmentation_loss
from swin_dense.heads.upernet import FCNHead, UPerHead, check_labels, enlarge, upernet
from swin_dense.swin import SwinTransformer
from swin_dense.training.loss_terms import means

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0)


def segmenter_of(num_classes=5, seed=0, **changes):
    torch.manual_seed(seed)
    return upernet(TINY, num_classes, **{"channels": 8, "auxiliary_channels": 6, **changes})


def random_labels(shape, num_classes=5, seed=1):
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(seed))


# ---- The decoder is the one of segmentation_models_pytorch.


def smp_key(name, num_fine=3):
    """The name in UPerNetDecoder of a parameter of UPerHead; the fine levels stand there in reverse."""
    part, rest = name.split(".", 1)
    layer = "1" if ".bn." in f".{rest}" else "0"
    leaf = name.rsplit(".", 1)[1]
    if part == "psp_modules":
        return f"psp.blocks.{rest.split('.')[0]}.1.{layer}.{leaf}"
    if part == "bottleneck":
        return f"psp.out_conv.{layer}.{leaf}"
    if part == "fpn_bottleneck":
        return f"fusion_block.{layer}.{leaf}"
    level = num_fine - 1 - int(rest.split(".")[0])
    block = {"lateral_convs": f"fpn_lateral_blocks.{level}.conv_norm_relu", "fpn_convs": f"fpn_conv_blocks.{level}"}
    return f"{block[part]}.{layer}.{leaf}"


def smp_twin(head, channels, width):
    twin = UPerNetDecoder([3, 0, *channels], encoder_depth=5, decoder_channels=width)
    twin.feature_norms = nn.ModuleList(nn.Identity() for _ in channels)
    weights = {smp_key(name): value for name, value in head.state_dict().items() if not name.startswith("conv_seg")}
    twin.load_state_dict(weights, strict=True)
    return twin


def randomise(head):
    generator = torch.Generator().manual_seed(4)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return head


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [((29, 43), (15, 22), (8, 11), (4, 6)), ((32, 16), (16, 8), (8, 4), (4, 2))])
def test_decoder_equals_smps(training, dtype, tolerance, sizes):
    channels = (8, 16, 32, 64)
    head = randomise(UPerHead(channels, 24, num_classes=5)).to(dtype)
    twin = smp_twin(head, channels, 24).to(dtype)
    maps = [torch.randn(2, c, *size, dtype=dtype) for c, size in zip(channels, sizes, strict=True)]
    unused = [torch.zeros(1, dtype=dtype)] * 2
    got = head.train(training).decode(maps)
    wanted = twin.train(training)([*unused, *maps])
    scale = float(wanted.abs().max().detach())
    assert scale > 0.1
    assert float((got - wanted).abs().max().detach()) <= tolerance * scale
    for name, value in head.state_dict().items():
        if "running" in name:
            assert torch.allclose(value, twin.state_dict()[smp_key(name)], atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "million_parameters", "giga_multiply_adds"),
    [("swin_t", 59.94, 944), ("swin_s", 81.26, 1037), ("swin_b", 121.28, 1187)],
)
def test_variants_cost_what_was_published_and_less_where_taps_go_before_resizing(
    variant, million_parameters, giga_multiply_adds, monkeypatch
):
    with torch.device("meta"):
        model, images = upernet(variant, num_classes=150).eval(), torch.empty(1, 3, 512, 2048)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(million_parameters * 1e6, rel=5e-3)
    assert giga_multiply_adds_of(model, images) == pytest.approx(giga_multiply_adds, rel=5e-3)
    monkeypatch.setattr(upsampling, "operations_are_watched", lambda: False)
    assert giga_multiply_adds_of(model, images) < 0.7 * giga_multiply_adds


def giga_multiply_adds_of(model, images):
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2e9


def test_every_map_of_the_decoder_stays_channels_last():
    head = UPerHead((8, 16, 32, 64), 24, num_classes=5)
    seen = []
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.append((name, *inputs, output)))
    maps = [torch.rand(2, 29 >> i, 37 >> i, 8 << i).permute(0, 3, 1, 2).requires_grad_() for i in range(4)]
    logits = head(maps)
    assert {"bottleneck.bn", "fpn_bottleneck.bn", "fpn_convs.0.conv", "conv_seg"} < {name for name, *_ in seen}
    for name, *tensors in seen:
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors), name
    gradients = torch.autograd.grad(logits.sum(), maps)
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients)


# ---- Logits.


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 97), (41, 67), (33, 7), (64, 96)])
def test_logits_have_the_size_of_the_input(size_hw):
    segmenter = segmenter_of().eval()
    with torch.no_grad():
        logits = segmenter(torch.rand(2, 3, *size_hw))
    assert logits.shape == (2, 5, *size_hw) and logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_batch_is_each_image_alone():
    segmenter = segmenter_of().double().eval()
    images = torch.rand(3, 3, 41, 67, dtype=torch.float64)
    with torch.no_grad():
        together = segmenter(images)
        for image, logits in zip(images, together, strict=True):
            assert float((segmenter(image[None])[0] - logits).abs().max()) < 1e-12


def test_logits_are_those_of_the_quarter_size_enlarged():
    segmenter, images = segmenter_of().eval(), torch.rand(1, 3, 41, 67)
    with torch.no_grad():
        maps = list(segmenter.backbone(segmenter.normalize(images)).values())
        coarse = segmenter.decode_head(maps)
        assert coarse.shape == (1, 5, 11, 17)
        assert torch.equal(segmenter(images), enlarge(coarse, images))
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    enlarged = enlarge(ramp, torch.zeros(1, 1, 1, 8))[0, 0, 0]
    assert enlarged.tolist() == pytest.approx([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])  # corners not aligned


@pytest.mark.parametrize("num_classes", [1, 5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_are_the_maxima_of_the_logits_bit_for_bit(num_classes, dtype):
    segmenter = randomise(segmenter_of(num_classes)).to(dtype).eval()
    images = torch.rand(2, 3, 41, 67, dtype=dtype)
    with torch.no_grad():
        logits = segmenter(images)
        assert torch.equal(segmenter.predict_labels(images), logits.argmax(dim=1))
        again = functional.interpolate(logits, (59, 47), mode="bilinear", align_corners=False)
        labels = segmenter.predict_labels(images, (59, 47))
    assert labels.dtype == torch.int64 and torch.equal(labels, again.argmax(dim=1))
    assert num_classes == 1 or labels.any()


class LargestTensor(TorchDispatchMode):
    """Watches what torch makes: `numel` is the most values that any tensor had."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_neither_losses_nor_labels_make_all_logits():
    segmenter, images, labels = segmenter_of(num_classes=200), torch.rand(2, 3, 64, 96), random_labels((2, 64, 96))
    all_logits = 200 * labels.numel()
    with LargestTensor() as largest:
        sum(segmenter(images, labels).values()).backward()
        with torch.no_grad():
            segmenter.eval().predict_labels(images, (61, 97))
    assert largest.numel < all_logits / 4
    with LargestTensor() as largest:
        segmenter(images)
    assert largest.numel >= all_logits


def test_training_mode_without_labels_gives_logits():
    assert segmenter_of().train()(torch.rand(2, 3, 41, 67)).shape == (2, 5, 41, 67)


def test_images_and_labels_are_left_alone():
    segmenter, images, labels = segmenter_of(), torch.rand(2, 3, 41, 67), random_labels((2, 41, 67)).to(torch.uint8)
    copies = images.clone(), labels.clone()
    segmenter(images, labels)
    assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])


# ---- Losses.


def test_losses_are_those_of_both_heads():
    segmenter = segmenter_of().eval()
    images, labels = torch.rand(2, 3, 41, 67), random_labels((2, 41, 67))
    with torch.no_grad():
        losses, features = segmenter(images, labels), segmenter.backbone(segmenter.normalize(images))
        auxiliary = enlarge(segmenter.auxiliary_head(features["c4"]), images)
        assert set(losses) == {"loss_segmentation", "loss_auxiliary"}
        wanted = segmentation_loss(segmenter(images), labels)
        assert float(losses["loss_segmentation"]) == pytest.approx(float(wanted))
        assert float(losses["loss_auxiliary"]) == pytest.approx(0.4 * float(segmentation_loss(auxiliary, labels)))


def test_logits_are_the_same_bit_for_bit_with_losses_of_one_pass():
    segmenter = segmenter_of(dropout=0.5).eval()
    images, labels = torch.rand(2, 3, 41, 67), random_labels((2, 41, 67))
    passes = []
    segmenter.backbone.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        logits, losses = segmenter.logits_and_losses(images, labels)
        assert len(passes) == 1
        assert torch.equal(logits, segmenter(images)) and means(losses) == segmenter(images, labels)


def test_losses_in_evaluation_are_those_of_training_where_nothing_is_random():
    segmenter = randomise(segmenter_of(dropout=0.0)).double().eval()
    images, labels = torch.rand(2, 3, 41, 67).double(), random_labels((2, 41, 67))
    with torch.no_grad():
        _, found = segmenter.logits_and_losses(images, labels)
        for module in segmenter.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        wanted = segmenter(images, labels)
        of_batches = segmenter.train()(images, labels)
    for name, loss in wanted.items():
        assert float(found[name].mean) == pytest.approx(float(loss), rel=1e-12)
        assert float(loss) != pytest.approx(float(of_batches[name]), rel=1e-6)


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 3), (7, 33), (33, 7), (32, 32)])
def test_a_single_small_image_trains(size_hw):
    segmenter = segmenter_of().train()
    losses = segmenter(torch.rand(1, 3, *size_hw), random_labels((1, *size_hw)))
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in segmenter.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(value.isfinite().all() for value in segmenter.state_dict().values())


def test_every_parameter_gets_a_gradient():
    segmenter = segmenter_of().train()
    sum(segmenter(torch.rand(2, 3, 69, 101), random_labels((2, 69, 101))).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in segmenter.parameters())


def test_ignored_labels_only_give_a_loss_of_zero_and_no_gradient():
    segmenter = segmenter_of().train()
    losses = segmenter(torch.rand(2, 3, 41, 67), torch.full((2, 41, 67), IGNORED_LABEL, dtype=torch.uint8))
    assert [float(loss.detach()) for loss in losses.values()] == [0.0, 0.0]
    sum(losses.values()).backward()
    assert not any(parameter.grad.any() for parameter in segmenter.parameters())


def test_bfloat16_autocast_trains_and_gives_full_precision():
    segmenter, images, labels = segmenter_of().train(), torch.rand(2, 3, 41, 67), random_labels((2, 41, 67))
    with torch.autocast("cpu", torch.bfloat16):
        losses, logits = segmenter(images, labels), segmenter(images)
    assert {value.dtype for value in (*losses.values(), logits)} == {torch.float32}
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in segmenter.parameters())


def test_training_reduces_the_loss_of_one_batch():
    segmenter, images, labels = segmenter_of().train(), torch.rand(2, 3, 41, 67), torch.zeros(2, 41, 67).long()
    labels[:, :, 30:] = 1
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-2)
    totals = []
    for _ in range(25):
        total = sum(segmenter(images, labels).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.5 * totals[0]


# ---- Parts.


def test_auxiliary_head_is_no_part_of_prediction():
    segmenter, images = segmenter_of().eval(), torch.rand(1, 3, 41, 67)
    with torch.no_grad():
        wanted = segmenter(images)
        for parameter in segmenter.auxiliary_head.parameters():
            parameter.fill_(math.nan)
        assert torch.equal(segmenter(images), wanted)


def test_dropout_drops_whole_channels_in_training_only():
    head = FCNHead(4, 200, 3, dropout=0.5)
    seen = []
    head.conv_seg.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    torch.manual_seed(0)
    head.train()(torch.rand(1, 4, 5, 7))
    dropped = (seen[0] == 0).flatten(2).all(dim=2).float().mean()
    assert 0.3 < float(dropped) < 0.7
    with torch.no_grad():
        head.eval()
        assert torch.equal(head(torch.ones(1, 4, 5, 7)), head(torch.ones(1, 4, 5, 7)))


def test_new_weights_keep_the_variance_of_what_goes_through():
    torch.manual_seed(0)
    segmenter = segmenter_of(num_classes=50, channels=64, auxiliary_channels=64)
    for head in (segmenter.decode_head, segmenter.auxiliary_head):
        for layer in head.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is None:
                wanted = (2 / layer.weight[0].numel()) ** 0.5  # a ReLU follows, which halves it
                assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=0.1)
        assert float(head.conv_seg.weight.detach().std()) == pytest.approx((2 / (64 + 50)) ** 0.5, rel=0.1)
        assert not head.conv_seg.bias.any()


# ---- Wrong use.


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 67, 41).long(), r"labels must be integers of shape \(2, 41, 67\), got torch.int64 of \(2, 67"),
        (torch.zeros(2, 1, 41, 67).long(), r"labels must be integers of shape \(2, 41, 67\), got"),
        (torch.zeros(2, 41, 67), r"labels must be integers of shape \(2, 41, 67\), got torch.float32"),
        (torch.full((2, 41, 67), 5), r"0 to 4, or 255 to ignore a pixel; 5494 pixels hold other values, such as 5"),
        (torch.full((2, 41, 67), -1), r"0 to 4, or 255 to ignore a pixel; 5494 pixels hold other values, such as -1"),
        (torch.full((2, 41, 67), 254, dtype=torch.uint8), r"such as 254"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    images = torch.rand(2, 3, 41, 67)
    with pytest.raises(DataError, match=message):
        check_labels(labels, images, 5)
    with pytest.raises(DataError, match=message):
        segmenter_of().train()(images, labels)


def test_images_of_a_wrong_kind_are_refused():
    segmenter = segmenter_of().eval()
    with pytest.raises(ConfigError, match=r"images must be \(B, channels, H, W\), got shape \(3, 5, 7\)"):
        segmenter(torch.rand(3, 5, 7))
    with pytest.raises(ConfigError, match=r"images must be \(B, channels, H, W\), got shape \(3, 5, 7\)"):
        segmenter.predict_labels(torch.rand(3, 5, 7))
    with pytest.raises(ConfigError, match=r"images must be \(3, H, W\) floats"):
        segmenter(torch.zeros(1, 3, 5, 7, dtype=torch.uint8))


def test_wrong_settings_are_refused():
    for count in (0, 256):
        with pytest.raises(ConfigError, match=f"num_classes must be 1 to 255, which marks ignored pixels, got {count}"):
            segmenter_of(num_classes=count)


def test_other_channels_and_a_ready_backbone_work():
    backbone = SwinTransformer(SwinConfig(embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, in_channels=5))
    segmenter = upernet(backbone, 2, channels=8, image_mean=[0.5] * 5, image_std=[0.2] * 5).eval()
    assert segmenter.backbone is backbone
    with torch.no_grad():
        assert segmenter(torch.rand(1, 5, 37, 41)).shape == (1, 2, 37, 41)
