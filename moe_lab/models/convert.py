"""A Mixture-of-Experts block of transformers as our layer, and its weights back: nothing here imports transformers.

Blocks are known by their structure: a router (`gate` or `router`), `experts` with `gate_up_proj` and `down_proj`,
perhaps `shared_experts` with a gate. What a block computes is checked, not believed: a layer whose output differs
is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.config import Activation, MoEConfig
from moe_lab.layer.moe import MoE
from moe_lab.models import hf

PROBES = 64  # tokens that two layers are compared over


def from_transformers(block: nn.Module, **changes: Any) -> MoE:
    """The layer that computes what `block` does, with a copy of its weights in their dtype.

    `changes` go to its `MoEConfig`, such as `backend="grouped"`. Raises `ValueError`, naming what is the matter,
    for a module without router or experts of a known form, for a router that no `RouterConfig` explains, and for a
    block that computes something else with all of these.
    """
    router, experts, shared = _parts(block)
    x_TD = _probe(router)
    with torch.no_grad():
        output = router(x_TD)
        bias_E = hf.balancing_bias(router)
        fit = hf.fit_router(router, hf.decision(router, output), bias_E)
        narrow = copy.deepcopy(router).bfloat16()
        gate_dtype = hf.decision(narrow, narrow(x_TD.bfloat16())).logits_TE.dtype
    if fit.ids_share < 0.95 or fit.gate_error > 0.02:
        raise ValueError(
            f"{type(router).__name__} routes like no RouterConfig: the nearest chooses the experts of "
            f"{fit.ids_share:.1%} of tokens, with gates within {fit.gate_error:.1%}"
        )
    gate_up_EGD, down_EDF = _stacked(experts, x_TD.shape[1])
    hidden_dim = down_EDF.shape[2]
    width = 0 if shared is None else shared.gate_proj.weight.shape[0]
    if width % hidden_dim:
        raise ValueError(f"shared experts of width {width} are not a number of experts of width {hidden_dim}")
    config = MoEConfig(
        dim=x_TD.shape[1],
        hidden_dim=hidden_dim,
        num_experts=len(gate_up_EGD),
        top_k=int(router.top_k),
        num_shared_experts=width // hidden_dim,
        router=_with_dtype(fit.config, gate_dtype),
        score_before_experts=len(output) == 2,  # Llama 4 scales what enters the experts
        activation=_activation(experts),
        mlp_bias=hasattr(experts, "gate_up_proj_bias"),
        shared_expert_gate=hasattr(block, "shared_expert_gate"),
    ).replace(**changes)
    moe = MoE(config).to(device=x_TD.device, dtype=x_TD.dtype).train(block.training)
    with torch.no_grad():
        for ours, theirs in _pairs(moe, block):
            ours.copy_(theirs)
    _check_same(moe, block, x_TD)
    return moe


def to_transformers(moe: MoE, block: nn.Module) -> nn.Module:
    """Copy the weights of `moe` into a block of the kind it came from, and return the block.

    A round trip gives the same bits. Raises `ValueError` for a block of other sizes or parts.
    """
    for ours, theirs in _pairs(moe, block):
        if ours.shape != theirs.shape:
            raise ValueError(f"a weight {tuple(ours.shape)} does not fit the block's {tuple(theirs.shape)}")
    with torch.no_grad():
        for ours, theirs in _pairs(moe, block):
            theirs.copy_(ours)
    return block


def _parts(block: nn.Module) -> tuple[Any, Any, Any]:
    """Its router, its experts, and its shared experts or None."""
    router = next((m for m in block.children() if hf.is_router(m)), None)
    experts: Any = getattr(block, "experts", None)
    if router is None or not isinstance(getattr(experts, "gate_up_proj", None), Tensor):
        raise ValueError(
            f"{type(block).__name__} has no router and experts with a gate_up_proj: give the block that holds both, "
            "such as model.model.layers[0].mlp"
        )
    shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    return router, experts, shared


def _probe(router: Any) -> Tensor:
    weight_ED = router.weight
    if not isinstance(weight_ED, Tensor):
        raise ValueError(f"{type(router).__name__} has no weight (E, D)")
    drawn = torch.randn(PROBES, weight_ED.shape[1], generator=torch.Generator().manual_seed(0))
    return drawn.to(weight_ED.device, weight_ED.dtype)


def _stacked(experts: Any, dim: int) -> tuple[Tensor, Tensor]:
    """Views of a block's expert weights as (E, 2F, D) and (E, D, F), however they are stored."""
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    transposed = getattr(experts, "is_transposed", gate_up.shape[2] != dim)
    return (gate_up.mT, down.mT) if transposed else (gate_up, down)


def _activation(experts: Any) -> Activation:
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):
        if (experts.alpha, experts.limit) != (1.702, 7.0):
            raise ValueError(f"experts clamp at {experts.limit} with alpha {experts.alpha}: known are 7 and 1.702")
        return "clamped_swiglu"
    act = getattr(experts, "act_fn", None)
    if "silu" not in type(act).__name__.lower() and act is not nn.functional.silu:
        raise ValueError(f"experts activate by {act!r:.80}: known are SiLU and gpt-oss's clamped form")
    return "swiglu"


def _with_dtype(router: Any, logits_dtype: torch.dtype) -> Any:
    return type(router)(**{**vars(router), "gate_dtype": "float32" if logits_dtype == torch.float32 else "input"})


def _pairs(moe: MoE, block: Any) -> list[tuple[Tensor, Tensor]]:
    """Every weight of ours beside the view of the block's storage that holds the same."""
    router, experts, shared = _parts(block)
    gate_up_EGD, down_EDF = _stacked(experts, moe.config.dim)
    interleaved = not getattr(experts, "is_concatenated", True)
    half = gate_up_EGD.shape[1] // 2
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    named: dict[str, object] = {
        "router.gate.weight": router.weight,
        "router.gate.bias": getattr(router, "bias", None),
        "experts.w1_EFD": gate_up_EGD[:, gate],
        "experts.w3_EFD": gate_up_EGD[:, up],
        "experts.w2_EDF": down_EDF,
        "expert_bias_E": hf.balancing_bias(router),
    }
    if isinstance(bias_EG := getattr(experts, "gate_up_proj_bias", None), Tensor):
        named |= {"experts.b1_EF": bias_EG.detach()[:, gate], "experts.b3_EF": bias_EG.detach()[:, up]}
        named |= {"experts.b2_ED": experts.down_proj_bias}
    if shared is not None:
        for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            named[f"shared_experts.{ours}.weight"] = getattr(shared, theirs).weight
    if hasattr(block, "shared_expert_gate"):
        named["shared_experts.gate.weight"] = block.shared_expert_gate.weight
    theirs_by_name = {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}
    ours_by_name = moe.state_dict()
    differing = set(ours_by_name) ^ set(theirs_by_name) - {"expert_bias_E"}
    if differing - {"expert_bias_E"}:
        raise ValueError(f"{type(block).__name__} and the layer differ in {sorted(differing - {'expert_bias_E'})}")
    return [(ours_by_name[name].detach(), theirs) for name, theirs in theirs_by_name.items()]


@torch.no_grad()
def _check_same(moe: MoE, block: nn.Module, x_TD: Tensor) -> None:
    training, moe_training = block.training, moe.training
    theirs = block.eval()(x_TD[None])
    theirs_TD = (theirs[0] if isinstance(theirs, tuple) else theirs).reshape(x_TD.shape).float()
    block.train(training)
    ours_TD = moe.eval()(x_TD).float()
    moe.train(moe_training)
    # A near tie may send a token elsewhere: most tokens must agree, not all.
    difference_T = (ours_TD - theirs_TD).norm(dim=1) / theirs_TD.norm(dim=1).clamp(min=1e-20)
    allowed = 32 * torch.finfo(x_TD.dtype).eps
    if float((difference_T <= allowed).double().mean()) < 0.8:
        raise ValueError(
            f"{type(block).__name__} computes something else than the layer with its weights: outputs differ by "
            f"{float(difference_T.median()):.1%} in the median"
        )
