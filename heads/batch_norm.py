"""Batch normalisation for heads, whose batches may be as small as nothing."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that also trains where a batch has one value per channel, or none.

    There (a single image pooled to 1 x 1, a crop of one cell, an image without proposals) no batch statistics exist:
    the running ones are used and left as they are. Everywhere else it is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] <= 1:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)
