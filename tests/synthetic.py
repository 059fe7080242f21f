"""Traces made by formula, for tests: said to be synthetic wherever they are shown."""

from __future__ import annotations

import dataclasses

import torch

from moe_lab.config import RouterConfig
from moe_lab.layer.router import score
from moe_lab.study.trace import Document, RoutingTrace

DOMAINS = ("python", "cpp", "javascript", "prose", "data")


def synthetic_trace(
    *,
    tokens: int = 2000,
    layers: int = 3,
    experts: int = 16,
    top_k: int = 4,
    router: RouterConfig | None = None,
    logits: bool = True,
    gates: bool = True,
    bias: bool = True,
    domains: tuple[str, ...] = DOMAINS,
    seed: int = 0,
    span: int = 125,
    skew: float = 0.8,
) -> RoutingTrace:
    """Logits = what the domain prefers + what the token's kind prefers + noise; documents of `span` tokens."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    router = router or RouterConfig(score_func="sigmoid", route_norm=True)
    document_T = torch.arange(tokens) // span
    count = int(document_T[-1]) + 1
    documents = tuple(
        Document(f"synthetic:{i}", domains[i % len(domains)], "", 0, min(span, tokens - i * span)) for i in range(count)
    )
    domain_T = document_T % len(domains)
    kind_T = torch.randint(0, 40, (tokens,), generator=draw)
    logits_LTE = torch.stack(
        [
            skew * normal(len(domains), experts)[domain_T] + 1.5 * normal(40, experts)[kind_T] + normal(tokens, experts)
            for _ in range(layers)
        ]
    ).half()
    bias_LE = _balance(logits_LTE.float(), router.score_func) if bias else None
    trace = RoutingTrace.from_router_logits(
        list(logits_LTE), router, top_k, expert_bias_LE=bias_LE, model="synthetic", source="made by formula"
    )
    return dataclasses.replace(
        trace,
        info=dataclasses.replace(trace.info, documents=documents),
        expert_ids_LTK=trace.expert_ids_LTK.to(torch.int16),
        gates_LTK=trace.gates_LTK if gates else None,
        logits_LTE=trace.logits_LTE if logits else None,
        document_T=document_T.int(),
        position_T=(torch.arange(tokens) % span).int(),
    )


def _balance(logits_LTE: torch.Tensor, score_func: str) -> torch.Tensor:
    """A bias that roughly evens the load: experts are lowered by their mean score."""
    scores_LE = torch.stack([score(logits_TE, score_func).mean(dim=0) for logits_TE in logits_LTE])
    return scores_LE.mean(dim=1, keepdim=True) - scores_LE
