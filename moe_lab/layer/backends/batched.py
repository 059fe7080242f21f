"""Two batched products over experts with equal counts, without gradients: w1 and w3 stacked, w2 transposed."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.layer.backends.weights import Weights
from moe_lab.layer.weight_cache import WeightCache


def refuse_batched(ends_E: Int32[Tensor, " E"], weights: Weights, x_RD: Float[Tensor, "R D"]) -> str | None:
    """Why two batched products are not legal here, or None. Reads the counts on the host."""
    if torch.compiler.is_compiling():
        return "compiling: counts and versions of weights are not known"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_RD, *weights[:3])):
        return "a gradient flows: use torch.no_grad()"
    if ends_E.device.type != "cpu":
        fastpaths.note("host_sync", "backend='batched' compares the experts' counts")
    return refuse_counts(ends_E.diff(prepend=ends_E.new_zeros(1)))


def refuse_counts(counts_E: Int[Tensor, " E"]) -> str | None:
    """Why these counts are not those of equal batches, or None. Reads them on the host."""
    if torch.compiler.is_compiling():
        return "compiling: counts are not known"
    counts = counts_E.tolist()
    mean = sum(counts) / len(counts)
    worst = max(range(len(counts)), key=lambda expert: abs(counts[expert] - mean))
    if counts[worst] != mean:
        return f"counts differ: expert {worst} has {counts[worst]}, mean {mean:g}"
    return None if counts[0] else "expert 0 has 0 rows: every expert needs some"


def batched_experts(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """Raises `ValueError` with a gradient, under `torch.compile`, and unless all counts are equal and above 0."""
    if reason := refuse_batched(ends_E, weights, x_RD):
        raise ValueError(f"backend='batched' is not legal, {reason}")
    w1_EFD, w2_EDF, w3_EFD, biases, activation, cache = weights
    cache = cache or WeightCache()
    num_experts, hidden_dim, dim = w1_EFD.shape
    fastpaths.note("batched_no_grad_experts", lambda: f"all {num_experts} counts are {len(x_RD) // num_experts}")
    w13_EGD = cache.get("w13", (w1_EFD, w3_EFD), lambda: torch.cat((w1_EFD, w3_EFD), dim=1))
    w2_t_EFD = cache.get("w2_t", (w2_EDF,), lambda: w2_EDF.mT.contiguous())
    hidden_ECG = torch.bmm(x_RD.reshape(num_experts, -1, dim), w13_EGD.mT)
    gate_ECF, up_ECF = hidden_ECG.split(hidden_dim, dim=2)
    if biases is not None:
        gate_ECF, up_ECF = gate_ECF + biases.b1_EF[:, None], up_ECF + biases.b3_EF[:, None]
    out_ECD = torch.bmm(activation(gate_ECF, up_ECF), w2_t_EFD)
    return (out_ECD if biases is None else out_ECD + biases.b2_ED[:, None]).reshape(x_RD.shape)
