"""What a layer computes, counted: operations and rows, which no machine changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.layer.moe import MoE


class Work(NamedTuple):
    """One forward: rows routed to experts and the largest expert's, and floating-point operations by part.

    A product of (a, b) and (b, c) is 2abc. `padded_flops` are of experts all padded to the largest.
    """

    rows: int
    largest: int
    router_flops: int
    expert_flops: int
    padded_flops: int
    shared_flops: int

    def __repr__(self) -> str:
        times = f"{self.padded_flops / self.expert_flops:.1f} times as much if all are padded to the largest"
        parts = {
            "router": f"{self.router_flops / 1e6:8.1f} MFLOP",
            "experts": f"{self.expert_flops / 1e6:8.1f} MFLOP, {times}",
            "shared experts": f"{self.shared_flops / 1e6:8.1f} MFLOP",
        }
        return "\n".join([f"{self.rows:,} rows", *(f"{name:15}{text}" for name, text in parts.items())])


def work_of(moe: MoE, x_TD: Float[Tensor, "T D"]) -> Work:
    """The work of one forward of these tokens: 2TDE of the router, 6DF a row, 6D(nF) a token of n shared experts."""
    config, tokens = moe.config, len(x_TD)
    with torch.no_grad():
        counts_E = moe.router(x_TD, moe.expert_bias_E).counts_E
    rows, largest, row = int(counts_E.sum()), int(counts_E.max()), 6 * config.dim * config.hidden_dim
    return Work(
        rows,
        largest,
        2 * tokens * config.dim * config.num_experts,
        rows * row,
        config.num_experts * largest * row,
        tokens * config.num_shared_experts * row,
    )
