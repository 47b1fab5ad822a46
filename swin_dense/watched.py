"""Whether operations are watched."""

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def operations_are_watched() -> bool:
    """Whether something counts, records, fakes or transforms the operations of tensors.

    FLOP counters, `torch.export`, `torch.jit.trace`, `torch.func` and forward derivatives do. They are shown the
    published operations, not the cheaper ones with the same results that run otherwise.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    is_transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return is_transformed or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
