"""Memory for what lives within one call, kept for the next: page faults of fresh memory cost more than filling it.

Each thread keeps one piece of memory, as large as the largest it asked for, until `drop`.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    memory: Tensor | None = None


_kept = _Kept()


def take(like: Tensor, rows: int, width: int) -> Tensor:
    """(rows, width) of any content in the dtype of `like`, on the CPU, valid until this thread takes again."""
    needed = rows * width * like.element_size()
    if _kept.memory is None or _kept.memory.numel() < needed:
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            _kept.memory = torch.empty(needed, dtype=torch.uint8)
    return _kept.memory[:needed].view(like.dtype).view(rows, width)


def drop() -> None:
    """Give this thread's memory back."""
    _kept.memory = None
