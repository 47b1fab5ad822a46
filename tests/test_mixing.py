import pytest
import torch

from swin_dense.datasets.mixing import Mix, draw_mix
from swin_dense.errors import ConfigError

IMAGES = torch.rand(5, 3, 17, 23, generator=torch.Generator().manual_seed(0))
TARGETS = torch.eye(5)


def drawn(count, mixup_alpha, cutmix_alpha, size_hw=(17, 23)):
    torch.manual_seed(0)
    return [draw_mix(size_hw, mixup_alpha, cutmix_alpha) for _ in range(count)]


def test_blend_is_the_share_of_each_image_and_of_its_partners():
    mix = Mix(0.7, None)
    assert torch.allclose(mix.images(IMAGES)[1], 0.7 * IMAGES[1] + 0.3 * IMAGES[3])
    assert torch.allclose(mix.targets(TARGETS)[1], 0.7 * TARGETS[1] + 0.3 * TARGETS[3])
    assert torch.allclose(mix.targets(TARGETS)[2], TARGETS[2])


def test_box_holds_the_partner_and_the_rest_the_image():
    before = IMAGES.clone()
    mixed = Mix(0.5, (2, 3, 11, 20)).images(IMAGES)
    assert torch.equal(IMAGES, before)
    inside = torch.zeros(17, 23, dtype=torch.bool)
    inside[2:11, 3:20] = True
    assert torch.equal(mixed, torch.where(inside, IMAGES.flip(0), IMAGES))


def test_share_is_the_area_outside_the_box():
    for mix in drawn(200, 0.0, 1.0):
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 17 and 0 <= left <= right <= 23
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / (17 * 23))
    assert min(mix.share for mix in drawn(200, 0.0, 1.0)) < 0.4


def test_targets_stay_shares_of_one():
    for mix in drawn(50, 0.8, 1.0):
        mixed = mix.targets(TARGETS)
        assert torch.allclose(mixed.sum(dim=1), torch.ones(5)) and (mixed >= 0).all()


def test_both_kinds_come_half_the_time_and_one_kind_alone_always():
    assert 0.4 < sum(mix.box is None for mix in drawn(400, 0.8, 1.0)) / 400 < 0.6
    assert all(mix.box is None for mix in drawn(20, 0.8, 0.0))
    assert all(mix.box is not None for mix in drawn(20, 0.0, 1.0))
    mean = sum(mix.share for mix in drawn(400, 0.8, 0.0)) / 400
    assert 0.45 < mean < 0.55


def test_no_mix_changes_nothing_and_draws_nothing():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    mix = draw_mix((17, 23), 0.0, 0.0)
    assert mix.images(IMAGES) is IMAGES and mix.targets(TARGETS) is TARGETS
    assert torch.equal(torch.get_rng_state(), state)


def test_negative_alpha_is_refused():
    with pytest.raises(ConfigError, match=r"mixup_alpha and cutmix_alpha must be from 0, got -1, 0"):
        draw_mix((17, 23), -1, 0)
