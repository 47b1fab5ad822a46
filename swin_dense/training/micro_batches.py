"""What the loop asks of a batch, and the gradient of one: whole, or in parts that add up to the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from swin_dense.training.loss_terms import LossTerm, means, shares, total
from swin_dense.training.random_state import RandomState


class Batch(Protocol):
    """Some images with what is known of them."""

    @property
    def ids(self) -> Sequence[int | str]:
        """What each image is called in its data set."""

    def describe(self) -> str:
        """The images by id and size, for messages."""

    def split(self, parts: int) -> list[Self]:
        """The same images in so many batches of about equal length, or in fewer where there are fewer images.

        A model must see an image in a part as it sees it in the whole: padded to the same size.
        """

    def plain(self) -> dict[str, Any]:
        """Everything in it as tensors, numbers, strings, and lists and dicts of these."""


B = TypeVar("B", bound=Batch)
Forward = Callable[[B], Mapping[str, LossTerm]]


@dataclass(frozen=True)
class MicroBatch(Generic[B]):
    """A batch after its backward pass.

    Args:
        batch: The batch.
        random_state: With which its forward pass began.
        losses: By name, detached.
    """

    batch: B
    random_state: RandomState
    losses: dict[str, Tensor]


def even_slices(count: int, parts: int) -> Iterator[slice]:
    """Yields slices that cut so many things into parts whose lengths differ by one at most; none is empty."""
    parts = max(1, min(parts, count))
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


def add_gradient(forward: Forward[B], batch: B, divisor: int) -> dict[str, Tensor]:
    """Adds the gradient of a batch's summed losses, divided by a number; returns the losses, detached."""
    losses = means(forward(batch))
    (total(losses) / divisor).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def add_gradient_in_parts(
    forward: Forward[B], parts: Sequence[B], divisor: int, go_back: Callable[[], None]
) -> dict[str, Tensor]:
    """As `add_gradient` of the whole batch, from its parts one after another: no more memory than one part needs.

    Each loss of a part counts in proportion to what it is the mean over, see `loss_terms.shares`. A first pass
    without gradients learns these counts, which for a detector depend on its own proposals; the second starts from the
    same random numbers. So the result is that of the whole batch, up to rounding, but for what is drawn at random or
    taken over the batch: dropped paths and sampled boxes are drawn anew, BatchNorm sees one part at a time.

    Args:
        forward: Losses of a part.
        parts: Of one batch.
        divisor: As in `add_gradient`.
        go_back: Called between the passes: to the random state and the running statistics before the first.
    """
    with torch.no_grad():
        counts = [{name: int(term.count) for name, term in forward(part).items()} for part in parts]
    go_back()
    sums: dict[str, Tensor] = {}
    for part, share in zip(parts, shares(counts), strict=True):
        losses = {name: share[name] * term.mean for name, term in forward(part).items()}
        (total(losses) / divisor).backward()
        for name, loss in losses.items():
            sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
    return sums
