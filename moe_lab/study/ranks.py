"""What the load of experts means for the ranks that hold them, and for the tiles they are computed in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.draws import draw_counts
from moe_lab.study.load import packing_order
from moe_lab.study.trace import RoutingTrace

_DRAWS = 2048


class RankLoad(NamedTuple):
    """Rows that the ranks of one expert-parallel group receive, over `windows` forwards of all layers.

    `straggler`: sum over forwards and layers of the largest rank's rows over that of the mean rank's: how much
    longer the exchange and experts last than in perfect balance (1). `chance_*`: its mean and 95 % band under
    uniform random routing. `rows_mean`: rows a rank receives on average in a layer; `rows_p50` and `rows_p999`:
    quantiles, over forwards and layers, of what the fullest rank receives, which buffers must hold.
    """

    ranks: int
    tokens_per_rank: int
    windows: int
    layers: int
    straggler: float
    chance_mean: float
    chance_low: float
    chance_high: float
    rows_mean: float
    rows_p50: float
    rows_p999: float

    def __repr__(self) -> str:
        return (
            f"EP {self.ranks} · {self.tokens_per_rank:,} tokens a rank x {self.windows:,} forwards x "
            f"{self.layers} layers\n"
            f"straggler {self.straggler:.3f} (chance {self.chance_mean:.3f}, "
            f"95 % {self.chance_low:.3f}-{self.chance_high:.3f})\n"
            f"rows of the fullest rank  p50 {self.rows_p50:,.0f}  p99.9 {self.rows_p999:,.0f}  (mean rank "
            f"{self.rows_mean:,.0f})"
        )


def block_placement(num_experts: int, ranks: int) -> Int[Tensor, " E"]:
    """The rank of each expert when ranks hold equal blocks of them. `ValueError` when blocks are not equal."""
    check_int("ranks", ranks, 1)
    if num_experts % ranks:
        divisors = ", ".join(str(d) for d in range(1, num_experts + 1) if num_experts % d == 0)
        raise ValueError(
            f"num_experts={num_experts} cannot be spread over ep={ranks} ranks ({num_experts} % {ranks} = "
            f"{num_experts % ranks}): choose ep from {divisors}, or give a placement"
        )
    return torch.arange(ranks).repeat_interleave(num_experts // ranks)


def rank_rows(counts: Int[Tensor, "*batch E"], rank_E: Int[Tensor, " E"], ranks: int) -> Int[Tensor, "*batch ranks"]:
    """Rows that each rank receives, from counts by expert and the rank of each expert."""
    rows = torch.zeros(*counts.shape[:-1], ranks, dtype=counts.dtype)
    return rows.index_add_(-1, rank_E, counts)


def straggler_factor(counts_LE: Int[Tensor, "*layers E"], rank_E: Int[Tensor, " E"], ranks: int) -> float:
    """Sum over layers of the largest rank's rows over the sum of the mean rank's. `ValueError` without rows.

    Hand-checked: two layers with counts [3, 1, 0, 0] and [1, 1, 1, 1] on two ranks give (4 + 2) / (2 + 2) = 1.5.
    """
    rows = rank_rows(counts_LE, rank_E, ranks).double()
    if not rows.any():
        raise ValueError("counts sum to 0: no rows, no straggler")
    return float(rows.amax(dim=-1).sum() / rows.mean(dim=-1).sum())


def rank_load(
    trace: RoutingTrace,
    ranks: int,
    tokens_per_rank: int,
    *,
    placement: Sequence[int] | None = None,
    shuffle: bool = True,
) -> RankLoad:
    """Play a trace through `ranks` expert-parallel ranks that hold `tokens_per_rank` tokens each.

    A forward takes the next ranks x tokens_per_rank valid tokens, of whole documents in a shuffled order, as
    packing for training does; `shuffle=False` keeps the recorded order, whose runs of one domain show a skew that
    no rank would see. `placement` is the rank of each expert (default: equal blocks).

    Raises `ValueError` for a placement that does not fit and a trace shorter than one forward.
    """
    rank_E = _placement(placement, trace.num_experts, ranks)
    check_int("tokens_per_rank", tokens_per_rank, 1)
    order_T = packing_order(trace) if shuffle else torch.arange(trace.num_tokens)
    rows_WLR = forward_rows(trace, order_T, rank_E, ranks, tokens_per_rank).double()
    largest_N = rows_WLR.amax(dim=-1).flatten()
    chance = chance_straggler(ranks * tokens_per_rank, trace.top_k, rank_E, ranks, repeats=len(largest_N))
    p50, p999 = np.quantile(largest_N.numpy(), [0.5, 0.999])
    straggler = float(largest_N.sum() / rows_WLR.mean(dim=-1).sum())
    windows, layers, _ = rows_WLR.shape
    return RankLoad(
        ranks, tokens_per_rank, windows, layers, straggler, *chance, float(rows_WLR.mean()), float(p50), float(p999)
    )


def forward_rows(
    trace: RoutingTrace, order_T: Int[Tensor, " T"], rank_E: Int[Tensor, " E"], ranks: int, tokens_per_rank: int
) -> Int[Tensor, "W L ranks"]:
    """Rows that each rank receives in every layer of W forwards, each of the next ranks x tokens_per_rank valid tokens.

    `order_T`: indices of tokens. `rank_E`: the rank of each expert. `ValueError` for fewer tokens than a forward has.
    """
    order_T = order_T[trace.valid_T[order_T]]
    window = ranks * tokens_per_rank
    windows = len(order_T) // window
    if not windows:
        raise ValueError(
            f"{ranks} ranks of tokens_per_rank={tokens_per_rank:,} need {window:,} valid tokens, not {len(order_T):,}"
        )
    window_T = torch.full((trace.num_tokens,), -1)
    window_T[order_T[: windows * window]] = torch.arange(windows * window) // window
    return rank_rows(trace.counts_by(window_T, windows), rank_E, ranks).transpose(0, 1)


def chance_straggler(
    num_tokens: int, top_k: int, rank_E: Int[Tensor, " E"], ranks: int, *, repeats: int = 1
) -> tuple[float, float, float]:
    """Mean and central 95 % of the straggler factor over `repeats` layers of uniform random routing. Fixed seed."""
    num_experts = len(rank_E)
    if top_k == num_experts:
        held_R = torch.bincount(rank_E, minlength=ranks).double()
        factor = float(held_R.max() / held_R.mean())
        return factor, factor, factor
    rng = np.random.default_rng(0)
    counts_NE = rng.permuted(draw_counts(rng, _DRAWS, num_tokens, top_k, num_experts), axis=1)
    rows_NR = rank_rows(torch.from_numpy(counts_NE), rank_E, ranks).double()
    ratio_N: NDArray[np.float64] = (rows_NR.amax(dim=1) / rows_NR.mean(dim=1)).numpy()
    averaged = min(repeats, 64)
    means = ratio_N[rng.integers(len(ratio_N), size=(1024, averaged))].mean(axis=1)
    mean = float(ratio_N.mean())
    low, high = np.quantile(mean + (means - mean) * math.sqrt(averaged / repeats), [0.025, 0.975])
    return mean, float(low), float(high)


def tile_waste(counts: Int[Tensor, "*batch E"], tile: int = 128) -> Float[Tensor, "*batch"]:
    """Rows computed in vain when every expert's rows fill whole tiles: sum ceil(c / tile) * tile / sum c - 1."""
    check_int("tile", tile, 1)
    return (-(-counts // tile) * tile).sum(dim=-1).double() / counts.sum(dim=-1) - 1


def padded_waste(counts: Int[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """Share of a batched product that is padding when all experts are padded to the largest: 1 - mean / max."""
    return 1 - counts.double().mean(dim=-1) / counts.amax(dim=-1)


def _placement(placement: Sequence[int] | None, num_experts: int, ranks: int) -> Tensor:
    if placement is None:
        return block_placement(num_experts, ranks)
    check_int("ranks", ranks, 1)
    if len(placement) != num_experts or any(type(r) is not int or not 0 <= r < ranks for r in placement):
        raise ValueError(
            f"placement={placement!r:.80} must name a rank from 0 to {ranks - 1} for {num_experts} experts"
        )
    return torch.tensor(placement)
