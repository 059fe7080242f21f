"""Layers spread over ranks, drawn at random, and the one-rank layer that each must equal."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab import MoE, MoEConfig, RouterConfig
from moe_lab.layer.placement import Placement

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What a seed drew: a layer, its ranks and the tokens that each brings."""

    seed: int
    config: MoEConfig
    ep: int
    tokens: tuple[int, ...]
    placement: Placement | None = None
    tokens_per_rank: int | None = None

    @property
    def options(self):
        """What every rank is wired with."""
        return {"placement": self.placement, "tokens_per_rank": self.tokens_per_rank}

    def build(self, dtype=torch.float64) -> MoE:
        """The layer, with a router that prefers some experts and leaves others empty."""
        torch.manual_seed(self.seed)
        moe = MoE(self.config).to(dtype)
        moe.expert_bias_E.copy_(torch.randn(self.config.num_experts))
        for name, parameter in moe.experts.named_parameters():
            if name.startswith("b"):
                torch.nn.init.normal_(parameter)  # a zero row then has an output, which must not leak
        return moe

    def inputs(self, dtype=torch.float64) -> list[tuple[Tensor, Tensor]]:
        """(x, probe) of each rank; the loss is the sum of out * probe."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shapes = [(2, tokens, self.config.dim) for tokens in self.tokens]
        return [tuple(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def draw(seed: int, eps: tuple[int, ...] = (2,) * 6 + (4,) * 6 + (8,) * 2 + (32,)) -> Case:
    """A case over plan kinds, reorderings, score positions, pad multiples, placements; empty ranks among them."""
    rng = random.Random(seed)
    ep = rng.choice(eps)
    per_rank = rng.choice([1, 2, 3]) if ep < 32 else 1
    num_experts = ep * per_rank
    top_k = min(num_experts, rng.choice([1, 2, 3, per_rank]))
    forced = rng.random() < 0.3
    even = rng.choice([0, 3, ep * per_rank, 7])
    tokens = tuple(even if forced else rng.choice([0, 1, 5, 9]) for _ in range(ep))
    placement = None
    if rng.random() < 0.3:
        slots = [*range(num_experts), *(rng.randrange(num_experts) for _ in range(ep * rng.choice([0, 1])))]
        rng.shuffle(slots)
        placement = Placement(num_experts, ep, tuple(slots))
    transposed = forced and placement is None and even * top_k % num_experts == 0
    config = MoEConfig(
        dim=4,
        hidden_dim=6,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=rng.choice([0, 1]),
        router=RouterConfig(
            score_func=rng.choice(["softmax", "sigmoid"]),
            route_norm=top_k > 1 and rng.random() < 0.5,  # the gradient of one normed gate is 0, plus rounding
            force_load_balance="round_robin" if forced else None,
        ),
        score_before_experts=rng.random() < 0.5,
        combine=rng.choice(["gather", "scatter_add"]),
        mlp_bias=(mlp_bias := rng.random() < 0.3),
        activation="clamped_swiglu" if mlp_bias else "swiglu",
        capacity_factor=rng.choice([None, None, None, 1.0]),
        reorder=rng.choice(["auto", "index", "segment_cat", *(["equal_count"] * 4 if transposed else [])]),
        equal_split=rng.choice(["off", "adaptive", "force"]),
        equal_split_threshold=rng.choice([0.0, 0.1, 50.0]),
        pad_multiple=rng.choice([1, 8, 16, 32]),
    )
    declared = even if forced and rng.random() < 0.7 else None
    return Case(seed, config, ep, tokens, placement, declared)


def one_rank(case: Case, dtype=torch.float64) -> list[Result]:
    """Each rank's tokens through the whole layer on one rank: out, gradients of x and gates, and those of weights."""
    moe, results = case.build(dtype), []
    for x, probe in case.inputs(dtype):
        results.append(_run(moe, x, probe))
    return results


def _run(moe: MoE, x: Tensor, probe: Tensor) -> Result:
    routings = []
    hook = moe.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    x = x.detach().requires_grad_()
    out = moe(x)
    hook.remove()
    names, params = zip(*moe.named_parameters())
    leaves = (x, routings[0].gates_TK, *params)
    grads = torch.autograd.grad((out * probe).sum(), leaves, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(("x", "gates", *names), grads))}


def on_this_rank(case: Case, wire, rank: int, dtype=torch.float64, **options) -> Result:
    """One real rank's part, on a layer that `wire` spreads."""
    moe = wire(case.build(dtype), **case.options, **options)
    return _run(moe, *case.inputs(dtype)[rank])


def virtual(case: Case, ranks, dtype=torch.float64) -> tuple[list[Result], Result]:
    """All ranks in this process: each one's out and gradients of x and gates; gradients of weights, summed."""
    moe = ranks.moe
    xs, probes = zip(*case.inputs(dtype))
    xs = [x.requires_grad_() for x in xs]
    outs = ranks(xs)
    loss = sum((out * probe).sum() for out, probe in zip(outs, probes))
    names, params = zip(*moe.named_parameters())
    gates = [routing.gates_TK for routing in ranks.routings]
    grads = torch.autograd.grad(loss, (*xs, *gates, *params), materialize_grads=True)
    each = [
        {"out": out.detach(), "x": x, "gates": g}
        for out, x, g in zip(outs, grads[: case.ep], grads[case.ep : 2 * case.ep])
    ]
    return each, dict(zip(names, grads[2 * case.ep :]))


def check(got: Tensor, parts: list[Tensor], what: str) -> None:
    """float64 against the sum of float64 parts: only the order of sums may differ."""
    scale = sum(float(part.norm()) for part in parts) or 1.0
    error = float((got - sum(parts)).norm()) / scale
    assert error <= 1e-14, f"{what}: relative error {error:.2e}"
