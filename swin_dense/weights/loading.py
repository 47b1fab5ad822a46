"""Weights from a file of any family into a model, with a receipt of what was loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swin_dense.config import SwinConfig
from swin_dense.errors import CheckpointError
from swin_dense.weights.adaptation import class_layout
from swin_dense.weights.files import WeightsFile, read_weights_file, unwrap_weights
from swin_dense.weights.fitting import class_names_of, final_norm_as_last, fit
from swin_dense.weights.recognition import BACKBONE, Recognised, recognise
from swin_dense.weights.report import WeightsReport, a_few

_LEAST_BACKBONE_SHARE = 0.95
_SHOWN_FAULTS = 3


def load_weights(
    model: nn.Module,
    path_or_state_dict: str | Path | Mapping[str, Any] | WeightsFile,
    allow_partial: bool = False,
    *,
    class_names: Sequence[str] | None = None,
    norm_from_classifier: bool = False,
) -> WeightsReport:
    """Set a model's parameters from a checkpoint of any published family.

    The family is told by the names and shapes inside. A backbone takes its share of a detector's file; a detector or
    segmenter takes a bare backbone's or a classifier's file into its backbone. Relative position tables, absolute
    position embeddings and the first convolution are fitted to the model's window, grid and channels.

    Args:
        model: A `SwinTransformer`, or a model that has one as `.backbone`.
        path_or_state_dict: A file (.pth, .pt, .bin, .safetensors, or the index of a sharded one), a name of published
            weights ("imagenet1k", "imagenet22k", "coco", "ade20k" and what else `published.resolve` takes), or an
            opened checkpoint, or a file that is read already.
        allow_partial: Whether to load what fits from a file that is not whole, or of which less than 95 % of the
            backbone fits.
        class_names: The model's classes in order. Where the file names its own, rows are taken by name.
        norm_from_classifier: Whether a classifier's final norm becomes the norm of the last stage. Published detectors
            start that norm afresh.

    Raises:
        CheckpointError: The file cannot be read, is not whole, or too little of it fits. The model is then unchanged.
    """
    targets = _targets(model)
    file = _opened(path_or_state_dict, model)
    found = recognise_file(file)
    if norm_from_classifier or _head_of(model) == "classifier":
        found = final_norm_as_last(found, targets)
    classes = class_names_of(found, file.class_names, class_names, targets)
    values, fates = fit(found, targets, classes)
    prefix = _prefix(model)
    report = WeightsReport(
        source=file.source,
        family=found.family,
        variant=found.variant,
        head=found.head,
        fates=tuple(
            fate if fate.outcome == "unused" else replace(fate, name=fate.name.removeprefix(prefix)) for fate in fates
        ),
        kept_classes=classes.kept,
        notes=file.notes,
    )
    if not allow_partial:
        _require_whole(found, report)
    bad = [name for name, value in values.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{file.source}: values that are not finite in {len(bad)} tensors, the first is {bad[0]}."
        )
    model.load_state_dict({name.removeprefix(prefix): value for name, value in values.items()}, strict=False)
    return report


def read_config(
    path_or_state_dict: str | Path | Mapping[str, Any] | WeightsFile,
    **known: Any,  # noqa: ANN401 - the fields of SwinConfig
) -> SwinConfig:
    """The configuration of the backbone in a file of any published family.

    Args:
        path_or_state_dict: A file, an opened checkpoint or a read file, as for `load_weights`.
        known: Fields of `SwinConfig` that the file cannot tell or that are wanted otherwise, such as `window_size=16`.

    Raises:
        CheckpointError: The file cannot be read, holds no Swin, or its shapes do not tell everything: the windows of
            a Swin V2 are told only by buffers that some families do not store.
    """
    found = recognise_file(_opened(path_or_state_dict))
    require_backbone(found)
    fields = {**found.fields, **known}
    if "window_size" not in fields:
        raise CheckpointError(
            f"{found.source}: a Swin V2 of the {found.family} format; such a file does not tell its window size. "
            "Give it, such as window_size=8 (published: 8, 16 and 24), and pretrained_window_sizes where they differ."
        )
    return SwinConfig.from_dict(fields)


def recognise_file(file: WeightsFile) -> Recognised:
    """Tell the family of a file; one of this library's own says what it is.

    Raises:
        CheckpointError: The tensors of its backbone have impossible shapes.
    """
    found = recognise(file.tensors, file.source)
    if file.about is None:
        return found
    architecture = file.about.get("architecture", {})
    return replace(
        found,
        family="swin_dense",
        head=architecture.get("head", found.head),
        fields=architecture.get("backbone", found.fields),
    )


def _opened(source: str | Path | Mapping[str, Any] | WeightsFile, model: nn.Module | None = None) -> WeightsFile:
    """A checkpoint in whatever form it is given; names of published weights need the model that they are for."""
    if isinstance(source, WeightsFile):
        return source
    if isinstance(source, Mapping):
        return unwrap_weights(source)
    return read_weights_file(source if model is None else _resolved(source, model))


def _resolved(path_or_name: str | Path, model: nn.Module) -> Path:
    from swin_dense.weights.published import resolve

    config = getattr(getattr(model, "backbone", model), "config", None)
    variant = config.variant if isinstance(config, SwinConfig) else None
    return resolve(path_or_name, variant=variant, head=_head_of(model))


def _head_of(model: nn.Module) -> str | None:
    architecture = getattr(model, "architecture", None)
    return architecture.get("head") if isinstance(architecture, Mapping) else None


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and running statistics, the backbone's under "backbone."."""
    prefix = _prefix(model)
    return {prefix + name: value for name, value in model.state_dict().items()}


def _prefix(model: nn.Module) -> str:
    """What stands before a model's names in this library's."""
    return "" if hasattr(model, "backbone") else BACKBONE


def _require_whole(found: Recognised, report: WeightsReport) -> None:
    """Refuse what would train from other weights than meant.

    Raises:
        CheckpointError: There is no backbone in the file, it is not whole, or it is another one than the model's.
    """
    require_backbone(found)
    advice = "check that file and model are of the same variant, or load what fits with allow_partial=True"
    if report.backbone_share < _LEAST_BACKBONE_SHARE:
        least = f"less than {_LEAST_BACKBONE_SHARE:.0%} of the backbone would be loaded"
        raise CheckpointError(f"{report}\n{least}; {advice}.")
    loaded = {fate.group for fate in report.fates if fate.outcome != "unused" and fate.outcome != "missing"}
    # A norm may start afresh, and rows of other classes; a head may be absent, but not in part.
    strange = [
        fate
        for fate in report.fates
        if fate.outcome == "missing"
        and fate.group != "output norms"
        and fate.group in loaded
        and class_layout(fate.name) is None
    ]
    if strange:
        shown = "; ".join(f"{fate.name}: {fate.reason}" for fate in strange[:_SHOWN_FAULTS])
        raise CheckpointError(f"{report.source}: does not fit the model: {shown}; {advice}.")


def require_backbone(found: Recognised) -> None:
    """Refuse a file without a whole Swin backbone.

    Raises:
        CheckpointError: Says what there is instead, or what is missing.
    """
    if not found.fields:
        names = a_few([*found.tensors, *found.unused])
        raise CheckpointError(f"{found.source}: no Swin backbone of a known format in it; its tensors are {names}.")
    if found.faults:
        shown = "; ".join(found.faults[:_SHOWN_FAULTS])
        more = f"; and {len(found.faults) - _SHOWN_FAULTS} more" if len(found.faults) > _SHOWN_FAULTS else ""
        raise CheckpointError(
            f"{found.source}: the backbone in it is not whole ({found.family} format): {shown}{more}. "
            "Get the file again, or load what fits with allow_partial=True."
        )
