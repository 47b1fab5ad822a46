"""A trained model in one file: weights, architecture, class names and recipe. A path is all that loading needs.

The file is safetensors: tensors and text, nothing that could be executed. The text lies under "swin_dense" as JSON:

    {"format": 1, "architecture": {"head": a name in BUILDERS, …}, "labels": {…}, "recipe": {…}, …}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from swin_dense.classification import Classifier, classifier
from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import MaskRCNN, mask_rcnn
from swin_dense.heads.upernet import UPerNet, upernet
from swin_dense.swin import SwinTransformer
from swin_dense.training.atomic_file import atomic_write

Model = MaskRCNN | UPerNet | Classifier
BUILDERS: dict[str, Callable[..., Model]] = {
    "mask_rcnn": mask_rcnn,
    "cascade_mask_rcnn": cascade_mask_rcnn,
    "upernet": upernet,
    "classifier": classifier,
}
_METADATA_KEY = "swin_dense"
_FORMAT = 1


def save_model(path: str | Path, model: Model, about: Mapping[str, Any]) -> None:
    """Write a model; a file of that name is replaced in one step, never half.

    Args:
        path: Where to; ends in .safetensors.
        model: What to write.
        about: Plain JSON types that travel with it, such as {"labels": …, "recipe": …}.
    """
    from safetensors.torch import save

    text = json.dumps({**about, "format": _FORMAT, "architecture": model.architecture})
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(Path(path)) as file:
        file.write(save(tensors, metadata={_METADATA_KEY: text}))


def load_model(path: str | Path) -> tuple[Model, dict[str, Any]]:
    """Rebuild the model of a file, in evaluation mode on the CPU.

    Returns:
        The model, and what `save_model` got as `about` (with "format" and "architecture").

    Raises:
        CheckpointError: The file is missing, damaged, or not written by `save_model`.
    """
    about = read_about(path)
    try:
        model = build_model(about["architecture"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _load_all(model, path)
    return model.eval(), about


def read_about(path: str | Path) -> dict[str, Any]:
    """The text of a model file without its weights.

    Raises:
        CheckpointError: As for `load_model`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(
            f"{path}: there is no such model file; a run folder holds best.safetensors and last.safetensors."
        )
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from None
    if text is None:
        raise CheckpointError(
            f"{path}: holds weights but not what model they belong to; "
            "build the model yourself and use load_weights(model, path)."
        )
    try:
        about = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the text beside the weights is damaged ({error}).") from None
    found = about.get("format") if isinstance(about, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{path}: format {found!r}; this version reads format {_FORMAT}.")
    if not isinstance(about.get("architecture"), dict):
        raise CheckpointError(f"{path}: the text beside the weights has no architecture.")
    return about


def build_model(architecture: Mapping[str, Any]) -> Model:
    """A model from the plain types of its `architecture`, with random weights.

    Raises:
        ConfigError: The head or one of its settings is unknown.
    """
    settings = dict(architecture)
    head = settings.pop("head", None)
    if head not in BUILDERS:
        raise ConfigError(f"there is no head {head!r}; known are {', '.join(BUILDERS)}.")
    if "backbone" not in settings:
        raise ConfigError(f"the architecture of a {head} needs a backbone.")
    # Built here, so that every field is as it was: a builder may give a mere configuration its own defaults.
    backbone = SwinTransformer(SwinConfig.from_dict(settings.pop("backbone")))
    for name in settings:
        if name not in signature(BUILDERS[head]).parameters:
            raise ConfigError(f"{head} has no setting {name!r}; the file may come from a newer version.")
    return BUILDERS[head](backbone, **settings)


def _load_all(model: nn.Module, path: str | Path) -> None:
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the architecture in the same file: {error}") from None
