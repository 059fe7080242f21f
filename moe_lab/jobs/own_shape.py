"""One's own layer, timed a round at a time: what the panel of timing runs in a process that can be killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_lab.config import MoEConfig, check_choice, check_int, check_threshold
from moe_lab.jobs.bench_inputs import Inputs, draw_routing, make_inputs
from moe_lab.jobs.bench_run import Settings, fields_of, timed
from moe_lab.jobs.contests import Contest, hold
from moe_lab.jobs.sweep import CANDIDATES
from moe_lab.study import timing
from moe_lab.study.measurements import DIRECTIONS, Measurement, measured

CPU = torch.device("cpu")
HERE = tuple(name for name in CANDIDATES if name != "fused")  # which is for CUDA
KEPT = ("q25", "q75", "p90", "p99", "mean")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The routed part of a layer on the CPU: T, D, F, E, K, skew of its routing, dtype and direction."""

    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    skew: float = 0.5
    dtype: str = "float32"
    direction: str = "forward"

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, 1)
        self.config()
        check_threshold("skew", self.skew)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("direction", self.direction, DIRECTIONS)
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.num_bytes > there / 4:
            raise ValueError(
                f"weights and rows of this shape take {self.num_bytes / 2**30:.1f} GiB, more than a quarter of "
                f"{there / 2**30:.1f}: choose smaller sizes"
            )

    def config(self) -> MoEConfig:
        """The layer. `ValueError` for sizes that cannot be."""
        return MoEConfig(dim=self.dim, hidden_dim=self.hidden_dim, num_experts=self.num_experts, top_k=self.top_k)

    @property
    def flops(self) -> int:
        """Of the three products forward: 6 T K D F."""
        return 6 * self.tokens * self.top_k * self.dim * self.hidden_dim

    @property
    def weight_bytes(self) -> int:
        """Of w1, w2 and w3."""
        return 3 * self.num_experts * self.dim * self.hidden_dim * getattr(torch, self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Weights, and rows in, between and out."""
        rows = self.tokens * self.top_k * (2 * self.dim + 3 * self.hidden_dim)
        return self.weight_bytes + rows * getattr(torch, self.dtype).itemsize

    def counts(self) -> list[int]:
        """Rows of each expert, as in `inputs`."""
        _, ids_TK = draw_routing(self.config(), self.tokens, torch.Generator().manual_seed(0), self.skew)
        return torch.bincount(ids_TK.flatten(), minlength=self.num_experts).tolist()

    def inputs(self) -> Inputs:
        """Synthetic, seeded, as in every benchmark."""
        return make_inputs(self.config(), self.tokens, CPU, getattr(torch, self.dtype), skew=self.skew)


@lru_cache(maxsize=1)
def _held(shape: Shape) -> tuple[Inputs, Contest]:
    inputs = shape.inputs()
    return inputs, hold("layer", inputs, HERE)


def one_round(shape: Shape, block_ms: float = 50.0) -> tuple[list[Measurement], dict[str, str]]:
    """Rank function: every backend that agrees once in turn, and why the others are left out."""
    inputs, contest = _held(shape)
    settings = Settings(1, (shape.direction,), keep=True, block_ms=block_ms)
    of = fields_of("layer", "own shape", inputs, shape.skew, timing.environment(CPU)["device"])
    (rows,) = timed(contest, settings, of)
    return rows, contest.missing


def merged(rounds: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """The rows of several rounds as one: medians and paired ratios over all of them, without spreads of single runs.

    Raises `ValueError` without rounds.
    """
    if not rounds:
        raise ValueError("rounds=[] must hold at least one round")
    times = [[[ms] for rows in rounds for ms in rows[i].repeats or ()] for i in range(len(rounds[0]))]
    made = {"median", "low", "high", "repeats", "ratio", "ratio_low", "ratio_high", "ratio_to", *KEPT}
    found = []
    for row, own in zip(rounds[0], times, strict=True):
        of = {name: value for name, value in vars(row).items() if name not in made}
        found.append(measured(own, to=(rounds[0][0].arm, times[0]), keep=True, **of))
    return found
