"""The ways back from expert rows to tokens. All deterministic; they differ in rounding and in what they move.

| arm           | accumulates in                          | rounds                    | order of a token's sum |
|---------------|-----------------------------------------|---------------------------|------------------------|
| `gather`      | float32                                 | once                      | slot k = 0..K-1        |
| `scatter_add` | as `deterministic_scatter_add` does     | every product, then sums  | by expert id           |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.kernels.rows import combine_gather, gather_rows
from moe_lab.kernels.scatter_add import deterministic_scatter_add, deterministic_scatter_add_, may_overlap
from moe_lab.layer.plan import DispatchPlan


def gather(
    rows_RD: Float[Tensor, "R D"], gates_TK: Float[Tensor, "T K"] | None, plan: DispatchPlan
) -> Float[Tensor, "T D"]:
    """Each token reads its K rows through the inverse permutation: no atomics either way."""
    return combine_gather(rows_RD, gates_TK, plan.order_R, plan.position_TK)


def scatter_add(
    rows_RD: Float[Tensor, "R D"], gates_TK: Float[Tensor, "T K"] | None, plan: DispatchPlan
) -> Float[Tensor, "T D"]:
    """Each row, multiplied by its gate in float32 and rounded, is added to its token in row order."""
    zeros_TD = rows_RD.new_zeros(plan.num_tokens, rows_RD.shape[1])
    return scatter_add_to(zeros_TD, rows_RD, gates_TK, plan, protected=None)


def scatter_add_to(
    base_TD: Float[Tensor, "T D"],
    rows_RD: Float[Tensor, "R D"],
    gates_TK: Float[Tensor, "T K"] | None,
    plan: DispatchPlan,
    *,
    protected: Tensor | None,
) -> Float[Tensor, "T D"]:
    """`scatter_add` on top of what the shared experts gave: in place when nobody can tell, the same bits either way.

    Somebody can tell when a gradient flows, or when `base_TD` may share bytes with `protected`, the layer's input:
    shared experts may return their input itself.
    """
    if gates_TK is not None:
        gate_R1 = gather_rows(gates_TK.reshape(-1, 1), plan.order_R, plan.position_TK.view(-1, 1))
        rows_RD = (rows_RD * gate_R1).to(rows_RD.dtype)
    reason = _must_copy(base_TD, rows_RD, protected)
    if reason is None:
        fastpaths.note("scatter_add_inplace_no_grad", "no gradient, and the base shares no bytes with the input")
        deterministic_scatter_add_(base_TD, plan.token_R, rows_RD)
        return base_TD
    fastpaths.note("scatter_add_autograd_or_alias", reason)
    return deterministic_scatter_add(base_TD, plan.token_R, rows_RD)


def _must_copy(base_TD: Tensor, rows_RD: Tensor, protected: Tensor | None) -> str | None:
    if torch.compiler.is_compiling():
        return "compiling: addresses are not known"
    if torch.is_grad_enabled() and (base_TD.requires_grad or rows_RD.requires_grad):
        return "a gradient flows"
    if protected is not None and may_overlap(base_TD, protected):
        return "the base may share bytes with the layer's input"
    return None


COMBINE_ARMS: dict[str, Callable[[Tensor, Tensor | None, DispatchPlan], Tensor]] = {
    "gather": gather,
    "scatter_add": scatter_add,
}
