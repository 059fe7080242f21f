"""Counts of uniform random routing, drawn: what the chance band of every metric is made of."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray


def draw_routing(
    rng: np.random.Generator, draws: int, num_tokens: int, top_k: int, num_experts: int
) -> NDArray[np.int64]:
    """Counts (draws, E) of uniform random routing, token by token: exact, at a cost of draws x T x K.

    K distinct of E by Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987), for all tokens at once. More
    than half of the experts are drawn by drawing those left out.
    """
    left_out = 2 * top_k > num_experts
    picked = num_experts - top_k if left_out else top_k
    tokens = draws * num_tokens
    chosen: list[NDArray[np.uint16]] = []
    for last in range(num_experts - picked, num_experts):
        pick = rng.integers(0, last + 1, size=tokens, dtype=np.uint16)
        taken = np.zeros(tokens, dtype=bool)
        for earlier in chosen:
            taken |= pick == earlier
        pick[taken] = last
        chosen.append(pick)
    first_cell = np.repeat(np.arange(draws) * num_experts, num_tokens)
    counts = np.zeros(draws * num_experts, dtype=np.int64)
    for pick in chosen:
        counts += np.bincount(first_cell + pick, minlength=len(counts))
    counts_NE = counts.reshape(draws, num_experts)
    return num_tokens - counts_NE if left_out else counts_NE


def draw_counts(
    rng: np.random.Generator, draws: int, num_tokens: int, top_k: int, num_experts: int
) -> NDArray[np.int64]:
    """Counts (draws, E) of uniform random routing, ascending, without drawing tokens: a cost of draws x E.

    Every count is binomial (T, K/E) exactly. Their dependence is that of exchangeable normal variables with
    correlation -1/(E-1), the exact one, since the sum is fixed: a Gaussian copula. Needs K < E.
    """
    normal_NE = rng.standard_normal((draws, num_experts), dtype=np.float32)
    normal_NE -= normal_NE.mean(axis=1, keepdims=True)
    normal_NE *= math.sqrt(num_experts / (num_experts - 1))
    normal_NE.sort(axis=1)  # which expert is which does not matter, and searching in order is faster
    first, cumulative = binomial(num_tokens, top_k / num_experts)
    steps = torch.special.ndtri(torch.from_numpy(cumulative)).numpy().astype(np.float32)
    return first + np.searchsorted(steps[:-1], normal_NE.ravel()).reshape(draws, num_experts)


def binomial(n: int, p: float) -> tuple[int, NDArray[np.float64]]:
    """The first value kept and the cumulative probabilities from there, of a binomial within 9 deviations."""
    reach = 9 * math.sqrt(n * p * (1 - p)) + 9
    first, last = max(0, int(n * p - reach)), min(n, int(n * p + reach))
    k = np.arange(first, last)
    log_ratio = np.log((n - k) / (k + 1)) + math.log(p / (1 - p))
    log_p = np.concatenate([[0.0], np.cumsum(log_ratio)])
    weight = np.exp(log_p - log_p.max())
    cumulative = np.cumsum(weight)
    return first, cumulative / cumulative[-1]
