"""Executing a plan: rows out to the experts, and their outputs back to the tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab import fastpaths, phases
from moe_lab.config import check_choice
from moe_lab.kernels.rows import gather_rows
from moe_lab.layer.combine import COMBINE_ARMS, scatter_add_to
from moe_lab.layer.plan import DispatchPlan, plan_local
from moe_lab.layer.router import Routing


class LocalTokenDispatcher:
    """Dispatch and combine where all experts are on this rank.

    `combine` names the arm (see `moe_lab.layer.combine`). With `score_before_experts` rows are multiplied by
    their gate before the experts, in float32, and combined unweighted. `dropless=False` allows assignments that
    were dropped (id -1), which costs a host synchronisation on CUDA. `forced` says that routing is round robin: it
    is only put on the record, one rank has no splits to know in advance.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        combine: str = "gather",
        score_before_experts: bool = False,
        dropless: bool = True,
        forced: bool = False,
    ) -> None:
        check_choice("combine", combine, COMBINE_ARMS)
        self.num_experts = num_experts
        self.combine_arm = COMBINE_ARMS[combine]
        self.score_before_experts = score_before_experts
        self.dropless = dropless
        self.forced = forced

    @property
    def may_fuse(self) -> bool:
        """Whether `fused` and `buffered` may move rows and weigh them alone, as `dispatch` and `combine` would."""
        return self.combine_arm is COMBINE_ARMS["gather"] and not self.score_before_experts

    def dispatch(self, x_TD: Float[Tensor, "T D"], routing: Routing) -> tuple[Float[Tensor, "R D"], DispatchPlan]:
        """One row an assignment, expert by expert, and the plan that says which is which."""
        if self.forced:
            fastpaths.note("force_load_balance_dispatch", f"round robin over {self.num_experts} experts on one rank")
        with phases.phase("plan"):
            plan = plan_local(
                routing.expert_ids_TK, self.num_experts, counts_E=routing.counts_E, dropless=self.dropless
            )
        return self.gather(x_TD, routing, plan), plan

    def gather(self, x_TD: Float[Tensor, "T D"], routing: Routing, plan: DispatchPlan) -> Float[Tensor, "R D"]:
        """The row of each assignment in the plan's order, under its gate if gates come before the experts."""
        with phases.phase("pack"):
            rows_RD = gather_rows(x_TD, plan.order_R, plan.position_TK)
        if not self.score_before_experts:
            return rows_RD
        fastpaths.note("score_before_experts", "rows multiplied in float32, rounded once")
        # The gates as (N, 1) rows of one assignment each: permuted by the same op, deterministic backward too.
        with phases.phase("score"):
            gate_R1 = gather_rows(routing.gates_TK.reshape(-1, 1), plan.order_R, plan.position_TK.view(-1, 1))
            return (rows_RD * gate_R1).to(x_TD.dtype)

    def combine(
        self,
        rows_RD: Float[Tensor, "R D"],
        routing: Routing,
        plan: DispatchPlan,
        *,
        shared: Callable[[], Tensor] | None = None,
        x_TD: Float[Tensor, "T D"] | None = None,
    ) -> Float[Tensor, "T D"]:
        """Expert outputs summed into their tokens, under the gates unless these were applied before.

        On top of what `shared`, the shared experts, give, if there are any. `scatter_add` may write into that,
        unless it may be part of `x_TD`, the layer's input.
        """
        return self.weigh(rows_RD, routing, plan, None if shared is None else shared(), x_TD)

    def weigh(
        self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan, shared_TD: Tensor | None, x_TD: Tensor | None
    ) -> Float[Tensor, "T D"]:
        """The sum over each token's rows, by the chosen arm, and the shared experts' output."""
        gates_TK = None if self.score_before_experts else routing.gates_TK
        if gates_TK is not None:
            name = "score_after_experts_bf16" if rows_RD.dtype == torch.bfloat16 else "score_after_experts"
            fastpaths.note(name, "weighted in float32 at the combine")
        with phases.phase("combine"):
            if shared_TD is None:
                return self.combine_arm(rows_RD, gates_TK, plan)
            if self.combine_arm is COMBINE_ARMS["scatter_add"] and shared_TD.dtype == rows_RD.dtype:
                return scatter_add_to(shared_TD, rows_RD, gates_TK, plan, protected=x_TD)
            return self.combine_arm(rows_RD, gates_TK, plan) + shared_TD

    def sum_over_ranks(self, counts_E: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
        """Counts of the whole mesh, which is this rank."""
        return counts_E
