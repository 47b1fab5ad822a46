"""Weights from any published family's files into models, with a receipt, and back into any family's format."""

from swin_dense.weights.loading import load_weights, read_config
from swin_dense.weights.report import WeightsReport

__all__ = ["WeightsReport", "load_weights", "read_config"]
