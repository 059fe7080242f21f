"""The load of experts by layer and domain, each number beside what chance alone gives for as many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.config import check_choice, check_int
from moe_lab.study.metrics import LoadImbalance, NullBand, measure, null_band
from moe_lab.study.trace import RoutingTrace

ALL_DOMAINS = "all domains"
LABELS = {
    "max_over_mean": "max/mean",
    "cv": "cv",
    "gini": "gini",
    "entropy": "entropy",
    "dead_experts": "dead",
}


class Load(NamedTuple):
    """The load of one layer over the windows of one domain.

    `tokens` a window, `windows` of them. `metrics` are means over the windows and `null` is of the same mean.
    `shares_E` are shares of the assignments of all windows; `dropped` assignments of them went nowhere.
    """

    layer: int
    domain: str
    tokens: int
    windows: int
    metrics: LoadImbalance
    null: NullBand
    shares_E: Float[Tensor, " E"]
    dropped: int

    @property
    def shows_imbalance(self) -> bool:
        """Whether max/mean is above the band of random routing. Inside it is not imbalance."""
        return self.metrics.max_over_mean > self.null.high.max_over_mean

    def __repr__(self) -> str:
        mean, low, high = self.null.mean, self.null.low, self.null.high
        m = self.metrics
        lines = [
            f"layer {self.layer} · {self.tokens:,} tokens x {self.windows:,} "
            f"window{'s' * (self.windows != 1)} · {self.domain} · one rank",
            f"max/mean  {m.max_over_mean:<7.2f} (chance {mean.max_over_mean:.2f}, "
            f"95 % {low.max_over_mean:.2f}-{high.max_over_mean:.2f})",
            f"cv        {m.cv:<7.3f} (chance {mean.cv:.3f}, 95 % {low.cv:.3f}-{high.cv:.3f})",
            f"dead      {m.dead_experts:<7.3g} (chance {mean.dead_experts:.3g})",
        ]
        if self.dropped:
            lines.append(f"dropped   {self.dropped:,} assignments")
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Imbalance:
    """Loads of every layer and domain of a trace; `window` tokens each, or None for all a domain has.

    `loads` go by domain (all of them first, when there are several), then by layer; `left_out` names domains
    with fewer tokens than a window.
    """

    loads: tuple[Load, ...]
    window: int | None
    left_out: tuple[str, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that have loads, `ALL_DOMAINS` first when there are several."""
        return tuple(dict.fromkeys(load.domain for load in self.loads))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers, in forward order."""
        return tuple(dict.fromkeys(load.layer for load in self.loads))

    def load(self, layer: int, domain: str | None = None) -> Load:
        """One of the loads; by default of all domains. `ValueError` for one that is not here."""
        domain = self.domains[0] if domain is None else domain
        check_choice("layer", layer, self.layers)
        check_choice("domain", domain, self.domains)
        return next(load for load in self.loads if (load.layer, load.domain) == (layer, domain))

    def text(self, metric: str = "max_over_mean") -> str:
        """One metric of all loads as a table, with chance below; * marks what lies above the 95 % band."""
        check_choice("metric", metric, LABELS)
        first = [self.load(self.layers[0], domain) for domain in self.domains]
        rows = [["layer", *self.domains]]
        for layer in self.layers:
            rows.append([str(layer), *(_cell(self.load(layer, domain), metric) for domain in self.domains)])
        rows.append(["tokens", *(f"{load.tokens:,} " for load in first)])
        rows.append(["windows", *(f"{load.windows:,} " for load in first)])
        rows.append(["chance", *(f"{getattr(load.null.mean, metric):.2f} " for load in first)])
        rows.append(["95 % to", *(f"{getattr(load.null.high, metric):.2f} " for load in first)])
        widths = [max(len(row[i].rstrip()) for row in rows) + 1 for i in range(len(rows[0]))]
        lines = [f"{LABELS[metric]} · one rank · * above the 95 % band of random routing"]
        for head, *cells in rows:
            line = head.ljust(widths[0])
            for cell, width in zip(cells, widths[1:], strict=True):
                line += "  " + (cell if cell.endswith(("*", " ")) else cell + " ").rjust(width)
            lines.append(line.rstrip())
        if self.left_out:
            lines.append(f"fewer tokens than a window: {', '.join(self.left_out)}")
        if dropped := sum(load.dropped for load in self.loads if load.domain == self.domains[0]):
            lines.append(f"dropped: {dropped:,} assignments")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return repr(self.loads[0]) if len(self.loads) == 1 else self.text()


def imbalance(trace: RoutingTrace, window: int | None = None, *, shuffle: bool = True) -> Imbalance:
    """Measure the load of every layer of a trace, over all domains and in each.

    Each domain's valid tokens are cut into windows of `window` tokens, a rest left out, and metrics averaged
    over them; None takes all of a domain's tokens as one window. Windows are cut from whole documents in a
    shuffled order (fixed seed), as packing for training does; `shuffle=False` keeps the recorded order, whose
    runs of one domain show a skew that no rank would see.

    Raises `ValueError` when no domain fills a window, and when everything in a window was dropped.
    """
    if window is not None:
        check_int("window", window, 1)
    order_T = packing_order(trace) if shuffle else torch.arange(trace.num_tokens)
    order_T = order_T[trace.valid_T[order_T]]
    domain_T = trace.domain_T[order_T]
    groups = [(name, order_T[domain_T == i]) for i, name in enumerate(trace.domains)]
    if len(groups) > 1:
        groups.insert(0, (ALL_DOMAINS, order_T))
    loads: list[Load] = []
    left_out = []
    for name, tokens_t in groups:
        if len(tokens_t) < (window or 1):
            left_out.append(name)
        else:
            loads += _loads(trace, name, tokens_t, window or len(tokens_t))
    if not loads:
        raise ValueError(f"window={window} is more than the {len(order_T):,} valid tokens of this trace")
    return Imbalance(tuple(loads), window, tuple(left_out))


def _loads(trace: RoutingTrace, domain: str, tokens_t: Int[Tensor, " t"], window: int) -> list[Load]:
    windows = len(tokens_t) // window
    window_T = torch.full((trace.num_tokens,), -1)
    window_T[tokens_t[: windows * window]] = torch.arange(windows * window) // window
    counts_LWE = trace.counts_by(window_T, windows)
    if not counts_LWE.sum(dim=-1).all():
        raise ValueError(f"every assignment of a window of {domain} was dropped: there is no load to measure")
    null = null_band(window, trace.top_k, trace.num_experts, windows=windows)
    loads = []
    for layer, counts_WE in zip(trace.info.layers, counts_LWE, strict=True):
        metrics = LoadImbalance(*measure(counts_WE.numpy()).mean(axis=0).tolist())
        counts_E = counts_WE.sum(dim=0)
        dropped = windows * window * trace.top_k - int(counts_E.sum())
        shares_E = counts_E.double() / counts_E.sum()
        loads.append(Load(layer, domain, window, windows, metrics, null, shares_E, dropped))
    return loads


def packing_order(trace: RoutingTrace, seed: int = 0) -> Int[Tensor, " T"]:
    """Token indices with whole documents in a shuffled order."""
    place_G = np.random.default_rng(seed).permutation(len(trace.info.documents))
    return torch.from_numpy(place_G)[trace.document_T.long()].argsort(stable=True)


def _cell(load: Load, metric: str) -> str:
    value, high = (getattr(of, metric) for of in (load.metrics, load.null.high))
    return f"{value:.2f}" + ("*" if metric != "entropy" and value > high else " ")
