"""Loads over windows, as `study.load` measures them, for one domain only and with their spread: what sliders show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from moe_lab.config import check_int
from moe_lab.study.load import ALL_DOMAINS, Load, packing_order
from moe_lab.study.metrics import LoadImbalance, NullBand, measure, null_band
from moe_lab.study.trace import RoutingTrace

Tokens = Int[NDArray[np.int64], " t"]


@dataclass(frozen=True, eq=False)
class WindowLoads:
    """The load of every layer over windows of one domain, or of all.

    `loads` by layer; `low_LE`, `high_LE` the middle 90 % of windows of each expert's load / mean.
    """

    loads: tuple[Load, ...]
    low_LE: Float[NDArray[np.float64], "L E"]
    high_LE: Float[NDArray[np.float64], "L E"]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(load.layer for load in self.loads)


def ratio(load: Load) -> Float[NDArray[np.float64], " E"]:
    """Load / mean of every expert: 1 is its fair share."""
    return load.shares_E.numpy() * len(load.shares_E)


def window_loads(
    trace: RoutingTrace, *, domain: str | None = None, window: int | None = None, tokens_t: Tokens | None = None
) -> WindowLoads:
    """Loads of `imbalance(trace, window)` for one domain, or all, and nothing else.

    Documents come in the shuffled order of `imbalance`; `tokens_t` is that order where it is known already. A
    window longer than the text is cut to it; None is the whole text. Raises `ValueError` for a domain that is
    not here, and where everything was dropped.
    """
    tokens_t = packed_tokens(trace, domain) if tokens_t is None else tokens_t
    tokens, windows, window_T = cut_windows(trace, tokens_t, window)
    counts_LWE = trace.counts_by(window_T, windows).numpy()
    if not counts_LWE.sum(axis=2).all():
        raise ValueError(f"every assignment of a window of {domain or ALL_DOMAINS} was dropped: there is no load")
    null = null_band(tokens, trace.top_k, trace.num_experts, windows=windows)
    loads = tuple(
        _load(layer, domain, tokens, trace.top_k, counts_WE, null)
        for layer, counts_WE in zip(trace.info.layers, counts_LWE, strict=True)
    )
    ratio_LWE = counts_LWE / counts_LWE.mean(axis=2, keepdims=True)
    low_LE, high_LE = np.quantile(ratio_LWE, (0.05, 0.95), axis=1)
    return WindowLoads(loads, low_LE, high_LE)


@lru_cache(maxsize=32)
def packed_tokens(trace: RoutingTrace, domain: str | None) -> Tokens:
    """Indices of the valid tokens of a domain, or of all, by document in a shuffled order."""
    if domain is not None and domain not in trace.domains:
        raise ValueError(f"domain={domain!r} is not in this trace: choose one of {', '.join(trace.domains)}")
    order_T = packing_order(trace).numpy()
    kept_T = trace.valid_T.numpy()
    if domain is not None:
        kept_T = kept_T & (trace.domain_T.numpy() == trace.domains.index(domain))
    tokens_t = order_T[kept_T[order_T]]
    if not len(tokens_t):
        raise ValueError(f"{domain or ALL_DOMAINS}: no valid token, nothing was routed")
    return tokens_t


def _load(
    layer: int, domain: str | None, tokens: int, top_k: int, counts_WE: Int[NDArray[np.int64], "W E"], null: NullBand
) -> Load:
    counts_E = torch.from_numpy(counts_WE.sum(axis=0))
    return Load(
        layer=layer,
        domain=domain or ALL_DOMAINS,
        tokens=tokens,
        windows=len(counts_WE),
        metrics=LoadImbalance(*measure(counts_WE).mean(axis=0).tolist()),
        null=null,
        shares_E=counts_E.double() / counts_E.sum(),
        dropped=tokens * len(counts_WE) * top_k - int(counts_E.sum()),
    )


def cut_windows(trace: RoutingTrace, tokens_t: Tokens, window: int | None) -> tuple[int, int, Int[torch.Tensor, " T"]]:
    """Tokens a window, windows, and each token's window (-1: none)."""
    tokens = len(tokens_t)
    if window is not None:
        check_int("tokens per window", window, 1)
        tokens = min(window, tokens)
    windows = len(tokens_t) // tokens
    window_T = np.full(trace.num_tokens, -1)
    window_T[tokens_t[: windows * tokens]] = np.arange(windows * tokens) // tokens
    return tokens, windows, torch.from_numpy(window_T)
