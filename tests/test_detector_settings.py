import json
from dataclasses import fields

import pytest

from swin_dense.errors import ConfigError
from swin_dense.heads.detector_settings import DetectorSettings

NUMBERS = {
    "num_classes": 3,
    "fpn_channels": 4,
    "box_head_channels": 5,
    "mask_head_channels": 6,
    "score_threshold": 0.0,
    "max_detections": 7,
    "anchor_scale": 8.0,
    "max_proposals": 9,
    "samples_per_image": 10,
    "ignore_overlap": None,
    "image_mean": (0.5, 0.25),
    "image_std": None,
}
COUNTS = sorted(name for name, value in NUMBERS.items() if isinstance(value, int))


def test_plain_settings_build_the_same_again_after_json():
    plain = DetectorSettings(**NUMBERS).plain()
    assert json.loads(json.dumps(plain)) == plain == {**NUMBERS, "image_mean": [0.5, 0.25]}
    assert list(plain) == [field.name for field in fields(DetectorSettings)]
    assert DetectorSettings(**plain).plain() == plain


@pytest.mark.parametrize("name", COUNTS)
def test_counts_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be 1 or more, got 0"):
        DetectorSettings(**{**NUMBERS, name: 0})


def test_an_anchor_scale_must_be_positive():
    with pytest.raises(ConfigError, match=r"anchor_scale must be above 0, got 0\.0"):
        DetectorSettings(**{**NUMBERS, "anchor_scale": 0.0})


@pytest.mark.parametrize("overlap", [0.0, -0.5, 1.5])
def test_an_ignore_overlap_is_a_share(overlap):
    with pytest.raises(ConfigError, match="ignore_overlap must be above 0 and at most 1, or None, got"):
        DetectorSettings(**{**NUMBERS, "ignore_overlap": overlap})
    assert DetectorSettings(**{**NUMBERS, "ignore_overlap": 1.0}).ignore_overlap == 1.0
