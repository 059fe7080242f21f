"""Where a panel's routing comes from: a shipped trace, one's own, or a path."""

from __future__ import annotations

from pathlib import Path

import ipywidgets as widgets

from moe_lab import data
from moe_lab.jobs.importing import read_source
from moe_lab.study.trace import RoutingTrace
from moe_lab.view.panels.routing_compute import shipped_names


def read_trace(path: str | Path) -> RoutingTrace:
    """The trace at a path (`read_source`). `ValueError` for counts, which no tokens are behind."""
    read = read_source(path)
    if not isinstance(read, RoutingTrace):
        raise ValueError(f"{Path(path).name} holds counts, not tokens: open it with moe_lab.view.panels.open_panel")
    return read


def named_trace(source: str | Path | RoutingTrace) -> tuple[str, RoutingTrace]:
    """What to call a source, and its trace: a shipped one by its name, a trace itself, or what is kept at a path."""
    if isinstance(source, RoutingTrace):
        return source.info.model or "trace", source
    if str(source) in shipped_names():
        return str(source), data.open(str(source))
    return Path(source).name, read_trace(source)


def fit_layers(slider: widgets.IntSlider, trace: RoutingTrace) -> None:
    """Give a slider the layers of a trace."""
    layers = trace.info.layers
    bound(slider, min(layers), max(layers))
    if slider.value not in layers:
        slider.value = layers[0]


def bound(slider: widgets.IntSlider, low: int, high: int) -> None:
    """Move both bounds; each alone may not pass the other."""
    slider.max = max(high, slider.max)
    slider.min = low
    slider.max = high
