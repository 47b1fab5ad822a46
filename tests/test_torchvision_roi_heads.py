from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads

from swin_dense.features import FeatureSpec
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.roi_heads import published_roi_heads
from swin_dense.heads.torchvision_roi_heads import torchvision_roi_heads

SPECS = {f"p{k}": FeatureSpec(4, 2**k) for k in (2, 3, 4, 5)}
SETTINGS = DetectorSettings(
    num_classes=3,
    fpn_channels=4,
    box_head_channels=16,
    mask_head_channels=6,
    score_threshold=0.05,
    max_detections=100,
    anchor_scale=8.0,
    max_proposals=1000,
    samples_per_image=512,
    ignore_overlap=0.5,
    image_mean=None,
    image_std=None,
)


def heads_of(build=published_roi_heads):
    return build(SPECS, SETTINGS)


def test_torchvision_style_is_what_torchvision_builds():
    heads = heads_of(torchvision_roi_heads)
    assert isinstance(heads, TorchvisionRoIHeads)
    assert [pool.sampling_ratio for pool in (heads.box_roi_pool, heads.mask_roi_pool)] == [2, 2]
    assert heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert not heads.proposal_matcher.allow_low_quality_matches


def test_both_styles_have_the_same_parameters():
    one, other = heads_of(), heads_of(torchvision_roi_heads)
    shapes = [{name: value.shape for name, value in heads.state_dict().items()} for heads in (one, other)]
    assert shapes[0] == shapes[1]
