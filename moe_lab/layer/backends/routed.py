"""Backends that also gather rows and sum them under their gates: `fused` on CUDA, `buffered` on the CPU."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.kernels.buffered import buffered_experts
from moe_lab.kernels.fused import fused_experts
from moe_lab.layer.backends.padded import row_experts
from moe_lab.layer.backends.weights import Weights
from moe_lab.layer.plan import plan_local
from moe_lab.layer.router import Routing


def refuse_biases(backend: str, weights: Weights) -> None:
    """Raise `ValueError` for what `fused` and `buffered` do not compute."""
    if weights.biases is not None or weights.activation.__name__ != "swiglu":
        raise ValueError(f"backend={backend!r} computes plain SwiGLU: choose 'grouped', 'padded' or 'loop'")


def fused_rows(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """The fused kernels over rows that are sorted already: each a token of its own, with one expert and gate 1."""
    refuse_biases("fused", weights)
    ids_R1 = row_experts(ends_E, x_RD.shape[0])[:, None]
    gates_R1 = torch.ones_like(ids_R1, dtype=torch.float32)
    return fused_experts(x_RD, gates_R1, ids_R1, *weights[:3])


def buffered_rows(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """The buffered loop over rows that are sorted already, each a token of its own."""
    refuse_biases("buffered", weights)
    gates_R1 = torch.ones(x_RD.shape[0], 1, device=x_RD.device)
    order_R = torch.arange(x_RD.shape[0], device=x_RD.device)
    return buffered_experts(x_RD, gates_R1, order_R, ends_E, *weights[:3])


def routed(backend: str, x_TD: Float[Tensor, "T D"], routing: Routing, weights: Weights) -> Float[Tensor, "T D"]:
    """Dispatch, experts and combine in one, by `fused` or `buffered`. Dropped assignments: `buffered` only."""
    refuse_biases(backend, weights)
    fastpaths.note(f"{backend}_dispatch_combine", f"backend={backend!r}, weighted and summed in float32")
    if backend == "fused":
        return fused_experts(x_TD, routing.gates_TK, routing.expert_ids_TK, *weights[:3])
    plan = plan_local(routing.expert_ids_TK, len(weights.w1_EFD), dropless=False)
    return buffered_experts(x_TD, routing.gates_TK, plan.order_R, plan.ends_E, *weights[:3])
