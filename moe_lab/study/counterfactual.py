"""The same recorded logits under every method of balancing: open-loop, since later layers never see the new choice.

A step is one micro-batch of each of `ep` ranks, documents packed in a shuffled order, the trace over and over. What a
method learns is learned on these steps: the balancing bias moves the choice only; a loss moves an offset of each
expert's logits, which is all of a router that recorded logits leave to move. Its step has the coefficient's size, as
Adam's has: the gradient over its root mean square. All in float64, so that the counts are those of any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.config import RouterConfig, check_choice, check_int
from moe_lab.layer.balance import bias_delta
from moe_lab.layer.capacity import drop_over_capacity
from moe_lab.layer.losses import switch_loss, transformers_loss, z_loss
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import Routing, route
from moe_lab.study.balancing import Method, method
from moe_lab.study.load import ALL_DOMAINS, Load, packing_order
from moe_lab.study.metrics import LoadImbalance, measure, null_band
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.waste import Waste, waste

SETTINGS: dict[str, dict[str, Any]] = {"none": {"policy": "none"}, "equal split": {"policy": "equal_split"}}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How logits are cut: `ep` ranks of `tokens_per_rank` tokens a step, `steps` of them to learn in."""

    ep: int = 4
    tokens_per_rank: int = 512
    steps: int = 40

    def __post_init__(self) -> None:
        for name in ("ep", "tokens_per_rank", "steps"):
            check_int(name, getattr(self, name), 1)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.ep * self.tokens_per_rank


SETUP = Setup()


class Learned(NamedTuple):
    """What a method made of its steps, layer by layer.

    `state_LE`: the bias, or the offset of logits; zero for methods that learn nothing. `counts_SLE`: assignments that
    experts took at each step, before it moved anything. `loss_S`: the loss, NaN for methods without one.
    """

    state_LE: Float[Tensor, "L E"]
    counts_SLE: Int[Tensor, "S L E"]
    loss_S: Float[Tensor, " S"]


class Outcome(NamedTuple):
    """One method over every whole step of a trace in one layer, after it learned.

    `load` of what experts compute, a step a window. Shares of all assignments of the unconstrained choice: `dropped`
    that nobody computes, `rerouted` that went elsewhere or nowhere; `gate_lost`, of its gate weights, what those
    experts no longer get. `unserved`: tokens without any expert. `waste`: rows at the ranks, with and without even
    splits.
    """

    method: str
    coefficient: float
    setup: Setup
    load: Load
    dropped: float
    unserved: float
    rerouted: float
    gate_lost: float
    waste: Waste

    @property
    def straggler_factor(self) -> float:
        """Rows of the busiest rank, step by step, over the mean."""
        return self.waste.total("none").straggler_factor

    @property
    def padding(self) -> float:
        """Zero rows over real rows in both exchanges under even splits."""
        return self.waste.total("equal split").overhead.exchange_overhead

    @property
    def exchanged(self) -> int:
        """Rows that leave their rank in all dispatches, one an assignment."""
        return sum(self.waste.traffic.per_assignment_R) if self.waste.traffic is not None else 0


def apply(
    way: Method,
    router: RouterConfig,
    top_k: int,
    logits_TE: Float[Tensor, "T E"],
    state_E: Float[Tensor, " E"],
    coefficient: float | None = None,
) -> Routing:
    """One rank's micro-batch under a method. `ValueError` for jitter, which needs what the router reads."""
    if way.acts == "noise":
        raise ValueError("jitter multiplies the router's input, which a trace does not hold: run the model with it")
    if way.where == "loss":
        return route(logits_TE + state_E, router, top_k)
    config = RouterConfig(**{**_plain(router), **way.router})
    routing = route(logits_TE, config, top_k, expert_bias_E=state_E if way.sets == "load_balance_coeff" else None)
    if way.acts != "drops":
        return routing
    slot_major = way.layer.get("drop_order") == "slot_major"
    return drop_over_capacity(routing, way.strength(coefficient), way.layer["drop_policy"], slot_major=slot_major)


def _plain(router: RouterConfig) -> dict[str, Any]:
    return dataclasses.asdict(router) | {"force_load_balance": None, "jitter": 0.0, "choose_by": "top_k"}


@lru_cache(maxsize=4)
def packed_logits(trace: RoutingTrace) -> Float[Tensor, "L T E"]:
    """Logits of the valid tokens in the order of packing, float64. `ValueError` for a trace without logits."""
    if trace.logits_LTE is None:
        raise ValueError("this trace has no logits_LTE, only what was chosen: a counterfactual needs logits")
    return trace.logits_LTE[:, _order(trace)].double()


@lru_cache(maxsize=4)
def _order(trace: RoutingTrace) -> Int[Tensor, " T"]:
    order_T = packing_order(trace)
    return order_T[trace.valid_T[order_T]]


@lru_cache(maxsize=64)
def learn(
    trace: RoutingTrace,
    name: str,
    coefficient: float | None = None,
    *,
    setup: Setup = SETUP,
    layer: int | None = None,
) -> Learned:
    """Let a method act over the steps of one layer, or of all.

    `ValueError` for unknown names, jitter, and a trace of fewer tokens than a step.
    """
    way = method(name)
    if layer is not None:
        check_choice("layer", layer, trace.info.layers)
    places = range(len(trace.info.layers)) if layer is None else [trace.info.layers.index(layer)]
    pooled = way.sets == "hf_coeff"  # its layers move together
    worked = range(len(trace.info.layers)) if pooled else places
    logits_LTE, router = packed_logits(trace)[list(worked)], RouterConfig(**_plain(trace.info.router))
    whole = _steps(trace, setup)
    state_LE = torch.zeros(len(worked), trace.num_experts, dtype=torch.float64)
    counts, losses = [], []
    for step in range(setup.steps):
        piece = slice(*(setup.tokens * (step % whole + i) for i in (0, 1)))
        if way.where == "loss":
            state_LE = state_LE.detach().requires_grad_()
            routings = [apply(way, router, trace.top_k, *pair) for pair in zip(logits_LTE[:, piece], state_LE)]
            loss = _loss(way, routings, trace.document_T[_order(trace)[piece]].long(), setup)
            (gradient_LE,) = torch.autograd.grad(loss, state_LE)
            losses.append(float(loss.detach()) / (1 if pooled else len(worked)))
            size_L1 = gradient_LE.square().mean(dim=1, keepdim=True).sqrt()
            state_LE = state_LE.detach() - way.strength(coefficient) * gradient_LE / size_L1.clamp(min=1e-12)
            counts_LE = torch.stack([routing.counts_E for routing in routings])
        else:
            taken = partial(_counts, way, router, trace.top_k, setup, coefficient)
            counts_LE = torch.stack([taken(*pair) for pair in zip(logits_LTE[:, piece], state_LE)])
            losses.append(torch.nan)
            if way.sets == "load_balance_coeff":
                centred = way.layer.get("bias_centred", True)
                steps = [bias_delta(c, way.strength(coefficient), centred=centred) for c in counts_LE]
                state_LE = state_LE + torch.stack(steps)
        counts.append(counts_LE)
    kept = [list(worked).index(place) for place in places]
    return Learned(state_LE[kept].detach(), torch.stack(counts)[:, kept], torch.tensor(losses, dtype=torch.float64))


def _steps(trace: RoutingTrace, setup: Setup) -> int:
    """Whole steps that a trace holds."""
    tokens = len(_order(trace))
    if tokens < setup.tokens:
        size = f"tokens_per_rank={setup.tokens_per_rank} on ep={setup.ep} ranks"
        raise ValueError(f"{size} is {setup.tokens:,} tokens: this trace has {tokens:,}")
    return tokens // setup.tokens


def _counts(
    way: Method,
    router: RouterConfig,
    top_k: int,
    setup: Setup,
    coefficient: float | None,
    logits_TE: Tensor,
    state_E: Tensor,
) -> Int[Tensor, " E"]:
    """Assignments of a step, each rank by itself where a choice hangs on its whole micro-batch."""
    parts = setup.ep if way.acts == "drops" or way.router else 1
    routings = [apply(way, router, top_k, part, state_E, coefficient) for part in logits_TE.chunk(parts)]
    return torch.stack([routing.counts_E for routing in routings]).sum(dim=0)


def _loss(way: Method, routings: Sequence[Routing], document_T: Tensor, setup: Setup) -> Float[Tensor, ""]:
    """A step's loss in the method's reduction, summed over layers."""
    if way.sets == "hf_coeff":
        return transformers_loss([r.logits_TE for r in routings], routings[0].expert_ids_TK.shape[1])
    if way.sets == "z_coeff":
        return torch.stack([z_loss(r.logits_TE) for r in routings]).sum()
    rank_T = torch.arange(len(document_T)) // setup.tokens_per_rank
    part_T = {"switch_coeff": rank_T, "sequence_coeff": document_T, "global_coeff": None}[way.sets or ""]
    return torch.stack([switch_loss(r.scores_TE, r.expert_ids_TK, sequence_T=part_T) for r in routings]).sum()


@lru_cache(maxsize=256)
def outcome(
    trace: RoutingTrace, name: str, coefficient: float | None = None, *, setup: Setup = SETUP, layer: int
) -> Outcome:
    """Let a method learn in one layer, then route every whole step of the trace under it.

    `ValueError` as `learn` and for an `ep` that does not divide the experts.
    """
    placement = Placement.blockwise(trace.num_experts, setup.ep)
    way, top_k, whole = method(name), trace.top_k, _steps(trace, setup)
    router = RouterConfig(**_plain(trace.info.router))
    state_E = learn(trace, name, coefficient, setup=setup, layer=layer).state_LE[0]
    logits_TE = packed_logits(trace)[trace.info.layers.index(layer), : whole * setup.tokens]
    parts = [apply(way, router, top_k, part, state_E, coefficient) for part in logits_TE.split(setup.tokens_per_rank)]
    free = route(logits_TE, router, top_k)
    gates_TE = torch.cat([_dense(part) for part in parts])
    free_TE, made_TE = _dense(free), torch.cat([_made(part) for part in parts])
    chosen_TE, assignments = _made(free), len(logits_TE) * top_k
    ids = [part.expert_ids_TK for part in parts]
    steps = [ids[i : i + setup.ep] for i in range(0, len(ids), setup.ep)]
    counts_WE = torch.stack([part.counts_E for part in parts]).unflatten(0, (whole, setup.ep)).sum(dim=1)
    return Outcome(
        method=name,
        coefficient=way.strength(coefficient),
        setup=setup,
        load=_load(layer, setup.tokens, top_k, counts_WE),
        dropped=1 - int(counts_WE.sum()) / assignments if way.acts == "drops" else 0.0,
        unserved=float((~made_TE.any(dim=1)).double().mean()),
        rerouted=int((chosen_TE & ~made_TE).sum()) / assignments,
        gate_lost=float((free_TE - gates_TE).clamp(min=0).sum() / free_TE.sum()),
        waste=waste(steps, placement, layer=layer, settings=SETTINGS),
    )


def _made(routing: Routing) -> Tensor:
    """Whether a token goes to an expert, (T, E)."""
    ids_TK = routing.expert_ids_TK
    made_TE = torch.zeros(len(ids_TK), routing.scores_TE.shape[1] + 1, dtype=torch.bool)
    return made_TE.scatter_(1, ids_TK.where(ids_TK >= 0, made_TE.shape[1] - 1), True)[:, :-1]


def _dense(routing: Routing) -> Tensor:
    """Gates by expert, (T, E), 0 where not chosen."""
    ids_TK = routing.expert_ids_TK
    gates_TE = routing.gates_TK.new_zeros(len(ids_TK), routing.scores_TE.shape[1])
    return gates_TE.scatter_add_(1, ids_TK.clamp(min=0), routing.gates_TK.detach())


def _load(layer: int, tokens: int, top_k: int, counts_WE: Int[Tensor, "W E"]) -> Load:
    windows, experts = counts_WE.shape
    metrics = LoadImbalance(*np.mean(measure(counts_WE.numpy()), axis=0).tolist())
    shares_E = counts_WE.sum(dim=0).double() / counts_WE.sum()
    dropped = max(0, windows * tokens * top_k - int(counts_WE.sum()))
    null = null_band(tokens, top_k, experts, windows=windows)
    return Load(layer, ALL_DOMAINS, tokens, windows, metrics, null, shares_E, dropped)
