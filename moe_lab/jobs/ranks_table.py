"""What the benchmark over ranks measured, as rows: made from each rank's times, printed, kept, and read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.jobs.ranks_inputs import Settings
from moe_lab.jobs.ranks_measure import RankResult
from moe_lab.study.timing import Timing, ratio, summarise

PHASES = ("plan", "pack", "exchange", "unpack", "experts", "repack", "combine exchange", "weigh")
EXCHANGES = ("exchange", "combine exchange")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of splits under one routing. Times in ms; `by_rank`: mean, p50, p90, p99 of each rank.

    `ranks` in groups of `ep` that share the experts.
    `slowest_rank` the mean of the slowest rank, `slowest_each` the mean over iterations of whichever was slowest;
    `straggler` rows of the fullest rank over the mean. Waiting and transfer are those of the worst rank, means over
    iterations, of the arm that synchronises; bytes and their rate are those that a rank sends to others.
    """

    layer: str
    routing: str
    kind: str
    ranks: int
    ep: int
    tokens: int
    shape: dict[str, int]
    forward_by_rank: list[list[float]]
    forward_slowest_rank: float
    forward_slowest_each: float
    step_by_rank: list[list[float]]
    step_slowest_rank: float
    step_slowest_each: float
    tokens_per_second: float
    straggler: float
    padded_share: float
    reason: str
    phases_ms: dict[str, float]
    wait_ms: dict[str, float]
    transfer_ms: dict[str, float]
    exchange: Timing
    plain: Timing
    exchange_ratio: Timing
    bytes_per_second: float

    def cells(self) -> list[str]:
        """One line of the table."""
        both = "  ".join(f"{self.wait_ms[name]:.2f}+{self.transfer_ms[name]:.2f}" for name in EXCHANGES)
        return [
            self.routing,
            self.kind,
            f"{self.forward_slowest_each:.2f}",
            f"{self.step_slowest_each:.2f}",
            f"{1e-6 * self.tokens_per_second:.2f}",
            f"{self.straggler:.2f}",
            f"{100 * self.padded_share:.0f} %",
            both,
            f"{self.phases_ms['experts']:.2f}",
            f"{self.exchange.median:.3f}",
            f"{self.exchange_ratio.median:.2f}",
            f"{1e-9 * self.bytes_per_second:.0f}",
        ]


def gather_rows(settings: Settings, by_rank: Sequence[RankResult]) -> Row:
    """What the ranks measured, as one row."""
    forward_RI, step_RI = (np.array([getattr(r, n) for r in by_rank]) for n in ("forward_ms", "step_ms"))
    edges_RIP = np.array([r.edges_IP for r in by_rank])
    ep = settings.ep or len(by_rank)
    taken_RIP = 1e3 * np.diff(edges_RIP, axis=2)
    wait, transfer = {}, {}
    for name in EXCHANGES:
        arrival_RI, end_RI = (edges_RIP[:, :, PHASES.index(name) + side] for side in (0, 1))
        groups = [wait_and_transfer(*of) for of in zip(_by_group(arrival_RI, ep), _by_group(end_RI, ep))]
        wait_RI, transfer_RI = (np.concatenate(of) for of in zip(*groups))
        wait[name], transfer[name] = (1e3 * float(x.mean(axis=1).max()) for x in (wait_RI, transfer_RI))
    rows_R, padded_R = (np.array([getattr(r, n) for r in by_rank], float) for n in ("rows", "padded_rows"))
    exchange_I, plain_I = (np.array([getattr(r, n) for r in by_rank]).max(axis=0) for n in ("exchange_ms", "plain_ms"))
    config = settings.config
    return Row(
        layer=settings.layer,
        routing=settings.routing,
        kind=settings.kind,
        ranks=len(by_rank),
        ep=ep,
        tokens=settings.tokens,
        shape={"D": config.dim, "F": config.hidden_dim, "E": config.num_experts, "K": config.top_k},
        forward_by_rank=_spread(forward_RI),
        forward_slowest_rank=float(forward_RI.mean(axis=1).max()),
        forward_slowest_each=float(forward_RI.max(axis=0).mean()),
        step_by_rank=_spread(step_RI),
        step_slowest_rank=float(step_RI.mean(axis=1).max()),
        step_slowest_each=float(step_RI.max(axis=0).mean()),
        tokens_per_second=1e3 * settings.tokens * len(by_rank) / float(forward_RI.max(axis=0).mean()),
        straggler=float(rows_R.max() / rows_R.mean()),
        padded_share=float(padded_R.sum() / (settings.tokens * config.top_k * len(by_rank))),
        reason=by_rank[0].reason,
        phases_ms=dict(zip(PHASES, taken_RIP.mean(axis=1).max(axis=0).tolist())),
        wait_ms=wait,
        transfer_ms=transfer,
        exchange=summarise(exchange_I.tolist()),
        plain=summarise(plain_I.tolist()),
        exchange_ratio=ratio(exchange_I.tolist(), plain_I.tolist()),
        bytes_per_second=1e3 * max(r.sent_bytes for r in by_rank) / float(np.median(exchange_I)),
    )


def wait_and_transfer(arrival_RI: np.ndarray, end_RI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each rank and iteration: until the latest rank arrives, and from then on until this one is done.

    wait_r = latest arrival - arrival_r; transfer_r = end_r - latest arrival. One clock for all ranks.
    """
    latest_I = arrival_RI.max(axis=0)
    return latest_I - arrival_RI, end_RI - latest_I


def _by_group(times_RI: np.ndarray, ep: int) -> np.ndarray:
    """Ranks that exchange with each other lie together."""
    return times_RI.reshape(-1, ep, times_RI.shape[1])


def _spread(times_RI: np.ndarray) -> list[list[float]]:
    return [[float(times.mean()), *np.quantile(times, (0.5, 0.9, 0.99)).tolist()] for times in times_RI]


HEAD = ["routing", "splits", "forward", "step", "Mtok/s", "straggler", "padding", "wait+transfer, both", "experts"]
HEAD += ["exchange", "x plain", "GB/s"]


def describe(layer: str, rows: Sequence[Row]) -> str:
    """A table of one layer's rows, ms."""
    first = rows[0]
    shape = "  ".join(f"{name} {size}" for name, size in {"T": first.tokens, **first.shape}.items())
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    names = ["phases", *(f"{row.routing} {row.kind}" for row in rows)]
    phases = [names, *([name, *(f"{row.phases_ms[name]:.2f}" for row in rows)] for name in PHASES)]
    widths = [max(len(line[i]) for line in phases) for i in range(len(names))]
    table += ["", *("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in phases)]
    return "\n".join([f"{layer} on {first.ranks} ranks, EP {first.ep}   {shape}   ms", *table])


def save(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write rows as JSON, beside the device, versions and date; `load` reads them."""
    path.write_text(json.dumps({"environment": environment, "rows": [asdict(row) for row in rows]}, indent=1))


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `save` wrote: the environment, and the rows."""
    kept = json.loads(path.read_text())
    timings = ("exchange", "plain", "exchange_ratio")
    return kept["environment"], [Row(**row | {name: Timing(*row[name]) for name in timings}) for row in kept["rows"]]
