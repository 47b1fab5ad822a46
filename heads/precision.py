"""Where reduced precision ends."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself in float32 or float64, otherwise a float32 copy.

    Box coordinates and logits leave bf16 here: with 8 bits a coordinate of 1000 px is good to 4 px only.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
