"""Whether operations are watched."""

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def operations_are_watched() -> bool:
    """Whether something counts, records or fakes the operations of tensors, as FLOP counters and `torch.export` do.

    They are shown the published operations, not the cheaper ones with the same results that run otherwise.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _get_current_dispatch_mode() is not None
