"""What `backend="auto"` runs: the fastest legal backend at the nearest measured shape, and why.

The table is `auto_table.json`, made by `python -m moe_lab.jobs.auto_table`. On a device kind that it does not hold,
the rule is: `fused` where legal, else `grouped`, else `loop`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.layer.backends.grouped import refuse_grouped

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
    """A backend, and the reason for it: none where it was asked for by name."""

    backend: str
    reason: str = ""

    def note(self) -> None:
        """Put it on the record, if it was a choice."""
        if self.reason:
            fastpaths.note("auto_backend", lambda: f"{self.backend}: {self.reason}")


def case_of(x: Tensor, num_rows: int, weights: Sequence[Tensor]) -> Case:
    """The case of `num_rows` rows through w1_EFD, w2_EDF and w3_EFD."""
    num_experts, hidden_dim, dim = weights[0].shape
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    kind, dtype = x.device.type, str(x.dtype).removeprefix("torch.")
    return Case(kind, dtype, grad, num_rows / num_experts, dim, hidden_dim, num_experts)


def choose(case: Case, *, plain: bool) -> Choice:
    """The backend for a case; `plain` means SwiGLU without biases, all that `fused` and `buffered` compute."""
    legal = legal_backends(case, plain=plain)
    near = [(case.distance(known), times) for known, times in table() if known[:3] == case[:3]]
    if not near:
        rule = next(name for name in ("fused", "grouped", "loop") if name in legal)
        return Choice(rule, f"no {case.device} {case.dtype} in the table: first legal of fused, grouped, loop")
    times = min(near, key=lambda pair: pair[0])[1]
    best = min((name for name in times if name in legal), key=lambda name: times[name], default="loop")
    others = ", ".join(f"{name} {ms:g}" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    return Choice(best, f"fastest legal at the nearest measured shape, ms: {others}")


def legal_backends(case: Case, *, plain: bool) -> list[str]:
    """Backends that can run the case whatever its counts."""
    legal = ["loop", "padded"]
    dtype = getattr(torch, case.dtype)
    if refuse_grouped(dtype, case.dim, case.hidden_dim) is None:
        legal.append("grouped")
        if plain and case.device == "cuda" and dtype.itemsize == 2:
            legal.append("fused")
    if plain and case.device == "cpu":
        legal.append("buffered")
    return legal


@cache
def table() -> list[tuple[Case, dict[str, float]]]:
    """Measured cases, each with milliseconds by backend."""
    stored: list[dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return [(Case(**row["case"]), row["ms"]) for row in stored]
