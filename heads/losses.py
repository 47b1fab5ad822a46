"""The losses of all heads, as pure functions. Means are taken over the counts that the published models use."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from torchvision.ops import roi_align

from swin_dense.conventions import IGNORED_LABEL


def proposal_losses(
    objectness: Tensor,
    deltas: Tensor,
    labels: Tensor,
    delta_targets: Tensor,
    positive_rows: Tensor,
    sampled_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Objectness and box losses of the sampled anchors of a batch.

    Args:
        objectness: (A,) logits.
        deltas: (A, 4) predicted offsets.
        labels: (A,) 1 object, 0 background.
        delta_targets: (A, 4) wanted offsets.
        positive_rows: The sampled anchors that are objects.
        sampled_rows: All sampled anchors.

    Returns:
        Binary cross-entropy, mean over the sampled anchors; L1, summed over the positive and divided by the sampled.
    """
    count = max(len(sampled_rows), 1)
    objectness_loss = functional.binary_cross_entropy_with_logits(
        objectness[sampled_rows], labels[sampled_rows].to(objectness.dtype), reduction="sum"
    )
    box_loss = functional.l1_loss(deltas[positive_rows], delta_targets[positive_rows], reduction="sum")
    return objectness_loss / count, box_loss / count


def box_losses(class_logits: Tensor, deltas: Tensor, labels: Tensor, delta_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Classification and box losses of the sampled proposals of a batch.

    Args:
        class_logits: (N, K + 1), background first.
        deltas: (N, 4 (K + 1)) offsets, one group per class.
        labels: (N,) int64, 0 is background.
        delta_targets: (N, 4).

    Returns:
        Cross-entropy, mean over N; L1 of the true class's offsets, summed over objects and divided by N.
    """
    count = max(len(labels), 1)
    class_loss = functional.cross_entropy(class_logits, labels, reduction="sum") / count
    rows = (labels > 0).nonzero().squeeze(1)
    chosen = deltas.view(*class_logits.shape, 4)[rows, labels[rows]]
    return class_loss, functional.l1_loss(chosen, delta_targets[rows], reduction="sum") / count


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """What the mask head should see in each box: the object's mask, resampled and made binary again.

    Args:
        masks: (G, H, W) uint8 masks of one image's objects.
        boxes: (N, 4) xyxy in pixels.
        matched: (N,) the object of each box.
        size: The side of the mask head's output.

    Returns:
        (N, size, size) float, 0 or 1.
    """
    rois = functional.pad(boxes, (1, 0))
    rois[:, 0] = matched
    pixels = masks[:, None].to(rois.dtype)
    aligned = roi_align(pixels, rois, (size, size), spatial_scale=1.0, sampling_ratio=0, aligned=True)
    return (aligned[:, 0] >= 0.5).to(rois.dtype)


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
