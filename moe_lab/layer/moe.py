"""The layer: router -> plan -> dispatch -> experts -> combine, beside the shared experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lab import phases
from moe_lab.config import MoEConfig
from moe_lab.layer.auto import Choice
from moe_lab.layer.backends import ROUTED
from moe_lab.layer.balance import bias_delta
from moe_lab.layer.capacity import drop_over_capacity
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.layer.experts import GroupedExperts, SharedExperts
from moe_lab.layer.router import Routing, TokenChoiceTopKRouter


def _in_backward() -> bool:
    """Whether autograd runs backward on this thread: a forward there is a recompute, counted when it first ran.

    Not known while compiling: a compiled layer counts its recompute too, which no sign of a difference feels.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer.

    `expert_bias_E` moves the choice of experts towards balance; `tokens_per_expert_E` holds the assignments
    counted in training since the last `update_expert_bias`.
    """

    expert_bias_E: Tensor
    tokens_per_expert_E: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = TokenChoiceTopKRouter(
            config.dim, config.num_experts, config.top_k, config.router, batch_invariant=config.batch_invariant
        )
        self.dispatcher = LocalTokenDispatcher(
            config.num_experts,
            combine=config.combine,
            score_before_experts=config.score_before_experts,
            dropless=config.capacity_factor is None,
            forced=config.router.force_load_balance == "round_robin",
        )
        self.experts = GroupedExperts(
            config.dim,
            config.hidden_dim,
            config.num_experts,
            backend=config.backend,
            activation=config.activation,
            mlp_bias=config.mlp_bias,
        )
        self.shared_experts = (
            SharedExperts(
                config.dim,
                config.hidden_dim,
                config.num_shared_experts,
                gated=config.shared_expert_gate,
                batch_invariant=config.batch_invariant,
            )
            if config.num_shared_experts
            else None
        )
        self.register_buffer("expert_bias_E", torch.zeros(config.num_experts))
        self.register_buffer(
            "tokens_per_expert_E", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights again, each part in its own way; the balancing bias and the counts begin at zero."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, GroupedExperts)):
                part.reset_parameters()
        self.expert_bias_E.zero_()
        self.tokens_per_expert_E.zero_()

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens D"]:
        """(T, D) or (B, L, D) -> the same shape. `ValueError` for any other, naming it."""
        if x.dim() not in (2, 3) or x.shape[-1] != self.config.dim or not x.is_floating_point():
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}: must be floating point (T, {self.config.dim}) "
                f"or (B, L, {self.config.dim})"
            )
        if x.device != self.router.gate.weight.device:
            raise ValueError(f"x is on {x.device}: must be on {self.router.gate.weight.device}, where the layer is")
        x_TD = x.reshape(-1, self.config.dim)
        with phases.phase("router"):
            routing = self.router(x_TD, self.expert_bias_E)
        if self.training and not _in_backward():
            self.tokens_per_expert_E += routing.counts_E  # what was asked for, before drops
        if self.config.capacity_factor is not None:
            slot_major = self.config.drop_order == "slot_major"
            routing = drop_over_capacity(
                routing, self.config.capacity_factor, self.config.drop_policy, slot_major=slot_major
            )
        return self._computed(x_TD, routing).view(x.shape)

    def _computed(self, x_TD: Tensor, routing: Routing) -> Tensor:
        shared = None if self.shared_experts is None else partial(self._shared, x_TD)
        if self.dispatcher.may_fuse and self._routes(
            choice := self.experts.choose(x_TD, routing.expert_ids_TK.numel(), routing.counts_E)
        ):
            with phases.phase("experts"):
                out_TD = self.experts.routed(x_TD, routing, choice)
            return out_TD if shared is None else out_TD + shared()
        rows_RD, plan = self.dispatcher.dispatch(x_TD, routing)
        with phases.phase("experts"):
            rows_RD = self.experts(rows_RD, plan.ends_E)
        return self.dispatcher.combine(rows_RD, routing, plan, shared=shared, x_TD=x_TD)

    def _routes(self, choice: Choice) -> bool:
        """Whether the backend moves rows and weighs them by itself; `fused` has no way to drop any."""
        return choice.backend in ROUTED and (choice.backend != "fused" or self.config.capacity_factor is None)

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared_experts is not None
        with phases.phase("shared experts"):
            return self.shared_experts(x_TD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        # The bias moves by steps far below a bfloat16 ulp: `.bfloat16()` must not round it.
        bias_E = self.expert_bias_E
        super()._apply(fn, recurse)
        if self.expert_bias_E.dtype != bias_E.dtype:
            self.expert_bias_E = bias_E.to(self.expert_bias_E.device)
        return self

    @torch.no_grad()
    def update_expert_bias(self) -> None:
        """One balancing step from the counts since the last, which are cleared. Once an optimizer step."""
        if self.config.load_balance_coeff:
            counts_E = self.dispatcher.sum_over_ranks(self.tokens_per_expert_E)
            step_E = bias_delta(counts_E, self.config.load_balance_coeff, centred=self.config.bias_centred)
            self.expert_bias_E += step_E
        self.tokens_per_expert_E.zero_()
