"""The integers of a dispatch: which assignment goes to which row, before any activation moves.

Assignment i = t*K + k is token t's k-th choice, N = T*K of them. Rows are assignments sorted by expert, stable,
so that each expert's rows are contiguous and in token order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from moe_lab import contracts, fastpaths
from moe_lab.kernels.order import sort_keys


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchPlan:
    """Where every assignment goes on one rank: a permutation, its inverse, and where each expert begins.

    `order_R`: the assignment in each row, expert by expert; R = N minus dropped assignments.
    `position_TK`: the row of each assignment, -1 where it was dropped.
    `counts_E`: rows of each expert, int64; `ends_E`: row after each expert's last, int32, as grouped GEMMs want.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    order_R: Int[Tensor, " R"]
    position_TK: Int[Tensor, "T K"]
    counts_E: Int[Tensor, " E"]
    ends_E: Int32[Tensor, " E"]

    @property
    def num_rows(self) -> int:
        """Rows that are dispatched, R."""
        return self.order_R.numel()

    @property
    def may_drop(self) -> bool:
        """Whether some assignment has no row."""
        return self.num_rows != self.num_tokens * self.top_k

    @property
    def token_R(self) -> Int[Tensor, " R"]:
        """The token in each row."""
        return self.order_R.div(self.top_k, rounding_mode="floor")


def plan_local(
    expert_ids_TK: Int[Tensor, "T K"],
    num_experts: int,
    *,
    counts_E: Int[Tensor, " E"] | None = None,
    dropless: bool = True,
) -> DispatchPlan:
    """Sort assignments by expert, stable, as one `DispatchPlan`. Pure: integers in, integers out.

    `counts_E` saves counting what the router counted already. With `dropless=False` assignments with id -1 get
    no row; the number of rows then depends on the ids, which costs a host synchronisation on CUDA.

    Raises `ValueError` for ids outside the layout and, with `dropless`, for dropped ones (on CPU; anywhere under
    debug contracts).
    """
    num_tokens, top_k = expert_ids_TK.shape
    contracts.check_ids("expert_ids_TK", expert_ids_TK, num_experts)
    ids_N = expert_ids_TK.reshape(-1)
    if dropless:
        contracts.check_dropless("expert_ids_TK", ids_N)
    # Dropped assignments sort last; small keys sort faster.
    key_N = torch.where(ids_N < 0, num_experts, ids_N)
    key_N = key_N.to(torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 2**15 else torch.int32)
    sorted_N, order_N = sort_keys(key_N)
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    if not dropless:
        if ids_N.device.type != "cpu":
            fastpaths.note("host_sync", "dropped assignments get no row: the number of rows is read")
        num_rows = int((ids_N >= 0).sum())
        order_N = order_N[:num_rows]
        position_N = torch.where(ids_N < 0, -1, position_N)
    expert_E = torch.arange(num_experts, device=ids_N.device, dtype=sorted_N.dtype)
    ends_E = torch.searchsorted(sorted_N, expert_E, right=True, out_int32=True)
    if counts_E is None:
        counts_E = torch.diff(ends_E.long(), prepend=ends_E.new_zeros(1).long())
    contracts.check_counts(counts_E, ends_E)
    return DispatchPlan(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        order_R=order_N,
        position_TK=position_N.view(num_tokens, top_k),
        counts_E=counts_E,
        ends_E=ends_E,
    )
