import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.conventions import IMAGENET_MEAN, IMAGENET_STD
from swin_dense.errors import ConfigError
from swin_dense.heads.backbones import Normalize, as_backbone
from swin_dense.swin import SwinTransformer

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


def test_as_backbone_takes_a_name_a_configuration_or_a_backbone():
    backbone = SwinTransformer(TINY)
    assert as_backbone(backbone) is backbone
    assert as_backbone(TINY).config == TINY
    with torch.device("meta"):
        assert as_backbone("swin_t").config.embed_dim == 96


def test_as_backbone_refuses_unknown_names_and_missing_maps():
    with pytest.raises(ConfigError, match="no Swin variant 'swin_x'"):
        as_backbone("swin_x")
    with pytest.raises(ConfigError, match="read the maps c2, c3, c4, c5; this backbone has no c2, c4"):
        as_backbone(SwinConfig(embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, out_features=("c3", "c5")))


def test_normalize_is_shift_and_scale_of_each_channel():
    images = torch.rand(2, 3, 5, 7)
    normalized = Normalize(3)(images)
    for channel in range(3):
        wanted = (images[:, channel] - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.allclose(normalized[:, channel], wanted, atol=1e-6)
    assert torch.equal(Normalize(3)(images[0]), normalized[0])


def test_normalize_takes_other_numbers_of_channels_and_leaves_the_input_alone():
    images = torch.rand(5, 3, 2)
    copy = images.clone()
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (1.0, 2.0, 3.0, 4.0, 5.0)
    wanted = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.equal(Normalize(5, mean, std)(images), wanted)
    assert torch.equal(images, copy)


def test_normalize_is_no_part_of_the_weights():
    assert not Normalize(3).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4,), "image_mean and image_std are needed for 4 channels"),
        ((4, (0.5,) * 4), "image_mean and image_std are needed for 4 channels"),
        ((3, (0.5, 0.5)), "image_mean must have 3 numbers, got 2"),
        ((4, (0.5,) * 4, (1.0,)), "image_std must have 4 numbers, got 1"),
    ],
)
def test_normalize_refuses_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Normalize(*arguments)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 5, 7),
        torch.zeros(5, 7, 3),
        torch.zeros(3, 5, 7, dtype=torch.uint8),
        torch.zeros(2, 1, 5, 7),
        torch.zeros(5, 7),
    ],
)
def test_normalize_refuses_images_of_a_wrong_kind(images):
    with pytest.raises(ConfigError, match=r"images must be \(3, H, W\) floats in \[0, 1\], got .* divide 8-bit"):
        Normalize(3)(images)
