"""Whether operations are watched."""

from torch.utils._python_dispatch import _get_current_dispatch_mode


def operations_are_watched() -> bool:
    """Whether something counts, records or fakes the operations of tensors, as FLOP counters and exporters do.

    They are shown the published operations, not the cheaper ones with the same results that run otherwise.
    """
    return _get_current_dispatch_mode() is not None
