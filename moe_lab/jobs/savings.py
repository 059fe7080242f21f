"""What fast paths save: kept copies of weights as these change, and each path beside the one it replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.moe import MoE
from moe_lab.study import timing


class Step(NamedTuple):
    """One forward by `batched` after something was done to the weights: each copy's fate, bytes kept, and the result.

    `w13` and `w2_t` are "hit", or why there was none; `right` compares with the loop over the present weights.
    """

    what: str
    w13: str
    w2_t: str
    num_bytes: int
    right: bool


CHANGES: dict[str, Callable[[GroupedExperts], object]] = {
    "first call": lambda experts: None,
    "again": lambda experts: None,
    "w2 written in place": lambda experts: experts.w2_EDF.detach().mul_(2),
    "again, as it is": lambda experts: None,
    "load_state_dict": lambda experts: experts.load_state_dict({k: v + 1 for k, v in experts.state_dict().items()}),
    "w1 swapped": lambda experts: setattr(experts, "w1_EFD", torch.nn.Parameter(experts.w1_EFD.detach() * 2)),
    "a fused optimizer steps": lambda experts: _step(experts),
    "to float64 and back": lambda experts: experts.double().float(),
    "w1 written through .data": lambda experts: experts.w1_EFD.data.mul_(2),
    "drop_caches()": lambda experts: experts.drop_caches(),
    "managed by FSDP": lambda experts: setattr(experts, "_is_fsdp_managed_module", True),
}


def _step(experts: GroupedExperts) -> None:
    """One step by a kernel that writes without a new version."""
    for weight in experts.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(experts.parameters(), lr=0.1, fused=True).step()


@torch.no_grad()
def cache_history(dim: int = 64, hidden_dim: int = 32, num_experts: int = 4, rows: int = 8) -> list[Step]:
    """A forward after each of `CHANGES`, one after another, on one layer with seeded weights."""
    draw = torch.Generator().manual_seed(0)
    experts, loop = (GroupedExperts(dim, hidden_dim, num_experts, backend=name) for name in ("batched", "loop"))
    for weight in experts.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) / 8)
    x_RD = torch.randn(rows * num_experts, dim, generator=draw)
    ends_E = rows * torch.arange(1, num_experts + 1, dtype=torch.int32)
    steps = []
    for what, change in CHANGES.items():
        change(experts)
        with fastpaths.record() as record:
            out_RD = experts(x_RD, ends_E)
        loop.load_state_dict(experts.state_dict())
        right = torch.allclose(out_RD, loop(x_RD, ends_E), rtol=1e-3, atol=1e-2)
        steps.append(Step(what, _fate(record, "w13"), _fate(record, "w2_t"), experts.cache.num_bytes, right))
    return steps


def _fate(record: fastpaths.Record, name: str) -> str:
    if record.count(f"cached_{name}_hit"):
        return "hit"
    (reason,) = record.entries[f"cached_{name}_miss"].reasons
    return reason


class Saving(NamedTuple):
    """A fast path and the way it replaces, on the same input: bytes it does not write, by formula, and both to run."""

    path: str
    instead_of: str
    num_bytes: int
    fast: Callable[[], Tensor]
    slow: Callable[[], Tensor]


def savings(config: MoEConfig, tokens: int) -> list[Saving]:
    """Fast paths on one rank without gradients, float32. Both ways give the same, to rounding.

    `batched` needs equal counts: round robin. Bytes: copies of w13 and w2; and the dispatched rows and both products
    of all rows, of which `buffered` keeps those of an expert a thread.
    """
    even = config.replace(router=RouterConfig(force_load_balance="round_robin"))
    x_TD = torch.randn(tokens, config.dim, generator=torch.Generator().manual_seed(0))
    rows, row = tokens * config.top_k, 4 * config.dim

    def forward(changed: MoEConfig, before: Callable[[MoE], object] = lambda moe: None) -> Callable[[], Tensor]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            moe = MoE(changed).eval()

        @torch.no_grad()
        def run() -> Tensor:
            before(moe)
            return moe(x_TD)

        return run

    weights = 4 * 3 * config.num_experts * config.dim * config.hidden_dim
    batched = even.replace(backend="batched")
    return [
        Saving("weights kept", "made anew", weights, forward(batched), forward(batched, _drop)),
        Saving("batched", "loop", 0, forward(batched), forward(even.replace(backend="loop"))),
        Saving("buffered", "loop", rows * (row + 8 * config.hidden_dim), forward(config.replace(backend="buffered")),
               forward(config.replace(backend="loop"))),
        Saving("auto", "loop", 0, forward(config.replace(backend="auto")), forward(config.replace(backend="loop"))),
    ]  # fmt: skip


def _drop(moe: MoE) -> None:
    moe.experts.drop_caches()


def time_savings(found: Sequence[Saving], rounds: int) -> list[tuple[Saving, list[float], list[float]]]:
    """Each path and the way it replaces, ms a round, all in turn. `ValueError` where the two do not give the same."""
    arms: dict[str, Callable[[], object]] = {}
    for saving in found:
        fast, slow = saving.fast(), saving.slow()
        error = float((fast - slow).norm() / slow.norm())
        if not error <= 1e-5:
            raise ValueError(f"path {saving.path!r} differs by {error:.1e} of the output: must be at most 1e-5")
        arms |= {f"{saving.path} fast": saving.fast, f"{saving.path} slow": saving.slow}
    runs = timing.interleave(arms, torch.device("cpu"), rounds=rounds)
    ms = {name: timing.medians(read) for name, read in runs.items()}
    return [(saving, ms[f"{saving.path} fast"], ms[f"{saving.path} slow"]) for saving in found]
