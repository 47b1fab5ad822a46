"""The rows of metrics.csv for TensorBoard too, where somebody wants them there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from swin_dense.errors import ConfigError


class TensorboardLog:
    """Writes numbers by step into a folder that TensorBoard shows.

    Args:
        folder: Where to write; a run that goes on writes beside what is there.
        resume_step: Later steps of a run that goes on are not shown twice.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "run.tensorboard needs TensorBoard: pip install 'swin-dense[tensorboard]', or leave it out."
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def append(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add the numbers of a step; None, an undefined value, is left out. They are on the disk afterwards."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name.replace("_", "/", 1), value, step)
        self._writer.flush()
