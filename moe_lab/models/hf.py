"""Routers of transformers models, known by their structure: nothing here imports transformers.

Since version 5 nearly every router there is a module with integers `top_k` and `num_experts` that returns logits
(T, E), gates (T, K) and expert ids (T, K); Llama 4's returns scores and logits (T, E), its scores being 0 for experts
that were not chosen.
"""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lab.config import GateDtype, RouterConfig, ScoreFunc
from moe_lab.layer.router import TokenChoiceTopKRouter, gates_of, route, score


class Decision(NamedTuple):
    """What a router said about T tokens: experts by falling gate, their gates, and the logits behind them."""

    expert_ids_TK: Int[Tensor, "T K"]
    gates_TK: Float[Tensor, "T K"]
    logits_TE: Float[Tensor, "T E"]


class RouterFit(NamedTuple):
    """The `RouterConfig` that explains a decision best, and how well.

    `ids_share`: tokens whose experts it chooses too, or others of the same scores. `gate_error`: the largest
    difference of a gate over the largest gate.
    """

    config: RouterConfig
    ids_share: float
    gate_error: float


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses experts: it says how many of how many, and is neither ours nor holds the experts."""
    numbers = [getattr(module, name, None) for name in ("top_k", "num_experts")]
    known = isinstance(module, TokenChoiceTopKRouter) or hasattr(module, "experts")
    return all(type(number) is int for number in numbers) and not known


def find_routers(model: nn.Module) -> dict[nn.Module, str]:
    """The routers inside a model and their names.

    Raises `ValueError` when there is none, naming modules that are called routers but do not say how many experts
    they choose of how many (Gemma 4, DBRX, Switch, NLLB): what they return could not be told apart.
    """
    found = {module: name for name, module in model.named_modules() if is_router(module)}
    if found:
        return found
    kinds = {type(module).__name__: name for name, module in model.named_modules()}
    near = [f"; {kind} ({name!r}) has not both" for kind, name in kinds.items() if re.search("Router$|Gating$", kind)]
    raise ValueError(
        f"{type(model).__name__} holds nothing to record: neither a TokenChoiceTopKRouter nor a router of "
        f"transformers 5 (a module with integers top_k and num_experts){''.join(near)}"
    )


def balancing_bias(router: nn.Module) -> Float[Tensor, " E"] | None:
    """The bias that moves a router's choice and not its gates, None when it has none."""
    bias_E = getattr(router, "e_score_correction_bias", None)
    if not isinstance(bias_E, Tensor):
        bias_E = getattr(router, "expert_bias", None)
    return bias_E.detach().reshape(-1) if isinstance(bias_E, Tensor) else None


def decision(router: nn.Module, output: object) -> Decision:
    """Read what a router returned. `ValueError` for a router that returns something else."""
    num_experts, top_k = int(router.num_experts), int(router.top_k)  # type: ignore[arg-type]
    parts = output if isinstance(output, tuple) else ()
    tensors = [part.detach() for part in parts if isinstance(part, Tensor)]
    ids = [part for part in tensors if not part.is_floating_point() and part.shape[-1] == top_k]
    wide = [part for part in tensors if part.is_floating_point() and part.shape[-1] == num_experts]
    gates = [part for part in tensors if part.is_floating_point() and part.shape[-1] == top_k and part is not wide[0]]
    if ids and wide and gates:
        logits_TE, gates_TK, ids_TK = wide[0], gates[0], ids[0]
    elif len(wide) == 2 and not ids:
        logits_TE = wide[1]
        gates_TK, ids_TK = wide[0].reshape(-1, num_experts).topk(top_k, dim=-1)
    else:
        shapes = [tuple(part.shape) for part in tensors]
        raise ValueError(
            f"{type(router).__name__} returned {shapes}: expected logits (T, {num_experts}), gates (T, {top_k}) "
            f"and integer expert ids (T, {top_k})"
        )
    return by_gate(ids_TK.reshape(-1, top_k), gates_TK.reshape(-1, top_k), logits_TE.reshape(-1, num_experts))


def by_gate(ids_TK: Int[Tensor, "T K"], gates_TK: Float[Tensor, "T K"], logits_TE: Float[Tensor, "T E"]) -> Decision:
    """A decision with each token's experts by falling gate."""
    gates_TK, slot_TK = gates_TK.sort(dim=-1, descending=True, stable=True)
    return Decision(ids_TK.long().gather(1, slot_TK), gates_TK, logits_TE)


def fit_router(router: nn.Module, seen: Decision, bias_E: Float[Tensor, " E"] | None = None) -> RouterFit:
    """Find the settings that reproduce a router's own decision, among all that its attributes allow.

    Tried are all score functions, with and without normalised gates, with and without the router's
    `routed_scaling_factor` and its groups. Of equals the first, simplest one. A float32 model does not tell in
    which dtype its router computes: "float32" is taken, unless logits come in less.
    """
    scale = getattr(router, "routed_scaling_factor", None)
    groups = [getattr(router, name, None) for name in ("num_group", "n_group", "topk_group")]
    limits: list[tuple[int | None, int | None, str]] = [(None, None, "top2")]
    if (count := groups[0] or groups[1]) and groups[2]:
        limits += [(int(count), int(groups[2]), kind) for kind in ("top2", "max")]
    gate_dtype: GateDtype = "float32" if seen.logits_TE.dtype == torch.float32 else "input"
    fits = []
    for score_func, norm, route_scale, (num, limited, kind) in product(
        get_args(ScoreFunc), (False, True), (1.0, float(scale)) if scale else (1.0,), limits
    ):
        config = RouterConfig(
            score_func=score_func,
            route_norm=norm,
            route_scale=route_scale,
            num_expert_groups=num,
            num_limited_groups=limited,
            group_score=kind,  # type: ignore[arg-type]
            gate_dtype=gate_dtype,
            gate_bias=isinstance(getattr(router, "bias", None), Tensor),
        )
        try:
            config.check(seen.logits_TE.shape[1], seen.expert_ids_TK.shape[1])
        except ValueError:
            continue
        fits.append(fit(config, seen, bias_E))
    return max(fits, key=lambda fit: (round(fit.ids_share, 3), -round(fit.gate_error, 3)))


def fit(config: RouterConfig, seen: Decision, bias_E: Float[Tensor, " E"] | None = None) -> RouterFit:
    """How well a configuration explains a decision."""
    logits_TE, gates_TK = seen.logits_TE.float(), seen.gates_TK.float()
    ours = route(logits_TE, config, seen.expert_ids_TK.shape[1], expert_bias_E=bias_E)
    choice_TE = score(logits_TE, config.score_func) + (0 if bias_E is None else bias_E)
    chosen_TK, wanted_TK = (choice_TE.gather(1, ids).sort().values for ids in (ours.expert_ids_TK, seen.expert_ids_TK))
    ids_share = float((chosen_TK == wanted_TK).all(dim=1).double().mean())
    own_TK = gates_of(ours.scores_TE, seen.expert_ids_TK, config)
    error = (own_TK - gates_TK).abs().max() / gates_TK.abs().max().clamp(min=1e-20)
    return RouterFit(config, ids_share, float(error))
