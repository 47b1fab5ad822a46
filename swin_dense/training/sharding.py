"""Weights, gradients and the optimiser's state cut into one piece for each process (torch's FSDP2), for large models.

Every process holds its piece of each tensor; a block's weights are put together while it computes, and its gradients
are averaged piece by piece in the backward pass. What leaves the processes, training states and models, is always
whole, so that a run may go on with or without sharding.

Importing torch's DTensor takes most of a second, which runs without sharding need not wait for: a piece is known by
what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from swin_dense.swin import SwinTransformer
from swin_dense.training.distributed import Process

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, process: Process, *, entries: tuple[str, ...] = ("loss_terms",)) -> nn.Module:
    """Cuts a model into pieces, in place: the blocks of its backbones one by one, and the rest at once.

    Build optimiser and average afterwards, of the pieces.

    Args:
        model: The same in every process, on its device; see `distributed.wrap`.
        process: The place of this process.
        entries: Methods besides `forward` that compute with the weights and that are called from outside.

    Returns:
        The same model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(process.device.type, (process.world_size,))
    for backbone in [module for module in model.modules() if isinstance(module, SwinTransformer)]:
        for stage in backbone.layers:
            for block in stage.blocks:  # type: ignore[union-attr]  # a SwinStage
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in entries:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return hasattr(model, "set_reshard_after_forward")


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its pieces; every process must call it."""
    return tensor.full_tensor() if _is_piece(tensor) else tensor


def whole_state(value: Any, *, keep: bool = True) -> Any:  # noqa: ANN401
    """A state dict with whole tensors, on the CPU, in the place of pieces; every process must call it.

    Args:
        value: State dict, whose other values stay as they are.
        keep: Whether this process wants the tensors; where not, None stands for each, and memory for one is enough.
    """
    if _is_piece(value):
        tensor = whole(value.detach())
        return tensor.cpu() if keep else None
    if isinstance(value, Mapping):
        return {name: whole_state(item, keep=keep) for name, item in value.items()}
    return [whole_state(item, keep=keep) for item in value] if isinstance(value, list) else value


def own(tensor: Tensor) -> Tensor:
    """The piece of a tensor that is in this process, or all of it where it is whole."""
    return tensor.to_local() if _is_piece(tensor) else tensor


def piece(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that all processes have, cut like another one of its shape; whole where that is whole."""
    if not _is_piece(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def pieces(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`piece` of each, by name."""
    return {name: piece(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def optimizer_pieces(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state of an optimiser, cut like the parameters it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {
            name: piece(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": cut}


def _is_piece(value: object) -> TypeGuard[DTensor]:
    return hasattr(value, "full_tensor")
