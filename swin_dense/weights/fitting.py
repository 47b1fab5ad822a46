"""A file's tensors made ready for a model's parameters, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from swin_dense.weights.adaptation import (
    class_layout,
    num_classes,
    resized_bias_table,
    resized_position_embedding,
    with_classes,
    with_input_channels,
)
from swin_dense.weights.recognition import BACKBONE, Recognised
from swin_dense.weights.report import OTHER_GROUP, Fate, group_of
from swin_dense.weights.values import add_background_box

Targets = Mapping[str, Tensor]
_COUNTERS = "num_batches_tracked"  # of batch norms; no parameter, and no file needs it


@dataclass(frozen=True)
class ClassNames:
    """The names of classes, background not among them; None where unknown."""

    file: tuple[str, ...] | None
    model: tuple[str, ...] | None

    @property
    def different(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """File's and model's, where both are known and not the same."""
        if self.file is None or self.model is None or self.file == self.model:
            return None
        return self.file, self.model

    @property
    def kept(self) -> tuple[str, ...]:
        """Those of the model that the file knows too, where the two differ."""
        if self.different is None:
            return ()
        file, model = self.different
        return tuple(name for name in model if name in file)


def class_names_of(
    found: Recognised, file_names: Sequence[str] | None, model_names: Sequence[str] | None, targets: Targets
) -> ClassNames:
    """The classes of file and model.

    torchvision's own detectors number COCO's classes by their raw ids, 1 to 90, ten of which nothing has ("N/A"); their
    files do not name them. A model of 80 classes is taken to have the others in that order.

    Args:
        found: What was read.
        file_names: What the file says.
        model_names: What the caller says.
        targets: The model's parameters.
    """
    predictor = "roi_heads.box_predictor.cls_score.weight"
    if file_names is None and found.family == "torchvision" and predictor in found.tensors:
        from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

        names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        if len(names) == len(found.tensors[predictor]):
            file_names = names[1:]
            named = [name for name in file_names if name != "N/A"]
            if model_names is None and predictor in targets and len(targets[predictor]) == len(named) + 1:
                model_names = named
    return ClassNames(
        None if file_names is None else tuple(file_names), None if model_names is None else tuple(model_names)
    )


def final_norm_as_last(found: Recognised, targets: Targets) -> Recognised:
    """A classifier's final norm as the output norm of the model's last map."""
    norms = [name for name in targets if name.startswith(f"{BACKBONE}norm")]
    if not norms:
        return found
    last = max(norms).rpartition(".")[0]
    renamed = {name.replace("final_norm.", f"{last}."): value for name, value in found.tensors.items()}
    return replace(found, tensors=renamed)


def fit(found: Recognised, targets: Targets, classes: ClassNames) -> tuple[dict[str, Tensor], list[Fate]]:
    """Prepare every parameter of the model that the file holds.

    Args:
        found: What was read.
        targets: The model's parameters and running statistics by own name, the backbone's under "backbone.".
        classes: Their names.

    Returns:
        The values to set, by own name; and the fate of each parameter of the model and of each tensor of the file that
        was not used.
    """
    values, fates = {}, []
    for name, target in targets.items():
        value, fate = _fit_one(name, found, target, classes)
        if value is not None:
            values[name] = value
        if not name.endswith(_COUNTERS):
            fates.append(fate)
    for name, value in found.tensors.items():
        if name not in targets and not name.endswith(_COUNTERS):
            origin = found.origins.get(name, name)
            fates.append(Fate(origin, group_of(name), "unused", value.numel(), _why_unused(name)))
    for name, numbers in found.unused.items():
        fates.append(Fate(name, OTHER_GROUP, "unused", numbers, "no part of a Swin model here"))
    return values, fates


def _fit_one(name: str, found: Recognised, target: Tensor, classes: ClassNames) -> tuple[Tensor | None, Fate]:
    group, numbers = group_of(name), target.numel()
    if name not in found.tensors:
        return None, Fate(name, group, "missing", numbers, _why_missing(name))
    value = found.tensors[name]
    if classes.different is not None and _has_rows_for(name, value, target, *classes.different):
        if not classes.kept:
            return None, Fate(name, group, "missing", numbers, "rows of other classes; none is called the same")
        file_names, model_names = classes.different
        reason = f"rows of {len(classes.kept)} classes by name, of {len(model_names) - len(classes.kept)} fresh"
        rows = with_classes(name, value, target, file_names, model_names)
        return rows, Fate(name, group, "resized", numbers, reason)
    if value.shape == target.shape:
        change = found.changes.get(name, "")
        return value, Fate(name, group, "permuted" if change else "loaded", numbers, change)
    fitted, reason = _resized(name, value, target)
    return fitted, Fate(name, group, "missing" if fitted is None else "resized", numbers, reason)


def _has_rows_for(
    name: str, value: Tensor, target: Tensor, file_names: Sequence[str], model_names: Sequence[str]
) -> bool:
    """Whether a parameter has rows for these classes, in the file and in the model."""
    if class_layout(name) is None or value.shape[1:] != target.shape[1:]:
        return False
    return (num_classes(name, len(value)), num_classes(name, len(target))) == (len(file_names), len(model_names))


def _resized(name: str, value: Tensor, target: Tensor) -> tuple[Tensor | None, str]:
    """The value in the model's shape, or None; and what was done, or why nothing could be."""
    old, new = tuple(value.shape), tuple(target.shape)
    if name.endswith("relative_position_bias_table") and old[1:] == new[1:]:
        return resized_bias_table(value, new[0]), "relative position bias of another window, bicubic"
    if name.endswith("absolute_pos_embed") and old[:2] == new[:2]:
        return resized_position_embedding(value, (new[2], new[3])), "position embedding of another grid, bicubic"
    if name.endswith("patch_embed.proj.weight") and (old[0], *old[2:]) == (new[0], *new[2:]):
        return with_input_channels(value, new[1]), f"first convolution from {old[1]} to {new[1]} channels"
    if name.endswith(("bbox_pred.weight", "bbox_pred.bias")) and old == (4, *new[1:]) and new[0] == 8:
        return add_background_box([value])[0], "box rows of the one class: background's added"
    if class_layout(name) is not None and old[1:] == new[1:]:
        counts = (num_classes(name, old[0]), num_classes(name, new[0]))
        return None, f"{counts[0]} classes in the file, {counts[1]} in the model, none known to be the same"
    return None, f"shape {old} in the file, {new} in the model"


def _why_missing(name: str) -> str:
    if name.startswith(f"{BACKBONE}norm"):
        return "the file has no norm for this map; it starts fresh"
    return "the file's backbone has none; it starts fresh" if name.startswith(BACKBONE) else "the file has no such head"


def _why_unused(name: str) -> str:
    return "a classifier's" if name.startswith(("final_norm.", "head.")) else "the model has no such part"
