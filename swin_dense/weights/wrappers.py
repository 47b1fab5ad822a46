"""A state dict out of the checkpoint it lies in: which of its parts hold weights, and which of those are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_dense.errors import CheckpointError

# timm writes state_dict_ema, torchvision's reference code and ConvNeXt's model_ema, BasicSR params_ema, DINO teacher.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_model", "ema", "params_ema", "teacher", "ema_state_dict")
_PLAIN = ("model", "state_dict", "model_state_dict", "module", "net", "network", "params", "student")
_DEEPEST_WRAPPER = 4
# Added to names by DataParallel and DistributedDataParallel, torch.compile, FSDP and activation checkpointing.
_ADDED_WITHIN = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_ADDED_TO_NAMES = re.compile(rf"^((module|{_ADDED_WITHIN})\.)+|(?<=\.)({_ADDED_WITHIN})\.")
# Step counters of torch's and mmengine's averaged models.
_COUNTERS = ("n_averaged", "steps")


@dataclass(frozen=True)
class WeightsFile:
    """The weights of a file or checkpoint, and what else it says of them.

    Attributes:
        source: The path, or "state dict".
        tensors: By the file's names without wrappers' prefixes such as "module."; on the CPU, without gradients.
        wrapper: The key they lay under, such as "model" or "ema.module"; "" for none.
        class_names: Names of the classes in the order of their indices, where the file says them.
        about: The description in a model file of this library, as `heads.model_file.read_about` returns it.
        notes: What was chosen, changed or passed over, one sentence each.
    """

    source: str
    tensors: dict[str, Tensor]
    wrapper: str
    class_names: tuple[str, ...] | None
    about: dict[str, Any] | None
    notes: tuple[str, ...]


def unwrap_weights(content: Mapping[str, Any], source: str = "state dict") -> WeightsFile:
    """Find the weights in an opened checkpoint or a state dict.

    They lie at the top, or under a key of the two lists above, also several levels deep. Where averaged weights stand
    beside those they were averaged from, the averaged are taken, and a note says so. An exception is
    "ema_state_dict" beside "state_dict": mmengine exchanges the two when it saves, so "state_dict" has the averages.

    Args:
        content: The mapping; it is not changed. Tensors on the CPU are shared with it.
        source: What to call it in messages.

    Raises:
        CheckpointError: It holds no tensors by name, or tensors of a kind that weights do not have.
    """
    notes: list[str] = []
    keys, state = _find_state(content, notes)
    tensors = _collect_tensors(state, source, notes) if isinstance(state, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{source}: {_without_tensors(content)}")
    return WeightsFile(
        source=source,
        tensors=tensors,
        wrapper=".".join(keys),
        class_names=_class_names(content),
        about=None,
        notes=tuple(notes),
    )


def shortened(name: object) -> str:
    """A name from a file as it stands in messages: on one line, at most 60 characters."""
    return repr(name)[1:-1][:60] if isinstance(name, str) else type(name).__name__


def _find_state(content: object, notes: list[str]) -> tuple[list[str], Any]:
    keys: list[str] = []
    while isinstance(content, Mapping) and len(keys) < _DEEPEST_WRAPPER:
        key = _choose_key(content, notes)
        if key is None:
            break
        keys.append(key)
        content = content[key]
    return keys, content


def _choose_key(content: object, notes: list[str]) -> str | None:
    averaged = next((key for key in _AVERAGED if _has_weights_under(content, key)), None)
    plain = next((key for key in _PLAIN if _has_weights_under(content, key)), None)
    if averaged is None or plain is None:
        return averaged or plain
    if averaged == "ema_state_dict" and plain == "state_dict":
        notes.append("averaged weights under 'state_dict'; 'ema_state_dict', those before averaging, not used")
        return plain
    notes.append(f"averaged weights under '{averaged}'; '{plain}' not used")
    return averaged


def _has_weights_under(content: object, key: str, depth: int = 0) -> bool:
    if depth == _DEEPEST_WRAPPER or not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
        return False
    inner = content[key]
    return any(isinstance(value, Tensor) for value in inner.values()) or any(
        _has_weights_under(inner, inner_key, depth + 1) for inner_key in _AVERAGED + _PLAIN
    )


def _collect_tensors(state: Mapping[Any, Any], source: str, notes: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    passed_over: list[str] = []
    old_copies = 0
    for full_name, value in state.items():
        if not isinstance(full_name, str) or not isinstance(value, Tensor):
            passed_over.append(shortened(full_name))
            continue
        name = _ADDED_TO_NAMES.sub("", full_name)
        if name.startswith("ema_") and "." not in name:
            old_copies += 1
        elif name in tensors:
            raise CheckpointError(
                f"{source}: holds {shortened(name)} twice, once with a prefix such as 'module.'; keep one."
            )
        elif name not in _COUNTERS:
            _require_plain(value, name, source)
            tensors[name] = value.detach().cpu()
    if old_copies:
        notes.append(f"{old_copies} tensors named 'ema_…', mmcv's copies before averaging, not used")
    if passed_over:
        notes.append(f"{len(passed_over)} entries that are no tensors passed over, the first is '{passed_over[0]}'")
    return tensors


def _require_plain(value: Tensor, name: str, source: str) -> None:
    kinds = {
        "sparse": value.layout is not torch.strided,
        "quantised": value.is_quantized,
        "complex": value.is_complex(),
        "on the meta device": value.is_meta,
    }
    for kind, applies in kinds.items():
        if applies:
            raise CheckpointError(f"{source}: {shortened(name)} is {kind}; expected a dense tensor of real numbers.")


def _class_names(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """In OpenMMLab's files: meta["CLASSES"] up to version 2, meta["dataset_meta"]["classes"] from 3 on."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    data_set = meta.get("dataset_meta")
    for holder in (data_set, meta):
        for key in ("classes", "CLASSES"):
            names = holder.get(key) if isinstance(holder, Mapping) else None
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def _without_tensors(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"holds a {type(content).__name__}, expected tensors by name (a state dict)."
    keys = ", ".join(shortened(key) for key in list(content)[:8])
    return (
        f"holds no tensors by name; its keys are: {keys or 'none'}. "
        "Expected a state dict, or one under 'model', 'state_dict' or the like."
    )
