"""AdamW with the weight-decay rule of the published Swin detectors and segmenters (Liu et al., 2021), and layer decay.

The published configurations exempt parameters by a piece of their name ("norm", "relative_position_bias_table",
"absolute_pos_embed"). The same choice is made here by what a parameter is, so that renaming a module cannot change it.
Layer-wise decay of the learning rate is that of the official fine-tuning code of SimMIM (Xie et al., 2022), decided by
a parameter's place in the backbone and again not by its name.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from swin_dense.attention import CosineWindowAttention
from swin_dense.errors import ConfigError
from swin_dense.swin import SwinStage, SwinTransformer

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


def backbone_layers(backbone: SwinTransformer) -> list[list[nn.Parameter]]:
    """The parameters of a backbone in the order in which an image meets them.

    Args:
        backbone: Any Swin or Swin V2.

    Returns:
        The patch embedding with the absolute position embedding, then every block of all stages; patch merging belongs
        to the last block of the stage it ends. The norms of the returned maps are not among them: a classifier's
        weights have none for most maps, so these start anew, as heads do.
    """
    first = list(backbone.patch_embed.parameters())
    if backbone.absolute_pos_embed is not None:
        first.append(backbone.absolute_pos_embed)
    layers = [first]
    for stage in backbone.layers:
        assert isinstance(stage, SwinStage)
        layers += [list(block.parameters()) for block in stage.blocks]
        if stage.downsample is not None:
            layers[-1] += stage.downsample.parameters()
    return layers


def learning_rate_scales(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """The factor on the learning rate of each parameter of the model's backbones.

    Args:
        model: A backbone, or a model with one inside.
        layer_decay: Each of n layers has this many times the learning rate of the next; the last has `layer_decay`,
            the patch embedding `layer_decay**n`. At 1 there is nothing to scale.

    Returns:
        Factors in (0, 1] by the parameter's `id`; those of the other parameters are 1.

    Raises:
        ConfigError: The decay is out of range, or no Swin is there to apply it to.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ConfigError(f"layer_decay must be above 0 and at most 1, got {layer_decay}.")
    if layer_decay == 1.0:
        return {}
    backbones = [module for module in model.modules() if isinstance(module, SwinTransformer)]
    if not backbones:
        raise ConfigError(f"layer_decay={layer_decay} needs a model with a SwinTransformer inside; set it to 1.")
    scales: dict[int, float] = {}
    for backbone in backbones:
        for distance, layer in enumerate(reversed(backbone_layers(backbone)), start=1):
            scales |= {id(parameter): layer_decay**distance for parameter in layer}
    return scales


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Splits the trainable parameters by learning rate and by whether they decay.

    Args:
        model: Any module, not wrapped for distributed training, so that the names are its own.
        learning_rate: That of parameters which nothing scales.
        weight_decay: Of those parameters that decay.
        layer_decay: See `learning_rate_scales`; 1 gives all parameters the same rate.

    Returns:
        Groups, never empty ones, of (name, parameter) pairs in the order of `model.named_parameters()`; the highest
        rate comes first, and of one rate those that decay. Frozen parameters (`requires_grad` false) are in none, a
        shared parameter is in one of them once.

    Raises:
        ConfigError: As in `learning_rate_scales`.
    """
    exempt = {id(parameter) for parameter in exempt_parameters(model)}
    scales = learning_rate_scales(model, layer_decay)
    members: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale, decays = scales.get(id(parameter), 1.0), id(parameter) not in exempt
            members.setdefault((scale, decays), []).append((name, parameter))
    return [
        {"params": members[key], "lr": learning_rate * key[0], "weight_decay": weight_decay if key[1] else 0.0}
        for key in sorted(members, reverse=True)
    ]


def change_settings(
    optimizer: AdamW,
    scheduler: LRScheduler,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> None:
    """Gives a restored optimiser the settings of this run; nothing changes where they are those it was saved with.

    Args:
        optimizer: From `build_optimizer`, after `restore_state`.
        scheduler: Its schedule, likewise.
        model: The model the optimiser was built on.
        learning_rate: As in `build_optimizer`.
        weight_decay: As in `build_optimizer`.
        layer_decay: As in `build_optimizer`.
    """
    fresh_groups = parameter_groups(
        model, learning_rate=learning_rate, weight_decay=weight_decay, layer_decay=layer_decay
    )
    for index, (group, fresh) in enumerate(zip(optimizer.param_groups, fresh_groups, strict=True)):
        group["weight_decay"] = fresh["weight_decay"]
        if group["initial_lr"] != fresh["lr"]:
            group["lr"] *= fresh["lr"] / group["initial_lr"]
            group["initial_lr"] = scheduler.base_lrs[index] = fresh["lr"]


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> AdamW:
    """Builds AdamW over the groups of `parameter_groups`; its betas are torch's, 0.9 and 0.999, as published.

    Args:
        model: The model on its final device, not wrapped for distributed training.
        learning_rate: Positive; published: 1e-4 for 16 images a step (COCO), 6e-5 for 16 (ADE20K).
        weight_decay: Not negative; published: 0.05 (COCO), 0.01 (ADE20K).
        layer_decay: See `learning_rate_scales`; published: none, that is 1.

    Returns:
        The optimiser, fused where the device has it: one kernel a step, or one for each group with `layer_decay`. Its
        state holds the parameters' names.

    Raises:
        ConfigError: No parameter is trainable, or a value is outside its range.
    """
    groups = parameter_groups(model, learning_rate=learning_rate, weight_decay=weight_decay, layer_decay=layer_decay)
    if not groups:
        raise ConfigError("the model has no trainable parameter: every requires_grad is false. Unfreeze a part of it.")
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    try:
        return AdamW(groups, lr=learning_rate, fused=devices.issubset(FUSED_DEVICES))
    except ValueError as error:
        raise ConfigError(f"AdamW refuses its settings: {error}.") from error
