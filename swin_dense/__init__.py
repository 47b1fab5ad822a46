"""Swin Transformers for detection and segmentation in plain PyTorch.

`import swin_dense` is light: torch is imported when the first name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swin_dense.config import VARIANTS, SwinConfig, variant_config
from swin_dense.errors import (
    AnnotationError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    ImageError,
    Interrupted,
    SwinDenseError,
)
from swin_dense.features import FeatureSpec

if TYPE_CHECKING:
    from swin_dense.box_masks import BoxMasks
    from swin_dense.classification import Classifier, classifier
    from swin_dense.compilation import compile, compiled_calls
    from swin_dense.swin import SwinTransformer, create_backbone
    from swin_dense.weights import WeightsReport, load_weights, read_config
    from swin_dense.window_attention import attention_implementation

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AnnotationError",
    "BoxMasks",
    "CheckpointError",
    "Classifier",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "FeatureSpec",
    "ImageError",
    "Interrupted",
    "SwinConfig",
    "SwinDenseError",
    "SwinTransformer",
    "WeightsReport",
    "attention_implementation",
    "classifier",
    "compile",
    "compiled_calls",
    "create_backbone",
    "load_weights",
    "read_config",
    "variant_config",
]

_NEEDS_TORCH = {
    "BoxMasks": "swin_dense.box_masks",
    "Classifier": "swin_dense.classification",
    "classifier": "swin_dense.classification",
    "compile": "swin_dense.compilation",
    "compiled_calls": "swin_dense.compilation",
    "SwinTransformer": "swin_dense.swin",
    "create_backbone": "swin_dense.swin",
    "WeightsReport": "swin_dense.weights",
    "load_weights": "swin_dense.weights",
    "read_config": "swin_dense.weights",
    "attention_implementation": "swin_dense.window_attention",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'swin_dense' has no attribute {name!r}")
    return getattr(import_module(_NEEDS_TORCH[name]), name)
