"""torchvision's Mask R-CNN on the Swin backbone of any library, as large as ours and with our weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from swin_dense.config import STAGE_NAMES, SwinConfig
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE
from swin_dense.heads.mask_rcnn import MaskRCNN
from swin_dense.weights.recognition import recognise
from swin_dense.weights.writing import in_format

_CANONICAL_SIDE = 224
"""A box of this side belongs to level 4 of a pyramid whose anchors have the published scale (Lin et al., 2017)."""

_HEAD_PARTS = ("rpn.", "roi_heads.", "backbone.fpn.")


def torchvision_mask_rcnn(
    architecture: Mapping[str, Any], body: nn.Module, short_edge: int, max_long_edge: int
) -> nn.Module:
    """The MaskRCNN and pyramid of torchvision on any backbone, with our numbers and its defaults for the rest.

    Args:
        architecture: Of our Mask R-CNN.
        body: Images to {name: (B, C, h, w)}, strides 4 to 32.
        short_edge: To which it resizes images that it predicts; those that it is trained on stay as they are.
        max_long_edge: At most so long.
    """
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    channels, proposals, scale = (architecture[name] for name in ("fpn_channels", "max_proposals", "anchor_scale"))
    box_width, mask_width = architecture["box_head_channels"], architecture["mask_head_channels"]
    num_classes = architecture["num_classes"] + 1  # background is its first
    canonical_side = round(_CANONICAL_SIDE * scale / PUBLISHED_ANCHOR_SCALE)
    return MaskRCNN(
        _Pyramid(body, SwinConfig.from_dict(architecture["backbone"]), channels),
        min_size=short_edge,
        max_size=max_long_edge,
        rpn_anchor_generator=AnchorGenerator(
            tuple((scale * stride,) for stride in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5
        ),
        rpn_pre_nms_top_n_train=2 * proposals,
        rpn_post_nms_top_n_train=2 * proposals,
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(STAGE_NAMES, 7, 2, canonical_scale=canonical_side),
        box_head=TwoMLPHead(7 * 7 * channels, box_width),
        box_predictor=FastRCNNPredictor(box_width, num_classes),
        box_score_thresh=architecture["score_threshold"],
        box_detections_per_img=architecture["max_detections"],
        box_batch_size_per_image=architecture["samples_per_image"],
        mask_roi_pool=MultiScaleRoIAlign(STAGE_NAMES, 14, 2, canonical_scale=canonical_side),
        mask_head=MaskRCNNHeads(channels, (mask_width,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(mask_width, mask_width, num_classes),
        _skip_resize=True,  # in training, where the batches are resized already
    )


class _Pyramid(nn.Module):
    """torchvision's pyramid on a backbone's maps; its parts are named as in torchvision's `BackboneWithFPN`."""

    def __init__(self, body: nn.Module, config: SwinConfig, channels: int) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        widths = [config.stage_channels(stage) for stage in range(len(config.depths))]
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to {"c2": (B, channels, H/4, W/4), … "c5", "pool"}."""
        return self.fpn(self.body(images))


def torchvision_twin(model: MaskRCNN, body: nn.Module) -> nn.Module:
    """The MaskRCNN of torchvision with the weights of ours, which takes images as they are, as ours does.

    Args:
        model: Ours.
        body: A backbone with the weights of ours, which returns its maps by our names.
    """
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    class UnresizedImages(GeneralizedRCNNTransform):
        def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:  # noqa: ANN401 - torchvision's
            return image, target

    twin: Any = torchvision_mask_rcnn(model.architecture, body, short_edge=1, max_long_edge=1)
    twin.transform = UnresizedImages(1, 1, twin.transform.image_mean, twin.transform.image_std)
    written = in_format(recognise(model.state_dict(), "swin-dense"), "torchvision").tensors
    of_heads = {name: value for name, value in written.items() if name.startswith(_HEAD_PARTS)}
    missing, unexpected = twin.load_state_dict(of_heads, strict=False)
    assert not unexpected and all(name.startswith("backbone.body.") for name in missing), (missing, unexpected)
    return twin
