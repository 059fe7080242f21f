"""Panels: sliders around a pure computation and its pictures."""

from moe_lab.view.panels.routing import RoutingPanel

__all__ = ["RoutingPanel"]
