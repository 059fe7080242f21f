"""The ways back from expert rows to tokens. All deterministic; they differ in rounding and in what they move.

| arm           | accumulates in                          | rounds                    | order of a token's sum |
|---------------|-----------------------------------------|---------------------------|------------------------|
| `gather`      | float32                                 | once                      | slot k = 0..K-1        |
| `scatter_add` | as `deterministic_scatter_add` does     | every product, then sums  | by expert id           |
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.kernels.rows import combine_gather, gather_rows
from moe_lab.kernels.scatter_add import deterministic_scatter_add
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
    fastpaths.note("scatter_add_autograd_or_alias", "functional arm chosen by name")
    if gates_TK is not None:
        gate_R1 = gather_rows(gates_TK.reshape(-1, 1), plan.order_R, plan.position_TK.view(-1, 1))
        rows_RD = (rows_RD * gate_R1).to(rows_RD.dtype)
    zeros_TD = rows_RD.new_zeros(plan.num_tokens, rows_RD.shape[1])
    return deterministic_scatter_add(zeros_TD, plan.token_R, rows_RD)


COMBINE_ARMS: dict[str, Callable[[Tensor, Tensor | None, DispatchPlan], Tensor]] = {
    "gather": gather,
    "scatter_add": scatter_add,
}
