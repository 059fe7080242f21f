"""Trained models by method of balancing: what each run ended with, and means over seeds with their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.config import check_choice

FORMAT = 1
# 97.5 % points of Student's t by degrees of freedom, from 1.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Run(NamedTuple):
    """One trained model.

    `bits`: held-out bits per byte; `load`: max/mean of expert load by layer, mean over held-out windows; `dropped`:
    share of the assignments of these windows; `train_bits` and `train_load`: means over the last steps of training;
    `history`: mean over layers of max/mean every so many steps.
    """

    method: str
    seed: int
    bits: float
    load: tuple[float, ...]
    dropped: float
    train_bits: float
    train_load: tuple[float, ...]
    history: tuple[float, ...]


class Estimate(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval by Student's t; NaN for one seed."""

    mean: float
    half: float


@dataclass(frozen=True, eq=False)
class BalanceRuns:
    """All runs, and what they have in common (`about`: config, device, versions, command)."""

    about: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order in which they were run."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that every method was run with."""
        sets = [{run.seed for run in self.of(method)} for method in self.methods]
        return tuple(sorted(set.intersection(*sets))) if sets else ()

    def of(self, method: str) -> tuple[Run, ...]:
        """The runs of one method. `ValueError` for one that is not here."""
        check_choice("method", method, self.methods)
        return tuple(run for run in self.runs if run.method == method)

    def paired(self, method: str, base: str = "none") -> Estimate:
        """By how many bits per byte a method is above `base`: of runs of one seed, which began and read alike."""
        at = {run.seed: run.bits for run in self.of(base)}
        return estimate([run.bits - at[run.seed] for run in self.of(method) if run.seed in at])

    def load(self, method: str, *, train: bool = False) -> Estimate:
        """Max/mean of expert load, mean over layers, held out or of training's last steps."""
        return estimate([_mean(run.train_load if train else run.load) for run in self.of(method)])

    def save(self, path: Path) -> None:
        """Write JSON, one run a line."""
        head = json.dumps({"format": FORMAT, **self.about}, indent=1).removesuffix("\n}")
        lines = ",\n".join(json.dumps(run._asdict()) for run in self.runs)
        part = path.with_suffix(".part")
        part.write_text(f'{head},\n "runs": [\n{lines}\n]}}\n')
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> BalanceRuns:
        """What `save` wrote. `ValueError`, naming the file, for anything else."""
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            runs = tuple(_run(run) for run in values.pop("runs"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} does not hold runs of moe-lab balance: {error!r:.200}") from error
        return cls(values, runs)


def _run(values: dict[str, Any]) -> Run:
    run = Run(**values)
    return run._replace(load=tuple(run.load), train_load=tuple(run.train_load), history=tuple(run.history))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half width of the 95 % interval. `ValueError` for no values, or more than the table of t knows."""
    if not 1 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"{len(values)} values: an estimate needs from 1 to {len(STUDENT) + 1}")
    mean = _mean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, STUDENT[len(values) - 2] * math.sqrt(variance / len(values)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
