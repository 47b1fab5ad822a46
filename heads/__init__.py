"""FPN, Mask R-CNN, Cascade Mask R-CNN and UPerNet on one backbone."""

from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.fpn import FPN
from swin_dense.heads.mask_rcnn import MaskRCNN, mask_rcnn
from swin_dense.heads.upernet import UPerNet, upernet

__all__ = ["FPN", "MaskRCNN", "UPerNet", "cascade_mask_rcnn", "mask_rcnn", "upernet"]
