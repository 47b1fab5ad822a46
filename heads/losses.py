"""The losses of all heads, as pure functions. Means are taken over the counts that the published models use."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from swin_dense.conventions import IGNORED_LABEL

LABEL_SMOOTHING = 0.1
"""Of the official training of classifiers: this share of each image's class is spread over all classes."""


def proposal_losses(
    objectness: Tensor,
    deltas: Tensor,
    labels: Tensor,
    delta_targets: Tensor,
    positive_rows: Tensor,
    sampled_rows: Tensor,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Objectness and box losses of the sampled anchors of a batch.

    Args:
        objectness: (A,) logits.
        deltas: (A, 4) predicted offsets.
        labels: (A,) 1 object, 0 background.
        delta_targets: (A, 4) wanted offsets.
        positive_rows: The sampled anchors that are objects.
        sampled_rows: All sampled anchors.
        beta: Where the smooth L1 of the offsets turns from a parabola into a line; 0 is plain L1.

    Returns:
        Binary cross-entropy, mean over the sampled anchors; smooth L1, summed over the positive and divided by the
        sampled.
    """
    count = max(len(sampled_rows), 1)
    objectness_loss = functional.binary_cross_entropy_with_logits(
        objectness[sampled_rows], labels[sampled_rows].to(objectness.dtype), reduction="sum"
    )
    box_loss = functional.smooth_l1_loss(
        deltas[positive_rows], delta_targets[positive_rows], reduction="sum", beta=beta
    )
    return objectness_loss / count, box_loss / count


def classification_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the sampled proposals of a batch, mean over N; 0 without any.

    Args:
        class_logits: (N, K + 1), background first.
        labels: (N,) int64, 0 is background.
    """
    return functional.cross_entropy(class_logits, labels, reduction="sum") / max(len(labels), 1)


def image_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of whole images with smoothed labels, mean over B.

    Args:
        logits: (B, K).
        targets: (B,) int64 classes, or (B, K) shares of each class.
    """
    return functional.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)


def offset_loss(deltas: Tensor, targets: Tensor, num_samples: int) -> Tensor:
    """L1 of the objects' offsets, summed and divided by the number of all sampled proposals.

    Args:
        deltas: (P, 4) predicted offsets of the true classes.
        targets: (P, 4) wanted offsets.
        num_samples: N.
    """
    return functional.l1_loss(deltas, targets, reduction="sum") / max(num_samples, 1)


def overlap_loss(boxes: Tensor, targets: Tensor, num_samples: int) -> Tensor:
    """1 - GIoU of the objects' boxes, summed and divided by the number of all sampled proposals.

    Generalized Intersection over Union (Rezatofighi et al., 2019), https://arxiv.org/abs/1902.09630.

    Args:
        boxes: (P, 4) predicted boxes xyxy of the true classes.
        targets: (P, 4) wanted boxes xyxy.
        num_samples: N.
    """
    return generalized_box_iou_loss(boxes, targets, reduction="sum") / max(num_samples, 1)


def mask_loss(mask_logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the true class's mask, mean over all pixels of all objects; 0 without objects.

    Args:
        mask_logits: (N, K + 1, M, M).
        labels: (N,) int64 from 1.
        targets: (N, M, M), 0 or 1.
    """
    if len(labels) == 0:
        return mask_logits.sum() * 0  # keeps the mask head in the graph, so that every process has its gradients
    rows = labels.new_tensor(range(len(labels)))
    return functional.binary_cross_entropy_with_logits(mask_logits[rows, labels], targets)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a label map, summed over the labelled pixels and divided by ALL pixels.

    The published UPerNets count ignored pixels in the mean (mmsegmentation's `avg_non_ignore=False`). A crop without
    any label gives 0.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) integers in [0, K) or 255, which is ignored.
    """
    total = functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / labels.numel()
