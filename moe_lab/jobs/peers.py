"""Ways to run the routed part of a layer on the same inputs: our backends, and known libraries.

An arm takes tokens and gates and returns (T, D); experts are given, and its weights, in our layout, may be its own
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import phases
from moe_lab.jobs.bench_inputs import Inputs
from moe_lab.kernels.scatter_add import deterministic_scatter_add
from moe_lab.layer.backends import ROUTED
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.router import Routing, count


class Arm(NamedTuple):
    """A way to run it: `run(x, gates)` here, and the weights whose gradients it makes."""

    run: Callable[..., Tensor]
    weights: tuple[Tensor, ...]


def grouped_experts_of(inputs: Inputs, backend: str) -> GroupedExperts:
    """Our experts with these weights, not copied."""
    num_experts, hidden_dim, dim = inputs.w1_EFD.shape
    with torch.device("meta"):
        experts = GroupedExperts(dim, hidden_dim, num_experts, backend=backend)
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        setattr(experts, name, torch.nn.Parameter(getattr(inputs, name)))
    return experts


def ours(inputs: Inputs, backend: str) -> Arm:
    """Our layer without its router, with the backend named."""
    experts, num_experts = grouped_experts_of(inputs, backend), len(inputs.w1_EFD)
    dispatcher = LocalTokenDispatcher(num_experts)
    ids_TK = inputs.expert_ids_TK

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        nothing = gates_TK.new_empty(0, num_experts)
        choice = experts.choose(x_TD, ids_TK.numel())
        if choice.backend in ROUTED:  # which need no counts
            routing = Routing(gates_TK, ids_TK, nothing, nothing, ids_TK.new_empty(num_experts))
            with phases.phase("experts"):
                return experts.routed(x_TD, routing, choice)
        routing = Routing(gates_TK, ids_TK, nothing, nothing, count(ids_TK, num_experts))
        rows_RD, plan = dispatcher.dispatch(x_TD, routing)
        with phases.phase("experts"):
            rows_RD = experts(rows_RD, plan.ends_E)
        return dispatcher.combine(rows_RD, routing, plan)

    return Arm(run, tuple(experts.parameters()))


def torchtitan_ops(inputs: Inputs) -> Arm:
    """The ops of torchtitan's MoE, scores applied after the experts, its combine a deterministic scatter_add."""
    w1_EFD, w2_EDF, w3_EFD = (torch.nn.Parameter(w) for w in inputs[3:])
    ids_TK = inputs.expert_ids_TK
    num_experts, top_k = w1_EFD.shape[0], ids_TK.shape[1]

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        chosen_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.bool, device=ids_TK.device)
        ends_E = chosen_TE.scatter_(1, ids_TK, True).sum(0).cumsum(0, dtype=torch.int32)
        order_R = torch.argsort(ids_TK.reshape(-1), stable=True)
        token_R = order_R // top_k
        rows_RD = x_TD[token_R]
        hidden_RF = F.silu(F.grouped_mm(rows_RD, w1_EFD.mT, offs=ends_E))
        hidden_RF = hidden_RF * F.grouped_mm(rows_RD, w3_EFD.mT, offs=ends_E)
        rows_RD = F.grouped_mm(hidden_RF, w2_EDF.mT, offs=ends_E)
        rows_RD = (rows_RD.float() * gates_TK.reshape(-1)[order_R][:, None]).to(x_TD.dtype)
        index_RD = token_R[:, None].expand_as(rows_RD)
        return deterministic_scatter_add(torch.zeros_like(x_TD), index_RD, rows_RD)

    return Arm(run, (w1_EFD, w2_EDF, w3_EFD))


class _Given(torch.nn.Module):
    """A router that was told: gates and experts as they are, of one sequence, and a score a token and expert."""

    def __init__(self, ids_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self.ids_1TK = ids_TK[None]
        self.scores_1TE = torch.zeros(1, len(ids_TK), num_experts, device=ids_TK.device)
        self.gates_TK: Tensor | None = None

    def forward(self, x_1TD: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert self.gates_TK is not None
        return self.gates_TK[None], self.ids_1TK, self.scores_1TE


def torchtitan(inputs: Inputs) -> Arm:
    """Torchtitan's MoE module, its router replaced by one that gives these gates and experts.

    Its experts compute in bfloat16 whatever comes in.
    """
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher as Dispatcher

    num_experts, hidden_dim, dim = inputs.w1_EFD.shape
    config = moe.MoE.Config(
        num_experts=num_experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts),
            token_dispatcher=Dispatcher.Config(num_experts=num_experts, top_k=inputs.expert_ids_TK.shape[1]),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=num_experts, gate=Linear.Config(in_features=dim, out_features=num_experts)
        ),
        load_balance_coeff=None,
    )
    with torch.device("meta"):
        layer = config.build()
    layer.router = given = _Given(inputs.expert_ids_TK, num_experts)
    layer.tokens_per_expert_E = torch.zeros(num_experts, device=inputs.x_TD.device)
    experts = layer.routed_experts.inner_experts
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        setattr(experts, name, torch.nn.Parameter(getattr(inputs, name)))

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        given.gates_TK = gates_TK
        return layer(x_TD[None])[0]

    return Arm(run, tuple(experts.parameters()))


def transformers(inputs: Inputs, how: str = "grouped_mm") -> Arm:
    """The experts of transformers' Qwen3-MoE: `how` is eager, grouped_mm or batched_mm."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    num_experts, hidden_dim, dim = inputs.w1_EFD.shape
    if how == "batched_mm":
        _check_fits("batched_mm copies weights for each assignment:", inputs.expert_ids_TK.numel(), inputs.w1_EFD)
    config = Qwen3MoeConfig(hidden_size=dim, moe_intermediate_size=hidden_dim, num_experts=num_experts)
    config._experts_implementation = how
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(torch.cat((inputs.w1_EFD, inputs.w3_EFD), dim=1))
    experts.down_proj = torch.nn.Parameter(inputs.w2_EDF)

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        return experts(x_TD, inputs.expert_ids_TK, gates_TK.to(x_TD.dtype))

    return Arm(run, tuple(experts.parameters()))


def sonicmoe(inputs: Inputs) -> Arm:
    """SonicMoE's layer behind its router: two autograd functions that gather inside products written in CuTe."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import TC_topk_router_metadata_triton, _DownProjection, _UpProjection

    ids_TK = inputs.expert_ids_TK.int()
    num_experts, num_rows = len(inputs.w1_EFD), ids_TK.numel()
    w13_EGD = torch.nn.Parameter(torch.cat((inputs.w1_EFD, inputs.w3_EFD), dim=1))
    w2_EDF = torch.nn.Parameter(inputs.w2_EDF)

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        counts_E, ends_E1, token_R, order_R, position_N = (
            ids_TK.new_empty(size) for size in (num_experts, num_experts + 1, num_rows, num_rows, num_rows)
        )
        TC_topk_router_metadata_triton(ids_TK, num_experts, counts_E, ends_E1, token_R, order_R, position_N)
        (tokens, top_k), rows = ids_TK.shape, (token_R, order_R, position_N, None, False)
        w13, w2 = w13_EGD.permute(1, 2, 0), w2_EDF.permute(1, 2, 0)
        swiglu, inference = ActivationType.SWIGLU, not torch.is_grad_enabled()
        a, h = _UpProjection.apply(x_TD, w13, None, ends_E1, num_rows, top_k, *rows, swiglu, inference, True)
        return _DownProjection.apply(a, h, w2, None, gates_TK, ends_E1, tokens, top_k, *rows, swiglu)

    return Arm(run, (w13_EGD, w2_EDF))


def _check_fits(what: str, num_rows: int, w1_EFD: Tensor) -> None:
    """Refuse three weights a row that would take more than half of the memory."""
    needed = 3 * num_rows * w1_EFD[0].nbytes
    if w1_EFD.is_cuda:
        there = torch.cuda.mem_get_info(w1_EFD.device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there / 2:
        raise ValueError(f"{what} {needed / 2**30:.1f} GiB, more than half of {there / 2**30:.1f}")


PEERS: dict[str, Callable[[Inputs], Arm]] = {
    "transformers_eager": lambda inputs: transformers(inputs, "eager"),
    "transformers_grouped_mm": lambda inputs: transformers(inputs, "grouped_mm"),
    "transformers_batched_mm": lambda inputs: transformers(inputs, "batched_mm"),
    "torchtitan": torchtitan,
    "torchtitan_ops": torchtitan_ops,
    "sonicmoe": sonicmoe,
}
