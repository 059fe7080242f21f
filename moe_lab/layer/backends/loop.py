"""The reference: three matrix products an expert, one expert after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.layer.backends.weights import Weights


def loop_experts(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """In any dtype. Needs the counts on the host."""
    return each_expert(x_RD, ends_E, weights, linear=F.linear, backend="loop")


def each_expert(
    x_RD: Tensor, ends_E: Tensor, weights: Weights, *, linear: Callable[..., Tensor], backend: str
) -> Float[Tensor, "R D"]:
    """Rows through their experts by `linear(x, weight, bias)`, one expert after another."""
    if ends_E.device.type != "cpu":
        fastpaths.note("host_sync", f"backend={backend!r} reads the experts' counts")
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    none = [None] * len(ends)
    w1_EFD, w2_EDF, w3_EFD, biases, activation, _ = weights
    b1_EF, b2_ED, b3_EF = (none, none, none) if biases is None else biases
    outs = [
        linear(activation(linear(x, w1, b1), linear(x, w3, b3)), w2, b2)
        for x, w1, w2, w3, b1, b2, b3, start, end in zip(
            x_RD.tensor_split(ends[:-1]), w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, starts, ends, strict=True
        )
        if end > start
    ]
    # An empty layer still depends on its weights: their gradients are zeros, not None.
    return torch.cat(outs) if outs else x_RD + 0 * sum(w.sum() for w in (w1_EFD, w2_EDF, w3_EFD, *(biases or ())))
