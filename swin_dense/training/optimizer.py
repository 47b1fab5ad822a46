"""AdamW with the weight-decay rule of the published Swin detectors and segmenters (Liu et al., 2021).

The published configurations exempt parameters by a piece of their name ("norm", "relative_position_bias_table",
"absolute_pos_embed"). The same choice is made here by what a parameter is, so that renaming a module cannot change it.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from swin_dense.attention import CosineWindowAttention
from swin_dense.errors import ConfigError

POSITION_PARAMETERS = ("relative_position_bias_table", "absolute_pos_embed")
FUSED_DEVICES = ("cuda", "cpu")


def exempt_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters that no weight decay may shrink.

    These are the scales and shifts of every LayerNorm, relative position bias tables and absolute position embeddings,
    and what Swin V2 has in their place: the network of the position bias, and the scale of the logits.
    Biases of linear and convolution layers and BatchNorm parameters are not among them: they decay in the published
    models.

    Args:
        model: Any module.

    Yields:
        Parameters, a shared one as often as it occurs.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) or name in POSITION_PARAMETERS:
                yield parameter
        if isinstance(module, CosineWindowAttention):
            yield module.logit_scale
            yield from module.cpb_mlp.parameters()


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those that decay and those that do not.

    Args:
        model: Any module, not wrapped for distributed training, so that the names are its own.
        weight_decay: Decay of the first group; that of the second is 0.

    Returns:
        One or two groups, never empty ones, of (name, parameter) pairs in the order of `model.named_parameters()`.
        Frozen parameters (`requires_grad` false) are in neither, a shared parameter is in one of them once.
    """
    exempt = {id(parameter) for parameter in exempt_parameters(model)}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [pair for pair in trainable if id(pair[1]) not in exempt], "weight_decay": weight_decay},
        {"params": [pair for pair in trainable if id(pair[1]) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def change_settings(
    optimizer: AdamW, scheduler: LRScheduler, model: nn.Module, *, learning_rate: float, weight_decay: float
) -> None:
    """Gives a restored optimiser the settings of this run; nothing changes where they are those it was saved with.

    Args:
        optimizer: From `build_optimizer`, after `restore_state`.
        scheduler: Its schedule, likewise.
        model: The model the optimiser was built on.
        learning_rate: As in `build_optimizer`.
        weight_decay: As in `build_optimizer`.
    """
    fresh_groups = parameter_groups(model, weight_decay=weight_decay)
    for index, (group, fresh) in enumerate(zip(optimizer.param_groups, fresh_groups, strict=True)):
        group["weight_decay"] = fresh["weight_decay"]
        if group["initial_lr"] != learning_rate:
            group["lr"] *= learning_rate / group["initial_lr"]
            group["initial_lr"] = scheduler.base_lrs[index] = learning_rate


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> AdamW:
    """Builds AdamW over the groups of `parameter_groups`.

    Args:
        model: The model on its final device, not wrapped for distributed training.
        learning_rate: Positive; published: 1e-4 for 16 images a step (COCO), 6e-5 for 16 (ADE20K).
        weight_decay: Not negative; published: 0.05 (COCO), 0.01 (ADE20K).
        betas: Decay rates of the two running means.

    Returns:
        The optimiser, one fused kernel per step where the device has it. Its state holds the parameters' names.

    Raises:
        ConfigError: No parameter is trainable, or a value is outside its range.
    """
    groups = parameter_groups(model, weight_decay=weight_decay)
    if not groups:
        raise ConfigError("the model has no trainable parameter: every requires_grad is false. Unfreeze a part of it.")
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    try:
        return AdamW(groups, lr=learning_rate, betas=betas, fused=devices.issubset(FUSED_DEVICES))
    except ValueError as error:
        raise ConfigError(f"AdamW refuses its settings: {error}.") from error
