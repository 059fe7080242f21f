"""What the routing panel shows, as a pure and cached function of what its controls say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from moe_lab import data
from moe_lab.study.choice import Choice, rerouted
from moe_lab.study.load import Load
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.windows import WindowLoads, packed_tokens, window_loads
from moe_lab.view import plots
from moe_lab.view.pages import Reader, tint
from moe_lab.view.tokens import TintedText

ONE_THREAD = 2**15  # numbers that torch works on without waiting for other threads, which may be long
PAGES = "pages"  # what names of shipped traces that come with text end in


@dataclass(frozen=True, kw_only=True)
class Params:
    """Everything the panel shows follows from this.

    `domain` None is all of them; `choice` None is the recorded one. `pages` is a trace whose text can be read,
    with `read`. Traces are compared by identity.
    """

    trace: RoutingTrace
    layer: int
    domain: str | None
    window: int
    choice: Choice | None
    pages: RoutingTrace | None
    read: Reader


class View(NamedTuple):
    """Loads of every layer, that of the chosen one, and its text if there is any to show."""

    loads: WindowLoads
    load: Load
    tinted: TintedText | None


@lru_cache(maxsize=64)
def compute(params: Params) -> View:
    """Route, count and measure. Raises `ValueError` for a layer, a choice or a window that cannot be."""
    trace, layer, domain, pages = params.trace, params.layer, params.domain, params.pages
    if layer not in trace.info.layers:
        raise ValueError(f"layer={layer} was not recorded: choose one of {', '.join(map(str, trace.info.layers))}")
    loads = _loads(trace, params.choice, domain, params.window)
    readable = pages is not None and (domain is None or domain in pages.domains)
    tinted = _tint(pages, layer, params.choice, domain, params.read) if pages is not None and readable else None
    return View(loads, loads.loads[trace.info.layers.index(layer)], tinted)


@lru_cache(maxsize=64)
def _loads(trace: RoutingTrace, choice: Choice | None, domain: str | None, window: int) -> WindowLoads:
    chosen = trace if choice is None else rerouted(trace, choice)
    return window_loads(chosen, domain=domain, window=window, tokens_t=packed_tokens(trace, domain))


@lru_cache(maxsize=64)
def _tint(
    pages: RoutingTrace, layer: int, choice: Choice | None, domain: str | None, read: Reader
) -> TintedText | None:
    tokens = min(1000, max(400, ONE_THREAD // pages.num_experts))
    return tint(pages, layer, choice=choice, domain=domain, tokens=tokens, read=read)


def shipped_names() -> tuple[str, ...]:
    """Shipped traces that are sources of their own."""
    try:
        return tuple(name for name in data.names() if not name.endswith(PAGES))
    except FileNotFoundError:  # a wheel without data still draws one's own traces
        return ()


def with_text(trace: RoutingTrace) -> RoutingTrace:
    """The pages of the same model, if they are shipped; else the trace itself, whose files may be here."""
    for name in data.names() if shipped_names() else ():
        if name.endswith(PAGES):
            pages = data.open(name)
            if replace(pages.info, documents=trace.info.documents, source=trace.info.source) == trace.info:
                return pages
    return trace


def ceiling(trace: RoutingTrace) -> int:
    """A ceiling over the recorded load / mean of every layer and domain, 8 at most."""
    counts_LGE = trace.counts_by(trace.domain_T, len(trace.domains)).double()
    mean_LG1 = counts_LGE.mean(dim=2, keepdim=True).clamp(min=1)
    return min(plots.ceiling_for(float((counts_LGE / mean_LG1).max())), 8)
