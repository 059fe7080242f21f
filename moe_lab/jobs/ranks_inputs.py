"""What the benchmark over ranks runs: layers, kinds of splits, and the routing that each rank is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_lab import data
from moe_lab.config import MoEConfig, RouterConfig, check_choice
from moe_lab.jobs.bench_inputs import DEFAULT_TOKENS, layer_config
from moe_lab.layer.router import Routing, count
from moe_lab.study.load import packing_order

KINDS: dict[str, dict[str, Any]] = {
    "unequal": {"equal_split": "off"},
    "adaptive": {"equal_split": "adaptive"},
    "equal": {"equal_split": "force"},
    "forced": {"router": RouterConfig(force_load_balance="round_robin")},
}
ROUTINGS = ("skewed", "zipf", "trace")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every rank runs: one layer, one kind of splits, one routing, `tokens` tokens a rank.

    `ep`: ranks that share the experts, neighbours; None for all ranks. Further ranks are data parallel.
    """

    layer: str
    config: MoEConfig
    kind: str
    routing: str
    tokens: int
    ep: int | None = None
    dtype: str = "bfloat16"
    iterations: int = 100
    warmup: int = 20


def config_of(layer: str, routing: str) -> MoEConfig:
    """A layer's routed part, such as "10B_2B/8"; a trace brings its own experts and K."""
    config = layer_config(layer).replace(num_shared_experts=0, load_balance_coeff=None, router=RouterConfig())
    if routing == "trace":
        info = data.open("balanced_wide").info
        config = config.replace(num_experts=info.num_experts, top_k=info.top_k)
    return config


def all_settings(
    layers: Sequence[str], routings: Sequence[str], kinds: Sequence[str], *, tokens: int | None = None, **how: Any
) -> list[Settings]:
    """Every kind of splits under every routing, of every layer; `ValueError` for what is not known.

    Forced balance is the same under any routing, and comes once.
    """
    for name, wanted, known in (("routing", routings, ROUTINGS), ("kinds", kinds, KINDS)):
        for one in wanted:
            check_choice(name, one, known)
    how["tokens"] = tokens or DEFAULT_TOKENS
    return [
        Settings(layer=layer, config=config_of(layer, routing), kind=kind, routing=routing, **how)
        for layer in layers
        for routing in routings
        for kind in kinds
        if kind != "forced" or routing == routings[0]
    ]


def draw_routing(settings: Settings, rank: int, ranks: int, device: torch.device) -> Routing:
    """This rank's gates and experts. Fixed seeds; offsets and popularity are the same on every rank."""
    config, tokens = settings.config, settings.tokens
    own = torch.Generator().manual_seed(rank + 1)
    logits_TE = torch.randn(tokens, config.num_experts, generator=own)
    if settings.kind == "forced":
        ids_TK = (torch.arange(tokens * config.top_k) % config.num_experts).view(tokens, config.top_k)
    elif settings.routing == "trace":
        trace = data.open("balanced_wide").layer(3)
        order_T = packing_order(trace).repeat(-(-ranks * tokens // trace.num_tokens))
        ids_TK = trace.expert_ids_LTK[0].long()[order_T[rank * tokens : (rank + 1) * tokens]]
    elif settings.routing == "zipf":
        place_E = torch.randperm(config.num_experts, generator=torch.Generator().manual_seed(0))
        # Gumbel noise on log popularity: K draws without replacement, expert of place n with weight 1 / n.
        gumbel_TE = -(-torch.rand(logits_TE.shape, generator=own).clamp(1e-20, 1 - 1e-7).log()).log()
        ids_TK = (gumbel_TE - (place_E + 1.0).log()).topk(config.top_k, dim=1).indices
    else:
        offset_E = 0.5 * torch.randn(config.num_experts, generator=torch.Generator().manual_seed(0))
        ids_TK = (logits_TE + offset_E).topk(config.top_k, dim=1).indices
    gates_TK = logits_TE.softmax(dim=1).gather(1, ids_TK).to(device)
    ids_TK = ids_TK.to(device)
    nothing = gates_TK.new_empty(0, config.num_experts)
    return Routing(gates_TK.requires_grad_(), ids_TK, nothing, nothing, count(ids_TK, config.num_experts))
