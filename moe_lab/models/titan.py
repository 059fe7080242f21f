"""Routers of torchtitan, known by their structure: nothing here imports torchtitan.

Its `TokenChoiceTopKRouter` (0.3) returns gates (B, L, K), expert ids (B, L, K) and scores (B, L, E), not logits, and
takes the balancing bias as its second argument. Its settings have the names of `RouterConfig`.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lab.config import RouterConfig
from moe_lab.models.hf import Decision, by_gate

FIELDS = ("score_func", "route_norm", "route_scale", "num_expert_groups", "num_limited_groups")


def is_router(module: nn.Module) -> bool:
    """Whether a module, known to be a router, has torchtitan's settings."""
    return all(hasattr(module, name) for name in FIELDS) and module.score_func in ("softmax", "sigmoid")


def config_of(router: nn.Module) -> RouterConfig:
    """Its settings as ours."""
    config = RouterConfig(**{name: getattr(router, name) for name in FIELDS})
    forced = getattr(router, "_debug_force_load_balance", False)
    return dataclasses.replace(config, force_load_balance="round_robin") if forced else config


def decision(router: nn.Module, output: object) -> Decision:
    """Read what a router returned, its logits from their scores. `ValueError` for one that returns something else."""
    num_experts, top_k = int(router.num_experts), int(router.top_k)  # type: ignore[arg-type]
    shapes = [tuple(part.shape[-1:]) for part in output if isinstance(part, Tensor)] if type(output) is tuple else []
    if shapes != [(top_k,), (top_k,), (num_experts,)]:
        raise ValueError(
            f"{type(router).__name__} returned last dimensions {shapes}: expected gates and ids of {top_k} and scores "
            f"of {num_experts}, as torchtitan 0.3 does"
        )
    gates, ids, scores = (part.detach() for part in output)  # type: ignore[attr-defined]
    logits_TE = logits_of(scores.reshape(-1, num_experts).float(), str(router.score_func))
    return by_gate(ids.reshape(-1, top_k), gates.reshape(-1, top_k), logits_TE)


def logits_of(scores_TE: Float[Tensor, "T E"], score_func: str) -> Float[Tensor, "T E"]:
    """Logits that give these scores, of softmax up to a constant a token; finite where scores rounded to 0 or 1."""
    least = torch.finfo(scores_TE.dtype)
    log_TE = scores_TE.clamp(min=least.tiny).log()
    return log_TE if score_func == "softmax" else log_TE - torch.log1p(-scores_TE.clamp(max=1 - least.eps / 2))
