"""How many choices hang on the precision of the router's product."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe_lab.layer.router import TokenChoiceTopKRouter, route


def gate_dtype_flips(model: nn.Module, inputs: Tensor, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, " L"]:
    """By layer, the share of tokens that go to other experts when gates are computed in `dtype`.

    One forward of `model(inputs)`; every router of this package sees its own inputs, rounded to `dtype` as a model in
    that dtype hands them over. Then float32 logits from them (torchtitan, DeepSeek) against logits in `dtype`
    (`gate_dtype="input"`: Mixtral, OLMoE, Qwen in transformers) choose experts. `ValueError` for a model without
    such routers, or whose choice is forced.
    """
    routers = [module for module in model.modules() if isinstance(module, TokenChoiceTopKRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no TokenChoiceTopKRouter: nothing to compare")
    if any(router.config.force_load_balance for router in routers):
        raise ValueError("force_load_balance is on: the choice does not depend on logits")
    shares: dict[nn.Module, float] = {}

    def compare(router: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(router, TokenChoiceTopKRouter)
        shares[router] = float(_differ(router, args[0].to(dtype), *args[1:]).double().mean())

    hooks = [router.register_forward_pre_hook(compare) for router in routers]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.tensor([shares[router] for router in routers if router in shares], dtype=torch.float64)


def _differ(router: TokenChoiceTopKRouter, x_TD: Tensor, bias_E: Tensor | None = None) -> Bool[Tensor, " T"]:
    """Tokens whose sets of experts differ."""
    sets = []
    for wide in (torch.float32, x_TD.dtype):
        gate_bias = None if router.gate.bias is None else router.gate.bias.to(wide)
        logits_TE = nn.functional.linear(x_TD.to(wide), router.gate.weight.to(wide), gate_bias)
        routing = route(logits_TE, router.config, router.top_k, expert_bias_E=bias_E)
        sets.append(routing.expert_ids_TK.sort(dim=1).values)
    return (sets[0] != sets[1]).any(dim=1)
