"""Which backend wins where: from the raw repeats of a sweep, with how sure that is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_lab.study.measurements import Measurement, Measurements

SURE = 0.95
DRAWS = 1000


class Point(NamedTuple):
    """One cell of a sweep: T, E, K, and the standard deviation of the experts' own logits."""

    tokens: int
    num_experts: int
    top_k: int
    skew: float


class Winner(NamedTuple):
    """The arm of the smallest median at a point, and how sure that is.

    `share`: of bootstrap draws over rounds, those in which it has the smallest median. `second` is the next arm,
    `lead` how many times the winner's time it takes, round by round, with the 95 % interval of that median.
    """

    point: Point
    arm: str
    ms: float
    share: float
    second: str
    lead: float
    lead_low: float
    lead_high: float

    @property
    def sure(self) -> bool:
        """Whether the winner holds in 95 % of draws."""
        return self.share >= SURE


def point_of(row: Measurement) -> Point:
    """The cell of a row. `ValueError` where it does not say its skew."""
    if row.skew is None:
        raise ValueError(f"skew=None of {row.arm!r} must be a number: this is no row of a sweep")
    return Point(row.tokens, row.num_experts, row.top_k, row.skew)


def winners(table: Measurements, direction: str = "forward") -> list[Winner]:
    """The winner at every point with at least two arms that are not bounds, in order of appearance.

    Rounds are drawn with replacement, the same for all arms, since they ran in turn. Raises `ValueError` for rows
    without repeats, or with other numbers of them at one point.
    """
    points: dict[Point, dict[str, tuple[float, ...]]] = {}
    for row in table.select(direction=direction, phase="all", mode="eager").rows:
        if row.error is None:
            continue  # a bound
        if row.repeats is None:
            raise ValueError(f"repeats=None of {row.arm!r} at {point_of(row)}: store a sweep with its repeats")
        points.setdefault(point_of(row), {})[row.arm] = row.repeats
    return [_winner(point, arms) for point, arms in points.items() if len(arms) > 1]


def _winner(point: Point, arms: dict[str, tuple[float, ...]]) -> Winner:
    if len({len(times) for times in arms.values()}) > 1:
        raise ValueError(f"arms at {point} have different numbers of repeats")
    names, times_AR = list(arms), np.array(list(arms.values()))
    drawn_DR = np.random.default_rng(0).integers(times_AR.shape[1], size=(DRAWS, times_AR.shape[1]))
    best, second = np.argsort(np.median(times_AR, axis=1), kind="stable")[:2]
    wins_D = np.median(times_AR[:, drawn_DR], axis=2).argmin(axis=0) == best
    lead_R = times_AR[second] / times_AR[best]
    low, high = np.quantile(np.median(lead_R[drawn_DR], axis=1), (0.025, 0.975))
    ms, lead = float(np.median(times_AR[best])), float(np.median(lead_R))
    return Winner(point, names[best], ms, float(wins_D.mean()), names[second], lead, float(low), float(high))
