"""Where an arm stands beside others of the same rounds: over the fastest peer, and over the dense bound.

Computed from stored rounds: within a round all arms ran in turn, so that drifts pass under all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe_lab.study import timing
from moe_lab.study.measurements import Measurement
from moe_lab.study.timing import Timing


class Standing(NamedTuple):
    """One arm in one layer, dtype and direction: its time over the fastest peer's, round by round, and the bound's.

    `ms` is the arm's median, `peer` whose time is least by the median; `dense` is None without a bound.
    """

    layer: str
    dtype: str
    direction: str
    ms: float
    peer: str
    ratio: Timing
    dense: float | None


def standings(rows: Iterable[Measurement], arm: str, peers: Sequence[str]) -> list[Standing]:
    """One for each layer, dtype and direction that has the arm and a peer, all with their rounds."""
    groups: dict[tuple[str, str, str, str], dict[str, Measurement]] = {}
    for row in rows:
        groups.setdefault((row.bench, row.layer, row.dtype, row.direction), {})[row.arm] = row
    found = []
    for (_, layer, dtype, direction), arms in groups.items():
        rivals = [arms[peer] for peer in peers if peer in arms and arms[peer].repeats is not None]
        if arm not in arms or arms[arm].repeats is None or not rivals:
            continue
        own, best = arms[arm], min(rivals, key=lambda row: row.median)
        ratio = timing.ratio(own.repeats or (), best.repeats or ())
        dense = own.ratio if own.ratio_to == "dense" else None
        found.append(Standing(layer, dtype, direction, own.median, best.arm, ratio, dense))
    return found


def summary(found: Sequence[Standing]) -> dict[str, float]:
    """The median and the largest of the ratios to peers, and of those to the dense bound where there is one."""
    dense = [one.dense for one in found if one.dense is not None]
    middle = {"median": statistics.median(one.ratio.median for one in found)}
    middle["largest"] = max(one.ratio.median for one in found)
    return middle | ({"dense median": statistics.median(dense), "dense largest": max(dense)} if dense else {})
