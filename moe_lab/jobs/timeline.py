"""Waiting, transfer, exposed and hidden exchange by layer, from the profiler traces of all ranks.

moe-lab timeline trace/rank0.json trace/rank1.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from moe_lab.study.kineto import read
from moe_lab.study.timeline import RankSteps, by_exchange

HEADS = ("layer", "exchange", "rank", "wait ms", "transfer ms", "exposed ms", "hidden ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab timeline`."""
    parser.add_argument("traces", nargs="+", help="torch.profiler's Chrome JSON (.json or .json.gz), one a rank")


def main(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    for line in table(read(args.traces)):
        print("  ".join(cell.ljust(20) if i == 1 else cell.rjust(11) for i, cell in enumerate(line)).rstrip())
    return 0


def table(steps: Mapping[int | None, Sequence[RankSteps]]) -> list[tuple[str, ...]]:
    """A line for each layer, exchange and rank, then one for all of a rank's."""
    lines: list[tuple[str, ...]] = [HEADS]
    sums: dict[int, list[float]] = {}
    for layer, ranks in steps.items():
        for name, found in by_exchange(ranks).items():
            for rank, part in enumerate(found):
                ms = [1e3 * seconds for seconds in part]
                sums[rank] = [a + b for a, b in zip(sums.get(rank, [0.0] * len(ms)), ms)]
                shown = "-" if layer is None else str(layer)
                lines.append((shown, name, str(rank), *(f"{value:.3f}" for value in ms)))
    return lines + [("all", "", str(rank), *(f"{value:.3f}" for value in sums[rank])) for rank in sorted(sums)]
