"""How uneven the load of experts is, and how uneven chance alone makes it.

Formulas are those usual for load (max over mean, coefficient of variation) and for inequality (Gini's
coefficient, normalised entropy); counts c over E experts have mean m and shares p = c / sum c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.draws import binomial, draw_counts, draw_routing
from moe_lab.study.info import MAX_EXPERTS

_SEED = 20_240_229
_CELLS = 2**17  # random numbers a setting of `null_band`, which keeps it under 20 ms
_EXACT_PICKS = 1024  # choices a draw, up to which tokens are drawn one by one


class LoadImbalance(NamedTuple):
    """How unevenly counts spread over experts.

    `max_over_mean` max c / m: how much longer the busiest expert works than in perfect balance (1).
    `cv` population standard deviation / m. `gini` from 0 (equal) to 1 - 1/E (all on one expert).
    `entropy` of the shares / ln E: 1 is balanced, 0 is all on one expert. `dead_experts` counts zeros.
    """

    max_over_mean: float
    cv: float
    gini: float
    entropy: float
    dead_experts: float

    def __repr__(self) -> str:
        return (
            f"max/mean {self.max_over_mean:.2f}  cv {self.cv:.3f}  gini {self.gini:.3f}  "
            f"entropy {self.entropy:.3f}  dead {self.dead_experts:.3g}"
        )


class NullBand(NamedTuple):
    """What uniform random routing gives: the mean of every metric, and its band from `low` to `high`.

    `share_low`, `share_high`: the band of one expert's share of all assignments. Of E experts a few fall
    outside it by chance; the band of the busiest one is that of `max_over_mean`, times 1/E.
    """

    mean: LoadImbalance
    low: LoadImbalance
    high: LoadImbalance
    share_low: float
    share_high: float


def load_imbalance(counts_E: Tensor | np.ndarray | Sequence[int]) -> LoadImbalance:
    """The metrics of one vector of counts, computed in float64.

    Raises `ValueError` for anything but non-negative integers, and for counts that are all zero.
    """
    counts = np.asarray(counts_E)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or not counts.size:
        raise ValueError(f"counts_E of shape {counts.shape} and {counts.dtype} must be a vector of integers")
    if counts.min() < 0:
        raise ValueError(f"counts_E holds {counts.min()}: counts cannot be negative")
    if not counts.any():
        raise ValueError(f"counts_E of {counts.size} experts sum to 0: no tokens, no imbalance")
    load = LoadImbalance(*measure(counts[None])[0].tolist())
    return load._replace(dead_experts=int(load.dead_experts))


def measure(counts_NE: NDArray[np.integer] | NDArray[np.floating]) -> NDArray[np.float64]:
    """The metrics of N vectors of counts at once, (N, 5) in the order of `LoadImbalance`. No checks."""
    counts_NE = np.sort(counts_NE, axis=1).astype(np.float64)
    experts = counts_NE.shape[1]
    total_N = counts_NE.sum(axis=1)
    mean_N = total_N / experts
    weight_E = 2.0 * np.arange(1, experts + 1) - experts - 1
    gini_N = counts_NE @ weight_E / (experts * total_N)
    # entropy / ln E with sum p ln p = sum c ln c / C - ln C; one expert is always in balance
    log_NE = np.log(np.maximum(counts_NE, 1.0))
    entropy_N = np.log(total_N) - (counts_NE * log_NE).sum(axis=1) / total_N
    entropy_N = entropy_N / math.log(experts) if experts > 1 else np.ones_like(total_N)
    max_N, std_N, dead_N = counts_NE[:, -1], counts_NE.std(axis=1), (counts_NE == 0).sum(axis=1)
    return np.stack([max_N / mean_N, std_N / mean_N, gini_N, entropy_N, dead_N], axis=1)


@lru_cache(maxsize=4096)
def null_band(num_tokens: int, top_k: int, num_experts: int, *, quantile: float = 0.95, windows: int = 1) -> NullBand:
    """What chance gives: every token picks `top_k` distinct experts of `num_experts` uniformly at random.

    For one window of `num_tokens` tokens, or for the mean of each metric over `windows` such windows (shares
    are then those of all windows together). `low` and `high` enclose the central `quantile` of outcomes.
    Simulated with a fixed seed, so the same setting gives the same band; the share band is exact (binomial).
    Results are cached.

    Raises `ValueError` for a setting that cannot route, or a quantile outside (0, 1).
    """
    check_int("num_tokens", num_tokens, 1)
    check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    check_int("top_k", top_k, 1, num_experts)
    check_int("windows", windows, 1)
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile!r} must be between 0 and 1")
    rng = np.random.default_rng(_SEED)
    draws = min(max(_CELLS // num_experts, 128), 2048)
    picks = num_tokens * min(top_k, num_experts - top_k)
    if picks <= _EXACT_PICKS:
        draws = min(draws, _CELLS * 4 // max(picks, 1))
        counts_NE = draw_routing(rng, draws, num_tokens, top_k, num_experts)
    else:
        counts_NE = draw_counts(rng, draws, num_tokens, top_k, num_experts)
    values = measure(counts_NE)
    # over the true mean, which that of drawn counts misses by their rounding
    values[:, 0] = counts_NE.max(axis=1) / (num_tokens * top_k / num_experts)
    mean = values.mean(axis=0)
    if windows > 1:
        values = _means(rng, values, windows)
    tails = [(1 - quantile) / 2, (1 + quantile) / 2]
    bands = (LoadImbalance(*row.tolist()) for row in (mean, *np.quantile(values, tails, axis=0)))
    return NullBand(*bands, *_share_band(num_tokens * windows, top_k, num_experts, tails))  # type: ignore[call-arg, arg-type]


def _means(rng: np.random.Generator, values_NM: NDArray[np.float64], windows: int) -> NDArray[np.float64]:
    """Means over `windows` of the drawn values. Past 32, as spread as the root of their number says."""
    averaged = min(windows, 32)
    means_NM = values_NM[rng.integers(len(values_NM), size=(512, averaged))].mean(axis=1)
    center_M = values_NM.mean(axis=0)
    return center_M + (means_NM - center_M) * math.sqrt(averaged / windows)


def _share_band(num_tokens: int, top_k: int, num_experts: int, tails: Sequence[float]) -> tuple[float, float]:
    if top_k == num_experts:
        return 1 / num_experts, 1 / num_experts
    first, cumulative = binomial(num_tokens, top_k / num_experts)
    low, high = (first + int(np.searchsorted(cumulative, tail)) for tail in tails)
    return low / (num_tokens * top_k), high / (num_tokens * top_k)


class Interval(NamedTuple):
    """An interval of every metric, from `low` to `high`."""

    low: LoadImbalance
    high: LoadImbalance


def document_bootstrap(counts_GE: Tensor | np.ndarray, *, quantile: float = 0.95, resamples: int = 1000) -> Interval:
    """Where each metric of the summed counts would lie for other documents like these (percentile bootstrap).

    `counts_GE` are counts by document and expert; whole documents are drawn with replacement, because the
    tokens of one are alike (Efron and Tibshirani, 1993, chapter 13). Resampling adds unevenness of its own,
    so the interval can lie a little above the metric. Fixed seed. Documents without tokens are left out.

    Raises `ValueError` for anything but non-negative integers, and with fewer than two documents.
    """
    counts = np.asarray(counts_GE)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or not counts.size or counts.min() < 0:
        raise ValueError(f"counts_GE of shape {counts.shape} and {counts.dtype} must be counts >= 0")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile!r} must be between 0 and 1")
    check_int("resamples", resamples, 2)
    counts = counts[counts.sum(axis=1) > 0].astype(np.float64)
    documents = len(counts)
    if documents < 2:
        raise ValueError(f"counts_GE holds {documents} documents with tokens: an interval needs at least two")
    rng = np.random.default_rng(_SEED)
    drawn_NG = rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    low, high = np.quantile(measure(drawn_NG @ counts), [(1 - quantile) / 2, (1 + quantile) / 2], axis=0)
    return Interval(LoadImbalance(*low.tolist()), LoadImbalance(*high.tolist()))
