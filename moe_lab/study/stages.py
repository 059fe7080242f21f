"""A layer run stage by stage, what each stage gave lined up by token, so that two runs can be compared to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_lab.kernels.blocks import vector_rows
from moe_lab.layer.activations import ACTIVATIONS
from moe_lab.layer.backends import BACKENDS, ROUTED
from moe_lab.layer.backends.weights import Biases, Weights
from moe_lab.layer.moe import MoE
from moe_lab.layer.plan import DispatchPlan
from moe_lab.layer.router import Routing, count, gates_of
from moe_lab.parallel.virtual import VirtualRanks

# In the order in which they run. "experts" is what a backend that shows nothing between its products gives.
STAGES = (
    "router logits",
    "scores",
    "choice",
    "dispatched rows",
    "w1/w3 products",
    "activation",
    "w2 product",
    "experts",
    "shared experts",
    "combine",
    "input gradient",
    "weight gradients",
)
Stages = dict[str, tuple[Tensor, ...]]  # by name of the stage; token by token, but for gradients of weights
Products = list[tuple[Tensor, Tensor, Tensor]]


class Arm(NamedTuple):
    """What is run: a layer, and `add_as_they_come` for rows that `index_add` adds, on CUDA by atomics."""

    moe: MoE
    add_as_they_come: bool = False


def run_stages(
    arm: Arm,
    x_TD: Float[Tensor, "T D"],
    probe_TD: Float[Tensor, "T D"],
    *,
    ep: int = 1,
    recompute: bool = False,
    ids_TK: Int[Tensor, "T K"] | None = None,
) -> Stages:
    """Every stage of a forward, and the gradients of sum(out * probe).

    `ep`: over that many virtual ranks, each with its share of the tokens. `recompute`: under activation
    checkpointing, where only the output and the gradients are seen. `ids_TK`: these experts, not the router's.
    """
    leaf_TD = x_TD.detach().clone().requires_grad_()
    stages: Stages = {}
    if recompute:
        out_TD = checkpoint(partial(_forward, arm, {}, ids_TK=ids_TK), leaf_TD, use_reentrant=False)
    elif ep == 1:
        out_TD = _forward(arm, stages, leaf_TD, ids_TK=ids_TK)
    else:
        out_TD = _spread(arm.moe, stages, leaf_TD, ep)
    leaves = (leaf_TD, *arm.moe.parameters())
    grads = torch.autograd.grad(out_TD, leaves, probe_TD, materialize_grads=True)
    stages |= {"combine": (out_TD,), "input gradient": grads[:1]}
    stages["weight gradients"] = tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads[1:])
    return {name: tuple(t.detach() for t in stages[name]) for name in STAGES if name in stages}


def _forward(arm: Arm, stages: Stages, x_TD: Tensor, *, ids_TK: Tensor | None) -> Tensor:
    """The layer on one rank. Backends that take tokens instead of rows run once more, over rows, to be seen."""
    moe = arm.moe
    routing = moe.router(x_TD, moe.expert_bias_E)
    if ids_TK is not None:
        gates_TK = gates_of(routing.scores_TE, ids_TK, moe.router.config)
        routing = Routing(gates_TK, ids_TK, routing.scores_TE, routing.logits_TE, count(ids_TK, moe.config.num_experts))
    _note_routing(stages, [routing])
    rows_RD, plan = moe.dispatcher.dispatch(x_TD, routing)
    seen: Products = []
    out_RD = _experts(moe, rows_RD, plan.ends_E, dict(moe.experts.named_parameters()), seen)
    stages["dispatched rows"] = (rows_RD[plan.position_TK],)
    products = _by_row(seen, plan.ends_E)
    _note_products(stages, [rows_PF[plan.position_TK] for rows_PF in products], out_RD[plan.position_TK])
    shared = None if moe.shared_experts is None else partial(moe.shared_experts, x_TD)
    if shared is not None:
        stages["shared experts"] = (shared(),)
    if arm.add_as_they_come:
        return _index_add(out_RD, routing, plan, shared)
    if moe.config.backend in ROUTED and moe.dispatcher.may_fuse:
        return moe(x_TD)
    return moe.dispatcher.combine(out_RD, routing, plan, shared=shared, x_TD=x_TD)


def _spread(moe: MoE, stages: Stages, x_TD: Tensor, ep: int) -> Tensor:
    """The layer over virtual ranks; what experts saw goes home as their outputs do, one slot's gate 1 at a time."""
    ranks, xs = VirtualRanks(moe, ep), list(x_TD.tensor_split(ep))
    routings = [moe.router(part_TD, moe.expert_bias_E) for part_TD in xs]
    _note_routing(stages, routings)
    rows = ranks.dispatch(xs, routings)
    weights = {name: weight.chunk(ep) for name, weight in moe.experts.named_parameters()}
    outs, products = [], []
    for rank, (rows_RD, plan) in enumerate(zip(rows, ranks.plans)):
        seen: Products = []
        local = {name: chunks[rank] for name, chunks in weights.items()}
        outs.append(_experts(moe, rows_RD, plan.ends_E, local, seen))
        products.append(_by_row(seen, plan.ends_E))
    home = VirtualRanks(_gathering(moe), ep)
    back = partial(_home, home, xs, routings)
    _note_products(stages, [back(list(parts)) for parts in zip(*products)], back(outs))
    if moe.shared_experts is not None:
        stages["shared experts"] = (torch.cat([moe.shared_experts(part_TD) for part_TD in xs]),)
    return torch.cat(ranks.combine(outs, routings, xs))


def _gathering(moe: MoE) -> MoE:
    """The like of a layer for bringing rows home unweighted, without weights or shared experts."""
    with torch.device("meta"):
        return MoE(moe.config.replace(combine="gather", score_before_experts=False, num_shared_experts=0))


@torch.no_grad()
def _home(ranks: VirtualRanks, xs: Sequence[Tensor], routings: Sequence[Routing], rows: list[Tensor]) -> Tensor:
    """(T, K, ...): rows of experts on ranks, back at their tokens."""
    slots = []
    for k in range(routings[0].gates_TK.shape[1]):
        only = [r._replace(gates_TK=torch.zeros_like(r.gates_TK).index_fill_(1, _index(r, k), 1.0)) for r in routings]
        ranks.dispatch([x_TD.detach() for x_TD in xs], only)
        slots.append(torch.cat(ranks.combine([part.detach() for part in rows], only)))
    return torch.stack(slots, dim=1)


def _index(routing: Routing, k: int) -> Tensor:
    return torch.tensor([k], device=routing.gates_TK.device)


def _experts(moe: MoE, rows_RD: Tensor, ends_E: Tensor, weights: dict[str, Tensor], seen: Products) -> Tensor:
    """Rows through their experts by the layer's backend; what its activation takes and gives is kept in `seen`."""
    w1, w2, w3 = (weights[name].to(rows_RD.dtype) for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
    activation = ACTIVATIONS[moe.config.activation]
    if moe.config.backend not in ROUTED:  # those compute plain SwiGLU by themselves
        activation = _recording(activation, seen)
    biases = [weights[name].to(rows_RD.dtype) for name in ("b1_EF", "b2_ED", "b3_EF") if name in weights]
    return BACKENDS[moe.config.backend](
        rows_RD, ends_E, Weights(w1, w2, w3, Biases(*biases) if biases else None, activation)
    )


def _recording(activation: Callable[[Tensor, Tensor], Tensor], seen: Products) -> Callable[[Tensor, Tensor], Tensor]:
    def recorded(gate: Tensor, up: Tensor) -> Tensor:
        hidden = activation(gate, up)
        seen.append((gate.detach(), up.detach(), hidden.detach()))
        return hidden

    return recorded


def _by_row(seen: Products, ends_E: Tensor) -> list[Tensor]:
    """Gate, up and hidden values (R, F), whether a backend computed rows, padded experts or whole vectors."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    if not seen:
        return []
    if seen[0][0].dim() == 3:
        room_E = torch.full_like(counts_E, seen[0][0].shape[1])
    elif sum(len(gate) for gate, _, _ in seen) == int(ends_E[-1]):
        room_E = counts_E
    else:
        size = vector_rows(seen[0][0].shape[1])
        room_E = -(-counts_E // size) * size
    shift_E = (room_E.cumsum(0) - room_E) - (ends_E - counts_E)
    row_R = torch.arange(int(ends_E[-1]), device=ends_E.device) + shift_E.repeat_interleave(counts_E)
    return [torch.cat([part.flatten(0, -2) for part in parts])[row_R] for parts in zip(*seen)]


def _note_routing(stages: Stages, routings: Sequence[Routing]) -> None:
    stages["router logits"] = (torch.cat([r.logits_TE for r in routings]),)
    stages["scores"] = (torch.cat([r.scores_TE for r in routings]),)
    stages["choice"] = (torch.cat([r.expert_ids_TK for r in routings]),)


def _note_products(stages: Stages, products: Sequence[Tensor], out_TKD: Tensor) -> None:
    if products:
        gate_TKF, up_TKF, hidden_TKF = products
        stages |= {"w1/w3 products": (gate_TKF, up_TKF), "activation": (hidden_TKF,), "w2 product": (out_TKD,)}
    else:
        stages["experts"] = (out_TKD,)


def _index_add(
    rows_RD: Tensor, routing: Routing, plan: DispatchPlan, shared: Callable[[], Tensor] | None
) -> Float[Tensor, "T D"]:
    """Rows weighted, rounded and added to their tokens as the device comes to them."""
    gate_R1 = routing.gates_TK.reshape(-1)[plan.order_R, None]
    weighted_RD = (rows_RD * gate_R1).to(rows_RD.dtype)
    base_TD = rows_RD.new_zeros(plan.num_tokens, rows_RD.shape[1]) if shared is None else shared()
    return base_TD.index_add(0, plan.token_R, weighted_RD)
