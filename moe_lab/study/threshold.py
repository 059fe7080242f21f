"""The threshold of adaptive even splits, swept over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_lab.config import check_threshold
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.padding import overhead, ratio, worst_overhead


class ThresholdPoint(NamedTuple):
    """One adaptive threshold over many micro-batches: how many ran padded, and the zero rows that took."""

    threshold: float
    micro_batches: int
    padded: int
    overhead: float

    @property
    def share_padded(self) -> float:
        """Share of micro-batches that ran with even splits."""
        return self.padded / self.micro_batches


def sweep_threshold(matrices: Sequence[CountMatrix], thresholds: Sequence[float]) -> list[ThresholdPoint]:
    """How often each threshold pads, and zero rows over real rows in all exchanges. `ValueError` without matrices."""
    if not matrices:
        raise ValueError("matrices is empty: a sweep needs at least one micro-batch")
    for threshold in thresholds:
        check_threshold("threshold", threshold)
    forced = [overhead(counts, "equal_split") for counts in matrices]
    real = sum(sum(one.sent_R) + sum(one.rows_R) for one in forced)
    cost = [(worst_overhead(counts), sum(one.exchange_zeros_R)) for counts, one in zip(matrices, forced, strict=True)]
    points = []
    for threshold in thresholds:
        zeros = [zeros for worst, zeros in cost if worst <= threshold]
        points.append(ThresholdPoint(threshold, len(matrices), len(zeros), ratio(sum(zeros), real)))
    return points
