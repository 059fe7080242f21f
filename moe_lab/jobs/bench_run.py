"""Time a contest: forward, forward and backward, compiled, and its phases; rows of the one table as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab.jobs.bench_inputs import Inputs, imbalance
from moe_lab.jobs.contests import Contest
from moe_lab.jobs.peers import Arm
from moe_lab.study import timing
from moe_lab.study.breakdown import breakdown
from moe_lab.study.measurements import DIRECTIONS, Measurement, Measurements, measured

MAX_COPY = 2**30
Runs = list[list[float]]


class Settings(NamedTuple):
    """How to time: rounds, which directions and modes, and ms of a block (None: the device's).

    Modes are those of a `Measurement`; "graph", which replays a CUDA graph, is for forward alone.
    """

    rounds: int = 8
    directions: Sequence[str] = DIRECTIONS
    modes: Sequence[str] = ("eager",)
    keep: bool = False
    block_ms: float | None = None


def fields_of(what: str, layer: str, inputs: Inputs, skew: float, device: str) -> dict[str, Any]:
    """What every row of a contest says."""
    (tokens, top_k), (experts, hidden_dim, dim) = inputs.gates_TK.shape, inputs.w1_EFD.shape
    sizes = {"tokens": tokens, "dim": dim, "hidden_dim": hidden_dim, "num_experts": experts, "top_k": top_k}
    dtype = str(inputs.x_TD.dtype).removeprefix("torch.")
    of = {"bench": what, "layer": layer, "dtype": dtype, "device": device}
    return of | sizes | {"skew": skew, "max_over_mean": imbalance(inputs)}


def timed(contest: Contest, settings: Settings, of: dict[str, Any]) -> Iterator[list[Measurement]]:
    """The rows of each direction: bounds first, then every arm in every mode. An arm that fails in one is left out
    of it, with the reason in `contest.missing`.
    """
    for direction in settings.directions:
        runs = {
            (name, mode): ready
            for mode in settings.modes
            for name, arm in contest.arms.items()
            if (ready := _ready(contest, name, arm, direction, mode)) is not None
        }
        yield _rows(contest, runs, direction, settings, of)


def phase_rows(contest: Contest, settings: Settings, of: dict[str, Any]) -> Iterator[Measurement]:
    """Forward of our own arms, phase by phase."""
    device = contest.leaves[0].device
    arms = {name: partial(_forward, arm, contest.leaves) for name, arm in contest.arms.items()}
    for name, phases in breakdown(arms, device, rounds=settings.rounds).items():
        if len(phases) > 2:  # a library's arm has no phases: all of it is rest
            for phase, runs in phases.items():
                yield measured(runs, arm=name, phase=phase, **of | {"bench": "phases"})


def _ready(contest: Contest, name: str, arm: Arm, direction: str, mode: str) -> Callable[[], object] | None:
    """The arm as a function of nothing, run once."""
    run = arm._replace(run=torch.compile(arm.run, dynamic=False)) if mode == "compile" else arm
    ready: Callable[[], object] = partial(_forward if direction == "forward" else _both, run, contest.leaves)
    try:
        ready()
        if mode == "graph":
            ready = timing.captured(ready).replay
    except Exception as error:  # whatever a compiler raises, backends that refuse gradients, arms that wait
        contest.missing[f"{name} {direction} {mode}"] = str(error).strip().splitlines()[0]
        return None
    return ready


def _forward(arm: Arm, leaves: Sequence[Tensor]) -> None:
    with torch.no_grad():
        arm.run(*leaves)


def _attached(arm: Arm, leaves: Sequence[Tensor]) -> Tensor:
    return arm.run(*(leaf.detach().requires_grad_() for leaf in leaves))


def _both(arm: Arm, leaves: Sequence[Tensor]) -> None:
    out = _attached(arm, leaves)
    out.backward(torch.ones_like(out))
    for weight in arm.weights:
        weight.grad = None


def _rows(
    contest: Contest,
    ready: dict[tuple[str, str], Callable[[], object]],
    direction: str,
    settings: Settings,
    of: dict[str, Any],
) -> list[Measurement]:
    both, device = direction != "forward", contest.leaves[0].device
    size = min(MAX_COPY, contest.num_bytes[both] // 2)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    bounds: dict[tuple[str, str], Callable[[], object]] = {("copy", "eager"): lambda: target.copy_(source)}
    if (dense := contest.dense) is not None:
        bounds = {("dense", "eager"): (lambda: [dense() for _ in range(3)]) if both else dense} | bounds
    runs = timing.interleave(_named(bounds | ready), device, rounds=settings.rounds, block_ms=settings.block_ms)
    first = next(iter(runs))
    bound: dict[str, Any] = {}
    bound["bytes_ms"] = _median(runs["copy eager"]) * contest.num_bytes[both] / (2 * size)
    bound["dense_ms"] = _median(runs[first]) if dense is not None else None
    rows = []
    for name, mode in (*bounds, *ready):
        own: dict[str, Any] = {"arm": name, "mode": mode, "direction": direction, "keep": settings.keep}
        if (name, mode) in ready:
            own |= bound | {"error": contest.errors[name]} | _memory(contest.arms[name], contest, direction, mode)
        to = (first.split()[0], runs[first])
        rows.append(measured(runs[f"{name} {mode}"], to=to, **of, **own))
    return rows


def _named(arms: dict[tuple[str, str], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    return {f"{name} {mode}": arm for (name, mode), arm in arms.items()}


def _median(runs: Runs) -> float:
    return timing.summarise(timing.medians(runs)).median


def _memory(arm: Arm, contest: Contest, direction: str, mode: str) -> dict[str, int]:
    """On CUDA, of forward and backward: bytes saved when forward ends, and the peak without weights' gradients."""
    if direction == "forward" or mode != "eager" or not contest.leaves[0].is_cuda:
        return {}
    memory = timing.measure_memory(
        lambda: _attached(arm, contest.leaves), lambda out: out.backward(torch.ones_like(out))
    )
    for weight in arm.weights:
        weight.grad = None
    return {"saved": memory.saved, "peak": memory.peak - sum(weight.nbytes for weight in arm.weights)}


def collect(groups: Iterable[Iterable[Measurement]], facts: dict[str, str | int], path: Path | None) -> Measurements:
    """All rows as a table, saved at `path`; an interrupt saves those measured so far."""
    rows: list[Measurement] = []
    try:
        for group in groups:
            rows += group
    finally:
        table = Measurements(facts, tuple(rows))
        if path:
            table.save(path)
    return table
