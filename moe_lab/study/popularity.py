"""Synthetic routing, for sizes that no trace of ours has: experts of given popularity, drawn by formula.

Nothing here was recorded. Tokens are independent of each other, as those of real text are not.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.config import check_int, check_threshold

Shares = Float[Tensor, " E"]


def zipf(num_experts: int, exponent: float, *, seed: int = 0) -> Shares:
    """Popularity of the i-th most popular expert proportional to i ** -exponent; which is which is drawn by `seed`.

    0 is uniform. Raises `ValueError` for a negative exponent.
    """
    check_int("num_experts", num_experts, 1)
    check_threshold("exponent", exponent)
    shares_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    return torch.from_numpy(np.random.default_rng(seed).permutation(shares_E / shares_E.sum()))


def dirichlet(num_experts: int, concentration: float, *, seed: int = 0) -> Shares:
    """Popularity drawn from a symmetric Dirichlet: a high concentration is uniform, a low one leaves few experts.

    Raises `ValueError` unless the concentration is above 0.
    """
    check_int("num_experts", num_experts, 1)
    check_threshold("concentration", concentration)
    if not concentration:
        raise ValueError("concentration=0 must be above 0")
    shares_E = np.random.default_rng(seed).dirichlet(np.full(num_experts, concentration))
    return torch.from_numpy(shares_E.clip(1e-12))  # every expert can be drawn, so that K distinct ones are there


def draw_ids(shares_E: Shares, ep: int, tokens_per_rank: int, top_k: int, *, seed: int = 0) -> list[Int[Tensor, "T K"]]:
    """Each rank's expert ids: K distinct experts a token, one after another in proportion to their popularity.

    The K smallest of E exponential times, expert e ringing at rate share_e, are such a draw. The seed of rank r is
    `seed` and r, so that more ranks leave the first ones alone. Raises `ValueError` for sizes that cannot be.
    """
    for name, value in {"ep": ep, "tokens_per_rank": tokens_per_rank, "top_k": top_k}.items():
        check_int(name, value, 1)
    if top_k > len(shares_E):
        raise ValueError(f"top_k={top_k} must be at most the {len(shares_E)} experts")
    share_E = shares_E.numpy().astype(np.float32)
    ids = []
    for rank in range(ep):
        rng = np.random.default_rng((seed, rank))
        time_TE = rng.standard_exponential((tokens_per_rank, len(share_E)), dtype=np.float32) / share_E
        nearest_TK = np.argpartition(time_TE, top_k - 1, axis=1)[:, :top_k] if top_k < len(share_E) else None
        order_TK = np.tile(np.arange(len(share_E)), (tokens_per_rank, 1)) if nearest_TK is None else nearest_TK
        by_time_TK = np.take_along_axis(time_TE, order_TK, axis=1).argsort(axis=1, kind="stable")
        ids.append(torch.from_numpy(np.take_along_axis(order_TK, by_time_TK, axis=1)))
    return ids
