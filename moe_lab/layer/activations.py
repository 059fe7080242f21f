"""What experts do between their products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), gate cut above 7 and up to [-7, 7] first (gpt-oss), elementwise."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "clamped_swiglu": clamped_swiglu}
