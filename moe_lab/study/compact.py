"""What keeps a trace small: narrow dtypes, and work in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def small_dtype(num_experts: int, *, dropped: bool = False) -> torch.dtype:
    """The smallest dtype of expert ids: uint8, or int16 for more than 256 experts or to hold -1."""
    return torch.uint8 if num_experts <= 256 and not dropped else torch.int16


def half(name: str, values: Tensor) -> Tensor:
    """Values as float16 on CPU. `ValueError` for values it cannot hold."""
    small = values.detach().to("cpu", torch.float16)
    if not small.isfinite().all():
        if not values.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinity: a trace cannot hold them")
        raise ValueError(f"{name} are not finite in float16 (at most 65504): a trace cannot hold them")
    return small


def slices(num_tokens: int, size: int = 2**17) -> Iterator[slice]:
    """All tokens in pieces, so that what is computed of a long trace fits in memory."""
    return (slice(start, start + size) for start in range(0, num_tokens, size))
