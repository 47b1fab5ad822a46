"""Which samples make up which training batch: a pure function of seed and batch number, so that a run can resume."""

from collections.abc import Iterator, Sequence

import numpy as np

from swin_dense.datasets.transforms import sample_seed
from swin_dense.errors import ConfigError

Key = tuple[int, int]
"""(epoch, index): what a data set needs to give a sample its augmentation."""


class TrainingBatches:
    """An endless, or counted, sequence of batches for `DataLoader(batch_sampler=…)`.

    A global batch is `batch_size * world_size` samples of one group; process `rank` gets its slice of it. In each epoch
    every group is shuffled and cut into global batches, the last of which is filled up from the start of that group's
    order; then the batches of all groups are shuffled. So every sample comes at least once an epoch.

    Everything follows from the arguments alone: to resume after n batches, pass `start_batch=n`.

    Args:
        num_samples: length of the data set.
        batch_size: samples per batch and process.
        seed: the run's seed.
        groups: (num_samples,) integers; a batch holds samples of one group only, for example wide or tall images.
            None puts all in one group.
        rank: number of this process, from 0.
        world_size: number of processes.
        start_batch: number of the first batch, counted from the start of training.
        num_batches: how many batches to yield from there on; None goes on without end.

    Yields:
        lists of `batch_size` keys (epoch, index).

    Raises:
        ConfigError: an argument is out of range, or `groups` has another length.

    Example:
        >>> batches = TrainingBatches(5, 2, seed=0, num_batches=3)
        >>> sorted({index for batch in batches for _, index in batch})
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        groups: Sequence[int] | np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        num_batches: int | None = None,
    ) -> None:
        self._groups = _checked_groups(num_samples, batch_size, groups, world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(f"batches: rank must lie in 0..{world_size - 1}, got {rank}")
        if start_batch < 0 or (num_batches is not None and num_batches < 0):
            raise ConfigError(
                f"batches: start_batch and num_batches must not be negative, got {start_batch}, {num_batches}"
            )
        self._batch_size = batch_size
        self._world_size = world_size
        self._rank = rank
        self._seed = seed
        self._start_batch = start_batch
        self._num_batches = num_batches
        self.per_epoch = batches_per_epoch(num_samples, batch_size, groups, world_size)

    def __len__(self) -> int:
        if self._num_batches is None:
            raise TypeError("TrainingBatches without num_batches goes on without end and has no length")
        return self._num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        number = self._start_batch
        end = None if self._num_batches is None else number + self._num_batches
        while end is None or number < end:
            epoch, first = divmod(number, self.per_epoch)
            for batch in self._epoch_batches(epoch)[first:]:
                if end is not None and number >= end:
                    return
                own = batch[self._rank * self._batch_size : (self._rank + 1) * self._batch_size]
                yield [(epoch, int(index)) for index in own]
                number += 1

    def _epoch_batches(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng(sample_seed(self._seed, epoch, _ORDER_STREAM))
        size = self._batch_size * self._world_size
        batches = []
        for group in np.unique(self._groups):
            order = generator.permutation(np.flatnonzero(self._groups == group))
            batches.append(np.resize(order, (-(-len(order) // size), size)))
        return generator.permutation(np.concatenate(batches))


# No sample has this index, so the order of an epoch never shares its random numbers with an augmentation.
_ORDER_STREAM = 2**63


def batches_per_epoch(
    num_samples: int, batch_size: int, groups: Sequence[int] | np.ndarray | None = None, world_size: int = 1
) -> int:
    """Returns how many batches each process gets in an epoch of `TrainingBatches` with these arguments.

    Raises:
        ConfigError: an argument is out of range, or `groups` has another length.
    """
    _, counts = np.unique(_checked_groups(num_samples, batch_size, groups, world_size), return_counts=True)
    size = batch_size * world_size
    return int(sum(-(-int(count) // size) for count in counts))


def _checked_groups(
    num_samples: int, batch_size: int, groups: Sequence[int] | np.ndarray | None, world_size: int
) -> np.ndarray:
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
        if value < 1:
            raise ConfigError(f"batches: {name} must be at least 1, got {value}")
    if groups is None:
        return np.zeros(num_samples, np.int64)
    if len(groups) != num_samples:
        raise ConfigError(f"batches: groups needs one number per sample ({num_samples}), got {len(groups)}")
    return np.asarray(groups)
