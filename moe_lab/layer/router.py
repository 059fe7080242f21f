"""Which experts each token goes to, and with what weight.

`route` is the whole decision as a pure function of logits, so that recorded logits can be routed again in any
other way. `TokenChoiceTopKRouter` adds the learned projection that makes logits from tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lab import contracts
from moe_lab.config import RouterConfig
from moe_lab.kernels.blocks import fixed_elementwise, fixed_linear
from moe_lab.layer.choosing import expert_choice, sinkhorn, stable_topk


class Routing(NamedTuple):
    """What a router decided for T tokens, whoever the router was: live, recorded, or someone else's.

    `gates_TK` float32 weights of the chosen experts; `expert_ids_TK` int64, -1 where the assignment was dropped
    (its gate is 0); `scores_TE` and `logits_TE` before the choice; `counts_E` int64 assignments kept by each
    expert. Kept plus dropped assignments are T*K. `requested_E`: what each expert was asked for before drops, None
    where nothing was dropped.
    """

    gates_TK: Float[Tensor, "T K"]
    expert_ids_TK: Int[Tensor, "T K"]
    scores_TE: Float[Tensor, "T E"]
    logits_TE: Float[Tensor, "T E"]
    counts_E: Int[Tensor, " E"]
    requested_E: Int[Tensor, " E"] | None = None

    @property
    def num_dropped(self) -> int:
        """Assignments dropped, T*K minus those kept."""
        return self.expert_ids_TK.numel() - int(self.counts_E.sum())


def score(logits_TE: Float[Tensor, "T E"], score_func: str) -> Float[Tensor, "T E"]:
    """Scores from logits, float32 (float64 stays float64)."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if score_func == "softmax":
        return logits_TE.softmax(dim=-1)
    if score_func == "sigmoid":
        return logits_TE.sigmoid()
    # Far below zero softplus is 0 and the slope of its root infinite: 0 * inf would be NaN.
    return F.softplus(logits_TE).clamp(min=torch.finfo(logits_TE.dtype).tiny).sqrt()


def limit_groups(choice_TE: Float[Tensor, "T E"], config: RouterConfig, top_k: int) -> Float[Tensor, "T E"]:
    """Set experts outside each token's best `num_limited_groups` groups to -inf.

    DeepSeek-V2 (arXiv:2405.04434, section 2.1.2) limits by the best expert, DeepSeek-V3 (arXiv:2412.19437, 2.1.2)
    by the sum of the best two, Megatron-Core by the sum of the best K // limited.
    """
    if config.num_expert_groups is None or config.num_limited_groups is None:
        return choice_TE
    groups, limited = config.num_expert_groups, config.num_limited_groups
    choice_TGe = choice_TE.unflatten(-1, (groups, -1))
    best = {"top2": 2, "max": 1, "topk_share": top_k // limited}[config.group_score]
    group_score_TG = choice_TGe.topk(best, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
    kept_TG.scatter_(1, stable_topk(group_score_TG, limited), True)
    return choice_TGe.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def route(
    logits_TE: Float[Tensor, "T E"],
    config: RouterConfig,
    top_k: int,
    *,
    expert_bias_E: Float[Tensor, " E"] | None = None,
    generator: torch.Generator | None = None,
    batch_invariant: bool = False,
) -> Routing:
    """Choose `top_k` experts a token from logits (T, E); gates are differentiable in the logits.

    `expert_bias_E` moves the choice only: gates come from the unbiased scores (DeepSeek's loss-free balancing,
    arXiv:2408.15664). With `choose_by="expert_choice"` each expert takes ceil(T K / E) tokens; K is then the most
    that a token got, -1 stands where it got fewer, and nothing was dropped. `generator` draws the logits of
    `force_load_balance="random"`. `batch_invariant`: scores have the same bits whatever else is in the batch.

    Raises `ValueError` for settings that cannot choose (see `RouterConfig.check`) and for NaN or infinite
    logits, naming the first bad token (on CPU; on CUDA a device-side assertion, without a host sync).
    """
    num_experts = logits_TE.shape[1]
    config.check(num_experts, top_k)
    contracts.check_finite("logits", logits_TE)
    scored = partial(score, score_func=config.score_func)
    scores_TE = fixed_elementwise(scored, logits_TE) if batch_invariant else scored(logits_TE)
    if config.force_load_balance is not None:
        expert_ids_TK = _forced_ids(scores_TE, config.force_load_balance, top_k, generator)
    elif config.choose_by == "sinkhorn":
        expert_ids_TK = stable_topk(sinkhorn(logits_TE), top_k)
    elif config.choose_by == "expert_choice":
        expert_ids_TK = expert_choice(scores_TE.detach(), -(-len(logits_TE) * top_k // num_experts))
    else:
        choice_TE = scores_TE.detach() if expert_bias_E is None else scores_TE.detach() + expert_bias_E
        expert_ids_TK = stable_topk(limit_groups(choice_TE, config, top_k), top_k)
    if config.choose_by == "expert_choice":  # -1, where a token has fewer experts than another, weighs nothing
        filled_TK = expert_ids_TK.where(expert_ids_TK >= 0, num_experts)
        gates_TK = gates_of(F.pad(scores_TE, (0, 1)), filled_TK, config)
    else:
        gates_TK = gates_of(scores_TE, expert_ids_TK, config)
    return Routing(gates_TK, expert_ids_TK, scores_TE, logits_TE, count(expert_ids_TK, num_experts))


def gates_of(
    scores_TE: Float[Tensor, "T E"], expert_ids_TK: Int[Tensor, "T K"], config: RouterConfig
) -> Float[Tensor, "T K"]:
    """Weights of experts that were chosen, however they were: their scores, normalised and scaled as configured."""
    gates_TK = scores_TE.gather(1, expert_ids_TK)
    if config.route_norm:
        gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return gates_TK * config.route_scale


def _forced_ids(scores_TE: Tensor, balance: str, top_k: int, generator: torch.Generator | None) -> Int[Tensor, "T K"]:
    num_tokens, num_experts = scores_TE.shape
    if balance == "round_robin":
        assignment_N = torch.arange(num_tokens * top_k, device=scores_TE.device)
        return (assignment_N % num_experts).view(num_tokens, top_k)
    drawn_TE = torch.rand(scores_TE.shape, device=scores_TE.device, generator=generator)
    return stable_topk(drawn_TE, top_k)


def count(expert_ids_TK: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, " E"]:
    """Assignments by expert; dropped ones (-1) are not counted, repeated ids of a token are."""
    ids_N = expert_ids_TK.reshape(-1)
    if ids_N.device.type == "cpu":
        return torch.bincount(ids_N + 1, minlength=num_experts + 1)[1:]
    # bincount asks the device for its length; this does not, and integer addition has no order.
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    return counts_E.scatter_add_(0, ids_N + 1, torch.ones_like(ids_N))[1:]


class TokenChoiceTopKRouter(nn.Module):
    """Logits from tokens by one linear projection, then `route`.

    `gate.weight` is (E, D), `gate.bias` (E,) with `config.gate_bias`. Logits are computed in float32, or in the
    input's dtype with `gate_dtype="input"`; near ties of the two differ. `batch_invariant`: as in `MoEConfig`.
    In eval there is neither jitter nor Sinkhorn: a token is routed by itself.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, config: RouterConfig, *, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        config.check(num_experts, top_k)
        config.check_causal()
        self.gate = nn.Linear(dim, num_experts, bias=config.gate_bias)
        self.num_experts, self.top_k, self.config = num_experts, top_k, config
        self.eval_config = dataclasses.replace(config, choose_by="top_k", jitter=0.0)
        self.batch_invariant = batch_invariant

    def forward(self, x_TD: Float[Tensor, "T D"], expert_bias_E: Float[Tensor, " E"] | None = None) -> Routing:
        config = self.config if self.training else self.eval_config
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        dtype = wide if config.gate_dtype == "float32" else x_TD.dtype
        bias_E = None if self.gate.bias is None else self.gate.bias.to(dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            linear = fixed_linear if self.batch_invariant else F.linear
            x_TD = x_TD.to(dtype)
            if config.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - config.jitter, 1 + config.jitter)
            logits_TE = linear(x_TD, self.gate.weight.to(dtype), bias_E)
            return route(
                logits_TE,
                config,
                self.top_k,
                expert_bias_E=expert_bias_E,
                batch_invariant=self.batch_invariant,
            )
