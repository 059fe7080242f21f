"""What `backend="auto"` runs: the fastest legal backend by the nearest measured shapes, and why.

The table is `auto_table.json`, made by `python -m moe_lab.jobs.auto_table`. For a device kind and dtype that it does
not hold, backends are tried in the order of `UNMEASURED`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.layer.backends.batched import refuse_counts
from moe_lab.layer.backends.grouped import refuse_grouped

NEAR = 4
UNMEASURED = ("fused", "grouped", "loop")
TABLE = Path(__file__).with_name("auto_table.json")


class Case(NamedTuple):
    """What decides: device kind, dtype, whether gradients flow, rows of a mean expert, and the weights' sizes."""

    device: str
    dtype: str
    grad: bool
    rows: float
    dim: int
    hidden_dim: int
    num_experts: int

    def distance(self, other: Case) -> float:
        """Sum of squared logarithms of the ratios of sizes."""
        return sum(math.log(max(a, 1e-3) / max(b, 1e-3)) ** 2 for a, b in zip(self[3:], other[3:]))


class Choice(NamedTuple):
    """A backend; where it was chosen, times over the fastest one's near here and why faster ones are not legal."""

    backend: str
    times: Mapping[str, float] | None = None
    refused: Mapping[str, str] = {}

    def __str__(self) -> str:
        if self.times is None:
            return f"{self.backend}: asked for by name"
        near = ", ".join(f"{name} {self.times[name]:.2f}" for name in sorted(self.times, key=self.times.__getitem__))
        order = f"not measured for this device and dtype, in order: {', '.join(UNMEASURED)}"
        why = f"times by the nearest measured shapes: {near}" if near else order
        return "; ".join(
            [f"{self.backend}: {why}", *(f"not {name}: {reason}" for name, reason in self.refused.items())]
        )

    def note(self) -> None:
        """Put it on the record."""
        fastpaths.note("experts_backend", self.__str__)


def case_of(x: Tensor, num_rows: int, weights: Sequence[Tensor]) -> Case:
    """The case of `num_rows` rows through w1_EFD, w2_EDF and w3_EFD."""
    num_experts, hidden_dim, dim = weights[0].shape
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    kind, dtype = x.device.type, str(x.dtype).removeprefix("torch.")
    return Case(kind, dtype, grad, num_rows / num_experts, dim, hidden_dim, num_experts)


def choose(case: Case, counts_E: Tensor | None = None, *, plain: bool) -> Choice:
    """The backend for a case; `plain` means SwiGLU without biases, all that `fused` and `buffered` compute.

    `batched` is considered only with the experts' counts given.
    """
    times = relative_times(case)
    refused: dict[str, str] = {}
    for backend in sorted(times, key=times.__getitem__) or UNMEASURED:
        reason = _refuse(backend, case, counts_E, plain)
        if reason is None:
            return Choice(backend, times, refused)
        refused[backend] = reason
    return Choice("loop", times, refused)


@lru_cache(1024)  # looking through the table takes as long as a small product
def relative_times(case: Case) -> Mapping[str, float]:
    """Each backend's time over the fastest one's: a geometric mean of the `NEAR` nearest cases, by inverse distance.

    Four, because of 1 to 8 they had the least regret where each case of the table was chosen by the others: 2.5 % in
    the mean on the CPU and 1.1 % on CUDA, where the nearest alone had 11.4 % and 2.9 %.
    """
    known = ((case.distance(at), ms) for at, ms in table() if at[:3] == case[:3])
    near = sorted(known, key=lambda found: found[0])[:NEAR]
    weights = [1 / (distance + 0.5) for distance, _ in near]
    names = set.intersection(*(set(ms) for _, ms in near)) if near else set()
    logs = {n: sum(w * math.log(ms[n] / min(ms.values())) for w, (_, ms) in zip(weights, near)) for n in names}
    return {name: math.exp(log / sum(weights)) for name, log in logs.items()}


def _refuse(backend: str, case: Case, counts_E: Tensor | None, plain: bool) -> str | None:
    """Why a backend cannot run a case, or None."""
    dtype = getattr(torch, case.dtype)
    if backend in ("fused", "buffered") and not plain:
        return "it computes plain SwiGLU"
    if backend == "buffered" and case.device != "cpu":
        return "it runs on the CPU"
    if backend == "fused" and (case.device != "cuda" or dtype.itemsize != 2):
        return "it runs on CUDA, in bfloat16 or float16"
    if backend in ("fused", "grouped"):
        return refuse_grouped(dtype, case.dim, case.hidden_dim)
    if backend == "batched":
        if case.grad:
            return "a gradient flows"
        if counts_E is None or counts_E.device.type != "cpu":
            return "counts are not known on the host"
        return refuse_counts(counts_E)
    return None


@cache
def table() -> list[tuple[Case, dict[str, float]]]:
    """Measured cases, each with milliseconds by backend."""
    return read(TABLE)


def read(path: Path) -> list[tuple[Case, dict[str, float]]]:
    """The cases of a file as `python -m moe_lab.jobs.auto_table` writes it."""
    stored: list[dict[str, Any]] = json.loads(path.read_text())
    return [(Case(**row["case"]), row["ms"]) for row in stored]


def forget_table() -> None:
    """Read the table again at the next choice."""
    table.cache_clear()
    relative_times.cache_clear()
