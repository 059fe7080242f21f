"""Recorded logits routed in another way: open-loop, because later layers never saw what it would have done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import RouterConfig
from moe_lab.layer.router import Routing
from moe_lab.study.trace import RoutingTrace

MANY = 2**24  # logits


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How K experts are chosen from logits: the router's settings, with or without the recorded balancing bias."""

    top_k: int
    router: RouterConfig
    use_bias: bool = True
    temperature: float = 1.0

    @classmethod
    def recorded(cls, trace: RoutingTrace) -> Choice:
        """The choice that the recorded model made itself."""
        return cls(top_k=trace.top_k, router=trace.info.router, use_bias=has_bias(trace))

    def but(self, **changes: Any) -> Choice:
        """The same choice with some settings changed, by the field names of `Choice` and `RouterConfig`."""
        own = {name: changes.pop(name) for name in ("top_k", "use_bias", "temperature") if name in changes}
        return dataclasses.replace(self, router=dataclasses.replace(self.router, **changes), **own)

    def __str__(self) -> str:
        router = self.router
        if router.force_load_balance:
            return f"K {self.top_k}, forced {router.force_load_balance.replace('_', ' ')}"
        parts = [f"K {self.top_k}", router.score_func]
        if router.num_expert_groups:
            parts.append(f"{router.num_expert_groups} groups keep {router.num_limited_groups}")
        parts.append("bias on" if self.use_bias else "bias off")
        if self.temperature != 1:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)

    def route(self, trace: RoutingTrace, layer: int) -> Routing:
        """`trace.reroute` with these settings."""
        return trace.reroute(layer, self.router, self.top_k, use_bias=self.use_bias, temperature=self.temperature)


def has_bias(trace: RoutingTrace) -> bool:
    """Whether a balancing bias was at work when the trace was recorded."""
    return trace.expert_bias_LE is not None and bool(trace.expert_bias_LE.any())


@lru_cache(maxsize=16)
def rerouted(trace: RoutingTrace, choice: Choice) -> RoutingTrace:
    """The trace that `choice` makes of the recorded logits: its ids instead of the recorded ones, without gates.

    The recorded choice gives the trace itself. Raises `ValueError` for settings that cannot choose, and for a
    trace without logits.
    """
    if choice == Choice.recorded(trace):
        return trace
    choice.router.check(trace.num_experts, choice.top_k)
    ids_LTK = _ranking(trace, dataclasses.replace(choice, top_k=_reach(trace, choice)))[..., : choice.top_k]
    info = dataclasses.replace(trace.info, top_k=choice.top_k, router=choice.router)
    # the router made these ids: to check them again would cost a slider's move more than all the rest
    return trace.unchecked(info=info, expert_ids_LTK=ids_LTK, gates_LTK=None, logits_LTE=None)


def is_long(trace: RoutingTrace) -> bool:
    """Whether ranking all experts of all its tokens takes seconds."""
    return trace.num_layers * trace.num_tokens * trace.num_experts > MANY


def _reach(trace: RoutingTrace, choice: Choice) -> int:
    """The largest K whose first experts are those of every smaller K: all that a token could be given.

    Of a long trace only what is asked for, rounded up to a power of two.
    """
    router, most = choice.router, trace.num_experts
    if router.force_load_balance or router.group_score == "topk_share":
        return choice.top_k
    if router.num_expert_groups and router.num_limited_groups:
        most = trace.num_experts // router.num_expert_groups * router.num_limited_groups
    return min(most, 1 << (choice.top_k - 1).bit_length()) if is_long(trace) else most


@lru_cache(maxsize=2)
def _ranking(trace: RoutingTrace, choice: Choice) -> Int[Tensor, "L T K"]:
    """Experts of every token, the best first; kept, so that a slider of K only takes more or fewer of them."""
    ids = [choice.route(trace, layer).expert_ids_TK.to(torch.int16) for layer in trace.info.layers]
    return torch.stack(ids)
