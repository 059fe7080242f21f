"""The ways back from experts to tokens, held against float64 and against themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.config import RouterConfig, check_int
from moe_lab.layer.combine import COMBINE_ARMS
from moe_lab.layer.plan import DispatchPlan, plan_local
from moe_lab.layer.router import route


class ArmError(NamedTuple):
    """One combine arm: `error` relative to float64 (norms), `repeats` that gave the same bits of `runs`."""

    name: str
    error: float
    repeats: int
    runs: int


class ArmErrors(NamedTuple):
    """All arms over the same rows, and what is left to chance when rows are added as they arrive.

    `arrival_results`: different outcomes (bit patterns of the whole result) of `arrival_runs` random orders;
    `arrival_tokens`: share of tokens that differ between the first two of them.
    """

    arms: tuple[ArmError, ...]
    arrival_error: float
    arrival_results: int
    arrival_runs: int
    arrival_tokens: float
    dtype: torch.dtype
    tokens: int
    top_k: int

    def __repr__(self) -> str:
        lines = [f"{self.tokens:,} tokens x {self.top_k}, {str(self.dtype).removeprefix('torch.')}"]
        lines.append(f"{'arm':<18} {'error':>8}   same bits")
        for arm in self.arms:
            lines.append(f"{arm.name:<18} {arm.error:>8.1e}   {arm.repeats} of {arm.runs} runs")
        lines.append(
            f"{'as rows arrive':<18} {self.arrival_error:>8.1e}   {self.arrival_results} results in "
            f"{self.arrival_runs} runs; two of them differ in {100 * self.arrival_tokens:.0f} % of tokens"
        )
        return "\n".join(lines)


def compare_arms(
    *,
    tokens: int = 512,
    dim: int = 64,
    num_experts: int = 16,
    top_k: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    runs: int = 5,
    seed: int = 0,
) -> ArmErrors:
    """Combine drawn expert outputs by every arm, `runs` times, and by adding rows in random orders.

    The random orders stand for atomic adds on a GPU, where rows are added as they arrive, each addition rounded to
    `dtype`. Here the orders are drawn, so the result is the same everywhere. Fixed by `seed`.
    """
    check_int("runs", runs, 2)
    draw = torch.Generator().manual_seed(seed)
    routing = route(torch.randn(tokens, num_experts, generator=draw), RouterConfig(route_norm=True), top_k)
    plan = plan_local(routing.expert_ids_TK, num_experts)
    rows_RD = torch.randn(plan.num_rows, dim, generator=draw).to(dtype)
    exact_TD = _in_order(rows_RD.double(), routing.gates_TK.double(), plan, torch.arange(plan.num_rows))
    arms = []
    for name, arm in COMBINE_ARMS.items():
        results = [arm(rows_RD, routing.gates_TK, plan) for _ in range(runs)]
        same = sum(torch.equal(result, results[0]) for result in results)
        arms.append(ArmError(name, _error(results[0], exact_TD), same, runs))
    orders = [torch.randperm(plan.num_rows, generator=draw) for _ in range(runs)]
    arrived = [_in_order(rows_RD, routing.gates_TK, plan, order) for order in orders]
    different = len({result.contiguous().view(torch.uint8).numpy().tobytes() for result in arrived})
    changed_T = (arrived[0] != arrived[1]).any(dim=1)
    return ArmErrors(
        tuple(arms),
        max(_error(result, exact_TD) for result in arrived),
        different,
        runs,
        float(changed_T.double().mean()),
        dtype,
        tokens,
        top_k,
    )


def _in_order(rows_RD: Tensor, gates_TK: Tensor, plan: DispatchPlan, order_R: Tensor) -> Float[Tensor, "T D"]:
    """Weighted rows added to their tokens one after another in this order, every product and sum rounded."""
    weighted_RD = (rows_RD * gates_TK.reshape(-1)[plan.order_R, None]).to(rows_RD.dtype)
    token_R = plan.token_R
    # The n-th row of each token in this order: within a round no token comes twice.
    rank_R = torch.empty_like(order_R)
    by_token = token_R[order_R].argsort(stable=True)
    starts_T = torch.arange(plan.num_tokens) * plan.top_k
    rank_R[order_R[by_token]] = torch.arange(plan.num_rows) - starts_T[token_R[order_R[by_token]]]
    out_TD = rows_RD.new_zeros(plan.num_tokens, rows_RD.shape[1])
    for k in range(plan.top_k):
        round_R = rank_R == k
        out_TD[token_R[round_R]] = out_TD[token_R[round_R]] + weighted_RD[round_R]
    return out_TD


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
