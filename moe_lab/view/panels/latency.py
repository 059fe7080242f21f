"""How long panels take to redraw, in the kernel: `python -m moe_lab.view.panels.latency`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import torch

from moe_lab.config import RouterConfig
from moe_lab.study.trace import RoutingTrace
from moe_lab.view.panels.exchange import ExchangePanel
from moe_lab.view.panels.padding import PaddingPanel
from moe_lab.view.panels.routing import RoutingPanel
from moe_lab.view.text import table

TEXT = b"The quick brown fox jumps over the lazy dog. "


def random_trace(*, tokens: int, layers: int, experts: int, top_k: int) -> RoutingTrace:
    """A trace of normal logits: nothing about it is real but its size."""
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(tokens, experts, generator=draw) for _ in range(layers)]
    router = RouterConfig(score_func="sigmoid", route_norm=True)
    return RoutingTrace.from_router_logits(logits, router, top_k, model="random, for timing", source="torch.randn")


def sweep(control: Any, values: Sequence[Any]) -> list[float]:
    """Milliseconds of each move of one control to one of `values`."""
    times = []
    for value in values:
        began = time.perf_counter()
        control.value = value
        times.append(1e3 * (time.perf_counter() - began))
    return times


def measure(panel: RoutingPanel, moves: int = 40) -> dict[str, list[float]]:
    """Milliseconds of every move of each slider, to values the panel has not computed before where there are any."""
    layers, top_k = panel.trace.info.layers, panel.trace.top_k
    choices = [k for k in range(panel.top_k.min, panel.top_k.max + 1) if k != top_k]
    sizes = [int(64 * 1.17**i) for i in range(moves) if 64 * 1.17**i < panel.trace.num_tokens]
    sweeps: dict[str, Callable[[], list[float]]] = {
        "layer": lambda: sweep(panel.layer, [layers[i % len(layers)] for i in range(1, moves + 1)]),
        "K": lambda: sweep(panel.top_k, choices),
        "tokens per window": lambda: sweep(panel.window, sizes),
    }
    return {name: run() for name, run in sweeps.items()}


def measure_plans(panel: ExchangePanel | PaddingPanel) -> dict[str, list[float]]:
    """Milliseconds of every move of each slider that has stops, from the first stop to the last and back."""
    sliders = {"EP": panel.ep, "tokens": panel.tokens, "layer": panel.layer}
    found = {}
    for name, slider in sliders.items():
        stops = range(slider.min, slider.max + 1) if isinstance(slider, widgets.IntSlider) else slider.options
        found[name] = sweep(slider, [*stops, *reversed(stops[:-1])])
    return found


def report(times: dict[str, list[float]]) -> str:
    """Median and 90th percentile of each slider's moves."""
    rows = [("slider", "moves", "median ms", "p90 ms")]
    for name, values in times.items():
        p90 = statistics.quantiles(values, n=10)[-1]
        rows.append((name, str(len(values)), f"{statistics.median(values):.0f}", f"{p90:.0f}"))
    return table(rows)


def main() -> None:
    """Measure the routing panel with the sizes given, the others as they ship, and print the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"tokens": 16384, "layers": 6, "experts": 64, "top-k": 8, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trace = random_trace(tokens=args.tokens, layers=args.layers, experts=args.experts, top_k=args.top_k)
    panel = RoutingPanel(
        trace, texts={trace.info.documents[0].name: (TEXT * (args.tokens // len(TEXT) + 1))[: args.tokens]}
    )
    size = f"{args.tokens:,} tokens, {args.layers} layers, E {args.experts}, K {args.top_k}, {args.threads} threads"
    print(f"routing panel, in the kernel: {size}")
    print(report(measure(panel)))
    for plans in (ExchangePanel(), PaddingPanel()):
        print(f"{type(plans).__name__}, in the kernel, {args.threads} threads")
        print(report(measure_plans(plans)))


if __name__ == "__main__":
    main()
