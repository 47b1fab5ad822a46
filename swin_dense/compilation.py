"""Models compiled for the image sizes that come, for no more of them than was said.

`torch.compile` compiles anew for each size, minutes on a CPU, and after a few gives up without a word. Here each size
is compiled once, up to a bound; images of further sizes run as before. None is padded to another size: a network with
windows would compute something else.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swin_dense.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def compile(model: M, max_sizes: int = 8, **options: Any) -> M:  # noqa: ANN401 - named as torch's, and its options
    """Let a model run compiled, in place; its parameters, their names and its results stay.

    Of a UPerNet the backbone and the heads are compiled, of a detector the backbone and the pyramid: what comes after
    depends on what is found.

    Args:
        model: A backbone, a classifier, a UPerNet or a detector.
        max_sizes: For how many kinds of input each part is compiled: their sizes and dtypes, training or evaluation.
        options: Of `torch.compile`, such as `mode="reduce-overhead"`, which replays CUDA graphs.

    Returns:
        The model.

    Raises:
        ConfigError: `max_sizes` is below 1.

    Example:
        >>> from swin_dense import SwinConfig, SwinTransformer, compile, compiled_calls
        >>> config = SwinConfig(embed_dim=8, depths=(1,), num_heads=(1,), out_features=("c2",))
        >>> backbone = compile(SwinTransformer(config).eval(), backend="eager")
        >>> backbone(torch.rand(1, 3, 32, 48))["c2"].shape
        torch.Size([1, 8, 8, 12])
        >>> compiled_calls(backbone)
        {'': {'compiled sizes': 1, 'compiled calls': 1, 'other calls': 0}}
    """
    if max_sizes < 1:
        raise ConfigError(f"max_sizes must be at least 1, got {max_sizes}.")
    for part in _parts(model).values():
        part._compiled_call_impl = _BoundedCompilation(part, max_sizes, options)
    return model


def compiled_calls(model: nn.Module) -> dict[str, dict[str, int]]:
    """For each compiled part of a model, by its name, how many sizes were compiled and how many calls ran how."""
    return {
        name: part._compiled_call_impl.counts()
        for name, part in _parts(model).items()
        if isinstance(part._compiled_call_impl, _BoundedCompilation)
    }


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    names = getattr(model, "compiled_parts", ("",))
    return {name: model.get_submodule(name) for name in names}


class _BoundedCompilation:
    def __init__(self, part: nn.Module, max_sizes: int, options: dict[str, Any]) -> None:
        self.part = part
        self.max_sizes = max_sizes
        self.compiled: Callable[..., Any] = torch.compile(part._call_impl, dynamic=False, **options)
        self.calls: Counter[Hashable] = Counter()
        self.other_calls = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - of the part
        kind = self._kind(arguments, named)
        if kind not in self.calls and len(self.calls) == self.max_sizes:
            if self.other_calls == 0:
                warnings.warn(
                    f"{type(self.part).__name__} was compiled for {self.max_sizes} sizes of images; others run as "
                    "they are. Give images of fewer sizes, or a larger max_sizes.",
                    stacklevel=2,
                )
            self.other_calls += 1
            return self.part._call_impl(*arguments, **named)
        self.calls[kind] += 1
        # The bound is ours: torch counts all modules of a process together.
        with torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
            return self.compiled(*arguments, **named)

    def _kind(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Hashable:
        tensors = [value for value in tree_leaves((arguments, named)) if isinstance(value, Tensor)]
        autocast = {device: torch.is_autocast_enabled(device) for device in {x.device.type for x in tensors}}
        return (
            tuple((tuple(x.shape), x.dtype, x.device, x.is_contiguous()) for x in tensors),
            self.part.training,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(sorted(autocast.items())),
        )

    def counts(self) -> dict[str, int]:
        return {
            "compiled sizes": len(self.calls),
            "compiled calls": self.calls.total(),
            "other calls": self.other_calls,
        }
