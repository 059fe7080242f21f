"""What the benchmark over ranks measured, as rows: printed, kept, and read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_lab.study.timing import Timing

PHASES = ("plan", "pack", "exchange", "unpack", "experts", "repack", "combine exchange", "weigh")
EXCHANGES = ("exchange", "combine exchange")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of splits under one routing. Times in ms; `by_rank`: mean, p50, p90, p99 of each rank.

    `slowest_rank` the mean of the slowest rank, `slowest_each` the mean over iterations of whichever was slowest;
    `straggler` rows of the fullest rank over the mean. Waiting and transfer are those of the worst rank, means over
    iterations, of the arm that synchronises; bytes and their rate are those that a rank sends to others.
    """

    layer: str
    routing: str
    kind: str
    ranks: int
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
    return "\n".join([f"{layer} on {first.ranks} ranks   {shape}   ms", *table])


def save(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write rows as JSON, beside the device, versions and date; `load` reads them."""
    path.write_text(json.dumps({"environment": environment, "rows": [asdict(row) for row in rows]}, indent=1))


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `save` wrote: the environment, and the rows."""
    kept = json.loads(path.read_text())
    timings = ("exchange", "plain", "exchange_ratio")
    return kept["environment"], [Row(**row | {name: Timing(*row[name]) for name in timings}) for row in kept["rows"]]
