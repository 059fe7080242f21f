"""Which bits of a layer stay the same when what surrounds a token changes; where not, the first stage and how far.

A difference is counted in units in the last place (ULP) of the largest exact value in a row, float64's: sums of
products cancel, so that an element near zero may be off by many of its own without being wrong. Beside it stand the
errors of both runs against float64 in the same units: neither is the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.config import check_choice, check_int
from moe_lab.layer.moe import MoE
from moe_lab.study.stages import STAGES, Arm, Stages, run_stages

ARMS: dict[str, dict[str, Any]] = {
    "loop": {"backend": "loop"},
    "loop, scatter_add": {"backend": "loop", "combine": "scatter_add"},
    "loop, index_add": {"backend": "loop"},  # no arm of the layer: what adding rows as they come would give
    "padded": {"backend": "padded"},
    "grouped": {"backend": "grouped"},
    "buffered": {"backend": "buffered"},
    "fused": {"backend": "fused"},
    "fused, batch_invariant": {"backend": "fused", "batch_invariant": True},
    "blocked, batch_invariant": {"backend": "blocked", "batch_invariant": True},
}
QUESTIONS = ("repeat", "recompute", "permuted", "alone", "in seven", "split", "ep 2", "ep 4", "threads")
ALONE, SEVEN, SPLITS, REPEATS = 1, 7, 4, 3
LEAST = 4 * SEVEN  # tokens that a ladder needs


class Difference(NamedTuple):
    """Where two runs part: the first stage (None: nowhere), the share of its rows that differ, and by how much.

    `ulps`: the largest difference, in ULPs of the exact row's largest value; `error` and `other_error`: the largest
    errors of the two runs there, in the same units. 0 for a choice of experts, which has no size.
    """

    stage: str | None
    rows: float = 0.0
    ulps: float = 0.0
    error: float = 0.0
    other_error: float = 0.0


class Ladder(NamedTuple):
    """By arm and question, where a layer first differs, or None where the question cannot be put to that arm."""

    cells: dict[str, dict[str, Difference | None]]
    tokens: int
    dtype: str
    device: str
    threads: int


def arms_on(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Arms that a device and dtype have. `buffered` is for the CPU, `fused` for CUDA, in 16 bits."""
    absent = {"buffered"} if device.type == "cuda" else {"fused", "fused, batch_invariant"}
    if dtype == torch.float32:
        absent |= {"fused", "fused, batch_invariant"}
    return tuple(name for name in ARMS if name not in absent)


def make_arm(moe: MoE, name: str) -> Arm:
    """A layer with the weights of `moe` that computes as the arm says, in eval mode. `ValueError` for unknown arms."""
    check_choice("arm", name, ARMS)
    weight = moe.experts.w1_EFD
    plain: dict[str, Any] = {"combine": "gather", "batch_invariant": False}
    made = MoE(moe.config.replace(**plain | ARMS[name])).to(weight.device, weight.dtype)
    made.load_state_dict(moe.state_dict())
    return Arm(made.eval(), add_as_they_come=name == "loop, index_add")


def climb(
    moe: MoE,
    x_TD: Float[Tensor, "T D"],
    *,
    arms: Sequence[str] | None = None,
    questions: Sequence[str] = QUESTIONS,
    threads: int = 2,
    seed: int = 0,
) -> Ladder:
    """Put every question to every arm, over these tokens and drawn output gradients.

    A first run with one thread stands for all; `threads` is the other number of the question of that name. The
    caller's number is restored.
    """
    check_int("tokens", len(x_TD), LEAST)
    check_int("threads", threads, 2)
    for question in questions:
        check_choice("question", question, QUESTIONS)
    probe_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(seed)).to(x_TD)
    names = arms_on(x_TD.device, x_TD.dtype) if arms is None else arms
    before = torch.get_num_threads()
    cells = {}
    try:
        for name in names:
            torch.set_num_threads(1)
            run = _Runs(make_arm(moe, name), x_TD, probe_TD, threads)
            cells[name] = {question: run.ask(question) for question in questions}
    finally:
        torch.set_num_threads(before)
    return Ladder(cells, len(x_TD), str(x_TD.dtype).removeprefix("torch."), x_TD.device.type, threads)


class _Runs:
    """One arm over the same tokens in many surroundings."""

    def __init__(self, arm: Arm, x_TD: Tensor, probe_TD: Tensor, threads: int) -> None:
        self.arm, self.x_TD, self.probe_TD, self.threads = arm, x_TD, probe_TD, threads
        self.base = run_stages(arm, x_TD, probe_TD)

    @cached_property
    def exact(self) -> Stages:
        """The stages in float64, by the experts of the base run."""
        moe = make_arm(self.arm.moe, "loop").moe.double()
        return run_stages(Arm(moe), self.x_TD.double(), self.probe_TD.double(), ids_TK=self.base["choice"][0])

    def ask(self, question: str) -> Difference | None:
        """Where the answer to a question first differs from the base run."""
        if question.startswith("ep") and self.arm.add_as_they_come:
            return None
        if question == "threads" and self.x_TD.device.type != "cpu":
            return None
        found = [first_difference(self.base, other, lambda: self.exact) for other in self._others(question)]
        return min(found, key=lambda difference: STAGES.index(difference.stage) if difference.stage else len(STAGES))

    def _others(self, question: str) -> list[Stages]:
        if question == "repeat":
            return [self._run() for _ in range(REPEATS)]
        if question == "recompute":
            return [self._run(recompute=True)]
        if question == "permuted":
            return [self._permuted()]
        if question == "split":
            return [self._split()]
        if question.startswith("ep"):
            return [self._run(ep=int(question.split()[1]))]
        if question == "threads":
            torch.set_num_threads(self.threads)
            try:
                return [self._run()]
            finally:
                torch.set_num_threads(1)
        return [self._part(slice(0, ALONE if question == "alone" else SEVEN))]

    def _run(self, *, ep: int = 1, recompute: bool = False) -> Stages:
        return run_stages(self.arm, self.x_TD, self.probe_TD, ep=ep, recompute=recompute)

    def _permuted(self) -> Stages:
        order_T = torch.randperm(len(self.x_TD), generator=torch.Generator().manual_seed(1)).to(self.x_TD.device)
        back_T = order_T.argsort()
        stages = run_stages(self.arm, self.x_TD[order_T], self.probe_TD[order_T])
        return _by_token(stages, lambda t: t[back_T]) | {"weight gradients": stages["weight gradients"]}

    def _part(self, tokens: slice) -> Stages:
        return _by_token(run_stages(self.arm, self.x_TD[tokens], self.probe_TD[tokens]), lambda t: t)

    def _split(self) -> Stages:
        parts = [
            run_stages(self.arm, x_TD, probe_TD)
            for x_TD, probe_TD in zip(self.x_TD.tensor_split(SPLITS), self.probe_TD.tensor_split(SPLITS))
        ]
        joined = {name: tuple(torch.cat(ts) for ts in zip(*(part[name] for part in parts))) for name in parts[0]}
        grads = zip(*(part["weight gradients"] for part in parts))
        return joined | {"weight gradients": tuple(sum(g[1:], g[0]) for g in grads)}  # as micro-batches accumulate


def _by_token(stages: Stages, change: Callable[[Tensor], Tensor]) -> Stages:
    return {name: tuple(map(change, ts)) for name, ts in stages.items() if name != "weight gradients"}


def first_difference(base: Stages, other: Stages, exact: Callable[[], Stages]) -> Difference:
    """The first stage, of those that both runs have, in which some bit differs. `other` may hold fewer tokens.

    `exact` gives the same stages in float64; it is asked for only where something differs.
    """
    for stage in STAGES:
        if stage not in base or stage not in other:
            continue
        pairs = [(a[: len(b)], b) for a, b in zip(base[stage], other[stage], strict=True)]
        if any(not torch.equal(a, b) for a, b in pairs):
            rows = torch.cat([(a != b).flatten(1).any(dim=1) for a, b in pairs]).double().mean()
            return Difference(stage, float(rows), *_sizes(pairs, exact(), stage))
    return Difference(None)


def _sizes(pairs: list[tuple[Tensor, Tensor]], exact: Stages, stage: str) -> tuple[float, float, float]:
    """The largest difference and both errors, in ULPs."""
    if stage == "choice":
        return 0.0, 0.0, 0.0
    name = "w2 product" if stage == "experts" else stage  # the exact run shows all stages
    sizes = []
    for (a, b), e in zip(pairs, exact[name], strict=True):
        ulp = ulps_of(e[: len(a)], a.dtype)
        values = (a.double() - b.double(), a.double() - e[: len(a)], b.double() - e[: len(a)])
        sizes.append([float((value.abs() / ulp).max()) for value in values])
    largest = torch.tensor(sizes).amax(dim=0).tolist()
    return largest[0], largest[1], largest[2]


def ulps_of(exact: Float[Tensor, "*rows C"], dtype: torch.dtype) -> Float[Tensor, "*rows 1"]:
    """One unit in the last place, in `dtype`, of each row's largest value: eps * 2^floor(log2 |value|)."""
    info = torch.finfo(dtype)
    largest = exact.abs().amax(dim=-1, keepdim=True).clamp(min=info.tiny)
    return info.eps * 2.0 ** largest.log2().floor()
