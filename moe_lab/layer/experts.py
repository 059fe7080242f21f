"""E SwiGLU experts over rows that lie sorted by expert: w2(silu(w1 x) * (w3 x))."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor, nn

from moe_lab import fastpaths
from moe_lab.config import check_choice
from moe_lab.kernels import tiles
from moe_lab.kernels.fused import fused_experts
from moe_lab.kernels.grouped_linear import grouped_linear
from moe_lab.layer.router import Routing


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def loop_experts(x_RD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Three matrix products an expert: the reference, in any dtype. Needs the counts on the host."""
    if ends_E.device.type != "cpu":
        fastpaths.note("host_sync", "backend='loop' reads the experts' counts")
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    rows = x_RD.tensor_split(ends[:-1])
    outs = [
        F.linear(swiglu(F.linear(x, w1), F.linear(x, w3)), w2)
        for x, w1, w2, w3, start, end in zip(rows, w1_EFD, w2_EDF, w3_EFD, starts, ends, strict=True)
        if end > start
    ]
    # An empty layer still depends on its weights: their gradients are zeros, not None.
    return torch.cat(outs) if outs else x_RD + 0 * (w1_EFD.sum() + w2_EDF.sum() + w3_EFD.sum())


def grouped_experts(x_RD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, ends_E: Tensor) -> Tensor:
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
    return grouped_linear(swiglu(gate_RF, up_RF), w2_EDF, ends_E)


def fused_rows(x_RD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The fused kernels over rows that are sorted already: each a token of its own, with one expert and gate 1."""
    row_R = torch.arange(x_RD.shape[0], device=x_RD.device, dtype=ends_E.dtype)
    ids_R1 = torch.searchsorted(ends_E, row_R, right=True)[:, None]
    gates_R1 = torch.ones_like(ids_R1, dtype=torch.float32)
    return fused_experts(x_RD, gates_R1, tiles.tile_rows(ids_R1, ends_E.numel()), w1_EFD, w2_EDF, w3_EFD)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "loop": loop_experts,
    "grouped": grouped_experts,
    "fused": fused_rows,
}


class GroupedExperts(nn.Module):
    """Weights of E experts, `w1_EFD` (gate), `w3_EFD` (up) and `w2_EDF` (down): torchtitan's layout and names."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, *, backend: str = "loop") -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.w1_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation fan_in ** -0.5, so that outputs keep the scale of inputs."""
        for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"]) -> Float[Tensor, "R D"]:
        """Rows ends[e-1] .. ends[e] go through expert e. Weights are used in the rows' dtype."""
        return BACKENDS[self.backend](x_RD, *self._weights(x_RD), ends_E)

    def fused(self, x_TD: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Dispatch, experts and combine in one: the gather and the gates are inside the products."""
        rows = tiles.tile_rows(routing.expert_ids_TK, self.w1_EFD.shape[0])
        return fused_experts(x_TD, routing.gates_TK, rows, *self._weights(x_TD))

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w1_EFD, w2_EDF, w3_EFD = (w.to(x.dtype) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        return w1_EFD, w2_EDF, w3_EFD


class SharedExperts(nn.Module):
    """n experts that every token uses, as one SwiGLU of width n*F: the sum of n SwiGLUs is one wide SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int, num_shared_experts: int) -> None:
        super().__init__()
        width = hidden_dim * num_shared_experts
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """(T, D) -> (T, D). Weights are used in the dtype of x, as those of `GroupedExperts` are."""
        w1, w2, w3 = (linear.weight.to(x_TD.dtype) for linear in (self.w1, self.w2, self.w3))
        return F.linear(swiglu(F.linear(x_TD, w1), F.linear(x_TD, w3)), w2)
