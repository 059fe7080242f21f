"""How imbalance falls with the size of the window that it is measured over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from moe_lab.study.load import ALL_DOMAINS
from moe_lab.study.metrics import NullBand, measure, null_band
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.windows import Tokens, cut_windows, packed_tokens
from moe_lab.view.text import Text, table


@dataclass(frozen=True, eq=False, repr=False)
class WindowSweep(Text):
    """max/mean of one layer against the window size, S sizes.

    `packed_S` mean over windows cut from whole documents in a shuffled order, `low_S`..`high_S` their middle
    90 %; `mixed_S` the same tokens in random order, so that every window holds every kind of text.
    """

    layer: int
    domain: str
    tokens: int
    sizes: tuple[int, ...]
    packed_S: Float[NDArray[np.float64], " S"]
    low_S: Float[NDArray[np.float64], " S"]
    high_S: Float[NDArray[np.float64], " S"]
    mixed_S: Float[NDArray[np.float64], " S"]
    null_S: tuple[NullBand, ...]

    @property
    def where(self) -> str:
        """What the numbers are of."""
        return f"layer {self.layer} · {self.tokens:,} tokens · {self.domain} · one rank"

    def text(self) -> str:
        """max/mean by window size: documents packed, tokens mixed, chance."""
        rows = [("tokens per window", "windows", "packed", "middle 90 %", "mixed", "chance", "95 % of chance")]
        for i, (size, null) in enumerate(zip(self.sizes, self.null_S, strict=True)):
            mean, low, high = (band.max_over_mean for band in (null.mean, null.low, null.high))
            cells = (f"{self.packed_S[i]:.2f}", f"{self.low_S[i]:.2f} - {self.high_S[i]:.2f}", f"{self.mixed_S[i]:.2f}")
            windows = self.tokens // size
            rows.append((f"{size:,}", f"{windows:,}", *cells, f"{mean:.2f}", f"{low:.2f} - {high:.2f}"))
        return f"max/mean · {self.where}\n{table(rows)}"


def window_sweep(trace: RoutingTrace, layer: int, *, domain: str | None = None, smallest: int = 64) -> WindowSweep:
    """max/mean of one layer for windows of `smallest`, twice that, ... valid tokens, as long as there are four.

    Chance is that of one window. The order of documents and that of mixed tokens have fixed seeds.
    """
    trace = trace.layer(layer)
    packed_t = packed_tokens(trace, domain)
    mixed_t = np.random.default_rng(0).permutation(packed_t)
    sizes = [smallest]
    while sizes[-1] * 8 <= len(packed_t):
        sizes.append(sizes[-1] * 2)
    rows = []
    for size in sizes:
        packed_W, mixed_W = (_max_over_mean(trace, order_t, size) for order_t in (packed_t, mixed_t))
        rows.append((packed_W.mean(), *np.quantile(packed_W, (0.05, 0.95)), mixed_W.mean()))
    nulls = tuple(null_band(size, trace.top_k, trace.num_experts) for size in sizes)
    packed_S, low_S, high_S, mixed_S = np.array(rows).T
    where = (layer, domain or ALL_DOMAINS, len(packed_t), tuple(sizes))
    return WindowSweep(*where, packed_S, low_S, high_S, mixed_S, nulls)


def _max_over_mean(trace: RoutingTrace, tokens_t: Tokens, window: int) -> Float[NDArray[np.float64], " W"]:
    _, windows, window_T = cut_windows(trace, tokens_t, window)
    return measure(trace.counts_by(window_T, windows)[0].numpy())[:, 0]
