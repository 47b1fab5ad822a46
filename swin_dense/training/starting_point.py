"""Where a step began: what a forward pass changes besides gradients, to be taken back when the step is made again."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swin_dense.training.random_state import RandomState, random_state, set_random_state

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def running_statistics(model: nn.Module) -> Iterator[Tensor]:
    """Yields what BatchNorm layers keep of the batches they have seen."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            yield from module.buffers(recurse=False)


@dataclass(frozen=True)
class StartingPoint:
    """State of the random generators and of the running statistics.

    Args:
        model: Whose statistics they are.
        random_state: Of this process.
        statistics: Copies, in the order of `running_statistics`.
    """

    model: nn.Module
    random_state: RandomState
    statistics: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "StartingPoint":
        """The present state."""
        return cls(model, random_state(), [tensor.clone() for tensor in running_statistics(model)])

    @torch.no_grad()
    def go_back(self) -> None:
        """Makes it the present state again."""
        set_random_state(self.random_state)
        for tensor, former in zip(running_statistics(self.model), self.statistics, strict=True):
            tensor.copy_(former)
