"""Three batched products, every expert padded to the largest count."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.layer.backends.weights import Weights


def padded_experts(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """In any dtype. Costs E * max(count) rows, so 1 - mean / max of it is wasted.

    Padding is never read back: it reaches neither output nor gradient. The largest count is needed on the host.
    """
    if ends_E.device.type != "cpu":
        fastpaths.note("host_sync", "backend='padded' reads the largest count")
    w1_EFD, w2_EDF, w3_EFD, biases, activation, _ = weights
    expert_R = row_experts(ends_E, x_RD.shape[0])
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    slot_R = torch.arange(x_RD.shape[0], device=x_RD.device) - (ends_E - counts_E)[expert_R]
    size = int(counts_E.max())
    padded_ECD = x_RD.new_zeros(len(w1_EFD), size, x_RD.shape[1]).index_put((expert_R, slot_R), x_RD)
    gate_ECF, up_ECF = padded_ECD @ w1_EFD.mT, padded_ECD @ w3_EFD.mT
    if biases is not None:
        gate_ECF, up_ECF = gate_ECF + biases.b1_EF[:, None], up_ECF + biases.b3_EF[:, None]
    out_ECD = activation(gate_ECF, up_ECF) @ w2_EDF.mT
    if biases is not None:
        out_ECD = out_ECD + biases.b2_ED[:, None]
    return out_ECD[expert_R, slot_R]


def row_experts(ends_E: Int32[Tensor, " E"], num_rows: int) -> Int[Tensor, " R"]:
    """The expert of each row."""
    row_R = torch.arange(num_rows, device=ends_E.device, dtype=ends_E.dtype)
    return torch.searchsorted(ends_E, row_R, right=True)
