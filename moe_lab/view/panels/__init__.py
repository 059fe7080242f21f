"""Panels: sliders around a pure computation and its pictures."""

from __future__ import annotations

from pathlib import Path

from moe_lab.config import RouterConfig
from moe_lab.jobs.importing import read_source
from moe_lab.study.counts import CountsTrace
from moe_lab.study.trace import RoutingTrace
from moe_lab.view.panels.balance import BalancePanel
from moe_lab.view.panels.counts import CountsPanel
from moe_lab.view.panels.exchange import ExchangePanel
from moe_lab.view.panels.padding import PaddingPanel
from moe_lab.view.panels.planning import PlannerPanel
from moe_lab.view.panels.routing import RoutingPanel
from moe_lab.view.panels.routing_compute import shipped_names
from moe_lab.view.panels.timing import TimingPanel
from moe_lab.view.panels.training import TrainingPanel

__all__ = [
    "BalancePanel",
    "CountsPanel",
    "ExchangePanel",
    "PaddingPanel",
    "PlannerPanel",
    "RoutingPanel",
    "TimingPanel",
    "TrainingPanel",
    "open_panel",
]


def open_panel(
    source: str | Path | RoutingTrace | CountsTrace,
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    router: RouterConfig | None = None,
) -> RoutingPanel | CountsPanel:
    """The panel for a source of any kind: a shipped trace's name, a trace or counts, or a path (`read_source`).

    Counts need `top_k`, which they do not hold. Raises `ValueError` for what cannot be read, naming what is missing.
    """
    name = "counts"
    if isinstance(source, (str, Path)):
        if str(source) in shipped_names():
            return RoutingPanel(str(source))
        name = Path(source).name
        source = read_source(source, top_k=top_k, num_experts=num_experts, router=router)
    if isinstance(source, RoutingTrace):
        return RoutingPanel(source)
    if top_k is None:
        raise ValueError("top_k is needed: counts do not say how many experts a token was sent to")
    return CountsPanel(source, top_k, name=name)
