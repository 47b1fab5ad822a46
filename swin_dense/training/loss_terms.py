"""Losses with the counts that they are means over: so the parts of a batch join to the loss of the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """One named loss of a batch.

    Args:
        mean: Scalar, as it is summed with the others: its weight is in it.
        count: How many things it is the mean over: sampled boxes, objects, pixels, images. 0 goes with a mean of 0. A
            scalar tensor where only the device knows.
    """

    mean: Tensor
    count: int | Tensor

    def times(self, weight: float) -> "LossTerm":
        """The same loss with a weight."""
        return LossTerm(weight * self.mean, self.count)


def means(terms: Mapping[str, LossTerm]) -> dict[str, Tensor]:
    """The losses alone, by name."""
    return {name: term.mean for name, term in terms.items()}


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The one place where losses are summed; weights belong to whoever computes them."""
    return torch.stack(list(losses.values())).sum()


def shares(counts_of_parts: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
    """What the mean of each part weighs in the mean of the whole.

    Args:
        counts_of_parts: For each part of a batch the counts of its losses by name.

    Returns:
        Likewise, the count of the part over that of all parts; 0 where all are 0.
    """
    return [
        {name: count / max(1, sum(other[name] for other in counts_of_parts)) for name, count in counts.items()}
        for counts in counts_of_parts
    ]
