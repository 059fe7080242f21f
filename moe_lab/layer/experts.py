"""E SwiGLU experts over rows that lie sorted by expert: w2(silu(w1 x) * (w3 x)).

gpt-oss's experts have biases and clamp what they multiply: see `clamped_swiglu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from moe_lab import fastpaths
from moe_lab.config import Activation, check_choice
from moe_lab.kernels import tiles
from moe_lab.kernels.fused import fused_experts
from moe_lab.kernels.grouped_linear import grouped_linear
from moe_lab.layer.router import Routing


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), gate cut above 7 and up to [-7, 7] first (gpt-oss), elementwise."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "clamped_swiglu": clamped_swiglu}


class Biases(NamedTuple):
    """Biases of the three products, added where the weights of the same number multiply."""

    b1_EF: Tensor
    b2_ED: Tensor
    b3_EF: Tensor


def loop_experts(
    x_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    ends_E: Tensor,
    *,
    activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
    biases: Biases | None = None,
) -> Tensor:
    """Three matrix products an expert: the reference, in any dtype. Needs the counts on the host."""
    if ends_E.device.type != "cpu":
        fastpaths.note("host_sync", "backend='loop' reads the experts' counts")
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    none = [None] * len(ends)
    b1_EF, b2_ED, b3_EF = (none, none, none) if biases is None else biases
    outs = [
        F.linear(activation(F.linear(x, w1, b1), F.linear(x, w3, b3)), w2, b2)
        for x, w1, w2, w3, b1, b2, b3, start, end in zip(
            x_RD.tensor_split(ends[:-1]), w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, starts, ends, strict=True
        )
        if end > start
    ]
    # An empty layer still depends on its weights: their gradients are zeros, not None.
    return torch.cat(outs) if outs else x_RD + 0 * sum(w.sum() for w in (w1_EFD, w2_EDF, w3_EFD, *(biases or ())))


def padded_experts(
    x_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    ends_E: Tensor,
    *,
    activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
    biases: Biases | None = None,
) -> Tensor:
    """Three batched products, every expert padded to the largest count, in any dtype.

    Costs E * max(count) rows, so 1 - mean / max of it is wasted. Padding is never read back: it reaches neither
    output nor gradient. The largest count is needed on the host.
    """
    if ends_E.device.type != "cpu":
        fastpaths.note("host_sync", "backend='padded' reads the largest count")
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


def grouped_experts(
    x_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    ends_E: Tensor,
    *,
    activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
    biases: Biases | None = None,
) -> Tensor:
    """Three grouped GEMMs, counts left on the device.

    Raises `ValueError` where `torch.nn.functional.grouped_mm` is not legal: float64, or D or F that do not fill
    rows of a multiple of 16 bytes.
    """
    dim, hidden_dim = w2_EDF.shape[1:]
    if x_RD.dtype == torch.float64:
        raise ValueError("backend='grouped' does not do float64: choose backend='loop'")
    for name, size in (("dim", dim), ("hidden_dim", hidden_dim)):
        if size * x_RD.element_size() % 16:
            raise ValueError(
                f"backend='grouped' needs rows of a multiple of 16 bytes, but {name}={size} in {x_RD.dtype} makes "
                f"{size * x_RD.element_size()}: choose backend='loop'"
            )
    gate_RF, up_RF = grouped_linear(x_RD, w1_EFD, ends_E), grouped_linear(x_RD, w3_EFD, ends_E)
    if biases is None:
        return grouped_linear(activation(gate_RF, up_RF), w2_EDF, ends_E)
    b1_RF, b2_RD, b3_RF = (_bias_rows(bias_EO, ends_E, x_RD.shape[0]) for bias_EO in biases)
    return grouped_linear(activation(gate_RF + b1_RF, up_RF + b3_RF), w2_EDF, ends_E) + b2_RD


def _bias_rows(bias_EO: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
    """Each row's bias, as a grouped product with ones: its gradient sums in float32 and rounds once."""
    ones_R8 = bias_EO.new_ones(num_rows, 8)  # 16 bytes in the smallest dtype
    return grouped_linear(ones_R8, F.pad(bias_EO[..., None], (0, 7)), ends_E)


def row_experts(ends_E: Int32[Tensor, " E"], num_rows: int) -> Int[Tensor, " R"]:
    """The expert of each row."""
    row_R = torch.arange(num_rows, device=ends_E.device, dtype=ends_E.dtype)
    return torch.searchsorted(ends_E, row_R, right=True)


def fused_rows(x_RD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The fused kernels over rows that are sorted already: each a token of its own, with one expert and gate 1."""
    ids_R1 = row_experts(ends_E, x_RD.shape[0])[:, None]
    gates_R1 = torch.ones_like(ids_R1, dtype=torch.float32)
    return fused_experts(x_RD, gates_R1, tiles.tile_rows(ids_R1, ends_E.numel()), w1_EFD, w2_EDF, w3_EFD)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "loop": loop_experts,
    "padded": padded_experts,
    "grouped": grouped_experts,
    "fused": fused_rows,
}


class GroupedExperts(nn.Module):
    """Weights of E experts, `w1_EFD` (gate), `w3_EFD` (up) and `w2_EDF` (down): torchtitan's layout and names.

    With `mlp_bias` also `b1_EF`, `b3_EF` and `b2_ED`, zeros at first. `backend="fused"` has neither biases nor any
    activation but "swiglu".
    """

    b1_EF: nn.Parameter | None
    b2_ED: nn.Parameter | None
    b3_EF: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        backend: str = "loop",
        activation: Activation = "swiglu",
        mlp_bias: bool = False,
    ) -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        check_choice("activation", activation, ACTIVATIONS)
        if backend == "fused" and (mlp_bias or activation != "swiglu"):
            raise ValueError(f"backend='fused' computes plain SwiGLU, not {activation!r} with mlp_bias={mlp_bias}")
        self.activation = activation
        self.w1_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        for name, size in (("b1_EF", hidden_dim), ("b2_ED", dim), ("b3_EF", hidden_dim)):
            bias = nn.Parameter(torch.empty(num_experts, size)) if mlp_bias else None
            self.register_parameter(name, bias)
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation fan_in ** -0.5, so that outputs keep the scale of inputs."""
        for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        for bias in (self.b1_EF, self.b2_ED, self.b3_EF):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"]) -> Float[Tensor, "R D"]:
        """Rows ends[e-1] .. ends[e] go through expert e. Weights are used in the rows' dtype."""
        weights = self._weights(x_RD)
        if self.backend == "fused":
            return fused_rows(x_RD, *weights, ends_E)
        present = [b.to(x_RD.dtype) for b in (self.b1_EF, self.b2_ED, self.b3_EF) if b is not None]
        biases = Biases(*present) if present else None
        activation = ACTIVATIONS[self.activation]
        return BACKENDS[self.backend](x_RD, *weights, ends_E, activation=activation, biases=biases)

    def fused(self, x_TD: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Dispatch, experts and combine in one: the gather and the gates are inside the products."""
        rows = tiles.tile_rows(routing.expert_ids_TK, self.w1_EFD.shape[0])
        return fused_experts(x_TD, routing.gates_TK, rows, *self._weights(x_TD))

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w1_EFD, w2_EDF, w3_EFD = (w.to(x.dtype) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        return w1_EFD, w2_EDF, w3_EFD


class SharedExperts(nn.Module):
    """n experts that every token uses, as one SwiGLU of width n*F: the sum of n SwiGLUs is one wide SwiGLU.

    `gated` multiplies the output by sigmoid(gate(x)), one number a token.
    """

    def __init__(self, dim: int, hidden_dim: int, num_shared_experts: int, *, gated: bool = False) -> None:
        super().__init__()
        width = hidden_dim * num_shared_experts
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.gate = nn.Linear(dim, 1, bias=False) if gated else None

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """(T, D) -> (T, D). Weights are used in the dtype of x, as those of `GroupedExperts` are."""
        w1, w2, w3 = (linear.weight.to(x_TD.dtype) for linear in (self.w1, self.w2, self.w3))
        out_TD = F.linear(swiglu(F.linear(x_TD, w1), F.linear(x_TD, w3)), w2)
        if self.gate is None:
            return out_TD
        return torch.sigmoid(F.linear(x_TD, self.gate.weight.to(x_TD.dtype))) * out_TD
