"""The losses of all heads, as pure functions. Means are taken over the counts that the published models use."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.upsampling import combine_columns, combine_rows, interpolation_matrix, spans

LABEL_SMOOTHING = 0.1
"""Of the official training of classifiers: this share of each image's class is spread over all classes."""


def proposal_losses(
    objectness: Tensor, deltas: Tensor, labels: Tensor, delta_targets: Tensor, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Objectness and box losses of the sampled anchors of a batch.

    Args:
        objectness: (N,) logits.
        deltas: (N, 4) predicted offsets.
        labels: (N,) 1 object, 0 background, below 0 for places without a sample.
        delta_targets: (N, 4) wanted offsets of the objects.
        beta: Where the smooth L1 of the offsets turns from a parabola into a line; 0 is plain L1.

    Returns:
        Binary cross-entropy, mean over the samples; smooth L1, summed over the objects and divided by the samples.
    """
    is_object, is_sample = labels > 0, labels >= 0
    entropy = functional.binary_cross_entropy_with_logits(objectness, is_object.to(objectness.dtype), reduction="none")
    delta_targets = torch.where(is_object[:, None], delta_targets, 0)
    distance = functional.smooth_l1_loss(deltas, delta_targets, reduction="none", beta=beta).sum(dim=1)
    count = is_sample.sum().clamp(min=1)
    return torch.where(is_sample, entropy, 0).sum() / count, torch.where(is_object, distance, 0).sum() / count


def classification_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the sampled proposals of a batch, mean over the samples; 0 without any.

    Args:
        class_logits: (N, K + 1), background first.
        labels: (N,) int64, 0 is background, -1 a place without a sample.
    """
    total = functional.cross_entropy(class_logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def image_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of whole images with smoothed labels, mean over B.

    Args:
        logits: (B, K).
        targets: (B,) int64 classes, or (B, K) shares of each class.
    """
    return functional.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)


def offset_loss(deltas: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """L1 of the objects' offsets, summed and divided by the number of all sampled proposals.

    Args:
        deltas: (N, 4) predicted offsets of the true classes.
        targets: (N, 4) wanted offsets of the objects.
        labels: (N,) above 0 for objects, 0 for background, below 0 for places without a sample.
    """
    is_object = labels > 0
    distance = (deltas - torch.where(is_object[:, None], targets, 0)).abs().sum(dim=1)
    return torch.where(is_object, distance, 0).sum() / (labels >= 0).sum().clamp(min=1)


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
        labels: (N,) int64 from 1; otherwise the place holds no object.
        targets: (N, M, M), 0 or 1.
    """
    is_object = labels > 0
    of_class = labels.clamp(min=0)[:, None, None, None].expand(-1, 1, *mask_logits.shape[2:])
    logits = mask_logits.gather(1, of_class)[:, 0]
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=(1, 2))
    # Without objects the sum keeps the mask head in the graph, so that every process has its gradients.
    return torch.where(is_object, entropy, 0).sum() / (is_object.sum() * targets.shape[1] * targets.shape[2]).clamp(
        min=1
    )


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


def upsampled_segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`segmentation_loss` of logits resized bilinearly to the size of the labels, which is where a network gives them.

    150 classes at 512 x 512 are 150 MiB an image, and their gradient again. Here they are made and used up tile by
    tile. The gradient of the small logits is computed beside the loss, only where one will be asked for.

    Args:
        logits: (B, K, h, w); computed with in float32 at least.
        labels: (B, H, W) integers in [0, K) or 255, which is ignored.
    """
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    total, _ = upsampled_cross_entropy(at_least_float32(logits), labels, with_gradient)
    return total / labels.numel()


TILE_VALUES = {"cpu": 2**19, "cuda": 2**25}
"""Full-size logits in memory at once: 2 MiB stay in a processor's cache; 128 MiB take a GPU longer than a launch."""


@torch.library.custom_op("swin_dense::upsampled_cross_entropy", mutates_args=())
def upsampled_cross_entropy(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """What `upsampled_segmentation_loss` divides, with its gradient; to `torch.compile` it is one step.

    Args:
        logits: (B, K, h, w) in float32 or float64.
        labels: (B, H, W) integers in [0, K) or 255, which is ignored.
        with_gradient: Whether to compute the gradient.

    Returns:
        The cross-entropy, summed over the labelled pixels; its gradient (B, K, h, w), or an empty tensor.
    """
    logits = logits.permute(0, 2, 3, 1).contiguous()
    (batch, height, width, num_classes), (_, new_height, new_width) = logits.shape, labels.shape
    row_weights = interpolation_matrix(height, new_height, logits.dtype, logits.device)
    column_weights = interpolation_matrix(width, new_width, logits.dtype, logits.device)
    side = max(16, math.isqrt(TILE_VALUES.get(logits.device.type, 2**25) // (batch * num_classes)))
    total, gradient = logits.new_zeros(()), torch.zeros_like(logits if with_gradient else logits[:0])
    with torch.autocast(logits.device.type, enabled=False):
        for rows, columns in product(spans(height, new_height, side), spans(width, new_width, side)):
            sources = (slice(None), rows.sources, columns.sources)
            of_rows, of_columns = row_weights[rows.cells, rows.sources], column_weights[columns.cells, columns.sources]
            tile = combine_rows(combine_columns(logits[sources], of_columns), of_rows)
            loss, slope = _cross_entropy(tile, labels[:, rows.cells, columns.cells].long(), with_gradient)
            total += loss
            if slope is not None:
                gradient[sources] += combine_columns(combine_rows(slope, of_rows.T), of_columns.T)
    return total, gradient.permute(0, 3, 1, 2)


def _cross_entropy(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Logits (..., K) with labels (...): the sum over the labelled, and its gradient."""
    is_ignored = (labels == IGNORED_LABEL)[..., None]
    index = labels[..., None].masked_fill(is_ignored, 0)
    log_probabilities = logits.log_softmax(dim=-1)
    of_labels = log_probabilities.gather(-1, index).masked_fill_(is_ignored, 0)
    if not with_gradient:
        return -of_labels.sum(), None
    # Of a class it is the probability, of the label's class that minus 1.
    slope = log_probabilities.exp_().scatter_(-1, index, of_labels.expm1())
    return -of_labels.sum(), slope.masked_fill_(is_ignored, 0)


@upsampled_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = logits.shape
    gradient = logits.new_empty(batch if with_gradient else 0, height, width, channels)
    return logits.new_empty(()), gradient.permute(0, 3, 1, 2)


def _keep_gradient(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _scaled_gradient(ctx: BackwardCFunction, scale: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    (gradient,) = ctx.saved_tensors
    return gradient * scale, None, None


upsampled_cross_entropy.register_autograd(_scaled_gradient, setup_context=_keep_gradient)
