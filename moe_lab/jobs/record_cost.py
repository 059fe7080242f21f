"""What the record of fast paths costs a whole layer while nobody records.

    python -m moe_lab.jobs.record_cost --rounds 40

The layer's forward as it is, beside itself with `fastpaths.note` replaced by a function that does nothing, and beside
itself once more, which says what the noise is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.config import RouterConfig
from moe_lab.jobs.bench_inputs import layer_config
from moe_lab.layer.moe import MoE
from moe_lab.study import timing

BACKENDS = ("loop", "buffered", "batched")


class Cost(NamedTuple):
    """A backend's decisions in one forward, its ms, and how many times those of the other two arms these are."""

    backend: str
    decisions: int
    ms: timing.Timing
    over_nothing: timing.Timing
    over_itself: timing.Timing


def measure(preset: str, tokens: int, rounds: int, backends: Sequence[str] = BACKENDS) -> list[Cost]:
    """Forward without gradients on the CPU, float32, routing round robin so that every backend is legal."""
    config = layer_config(preset).replace(router=RouterConfig(force_load_balance="round_robin"))
    x_TD = torch.randn(tokens, config.dim, generator=torch.Generator().manual_seed(0))
    costs = []
    for backend in backends:
        run = torch.no_grad()(MoE(config.replace(backend=backend)).eval())
        run(x_TD)  # copies of weights are made
        with fastpaths.record() as record:
            run(x_TD)
        decisions = sum(entry.count for entry in record.entries.values())
        arms = {
            "as it is": noting(fastpaths.note, run, x_TD),
            "nothing": noting(nothing, run, x_TD),
            "itself": noting(fastpaths.note, run, x_TD),
        }
        ms = {name: timing.medians(read) for name, read in timing.interleave(arms, x_TD.device, rounds=rounds).items()}
        own = ms["as it is"]
        costs.append(
            Cost(backend, decisions, timing.summarise(own), *(timing.ratio(own, ms[n]) for n in ("nothing", "itself")))
        )
    return costs


def nothing(name: str, reason: str | Callable[[], str], value: int | None = None) -> None:
    """In place of `fastpaths.note`: called with the same, it returns."""


def noting(note: Callable[..., None], run: Callable[[Tensor], Tensor], x_TD: Tensor) -> Callable[[], Tensor]:
    """`run(x_TD)` with decisions going to `note`: every arm sets and restores, so that all pay for that alike."""

    def arm() -> Tensor:
        real = fastpaths.note
        fastpaths.note = note
        try:
            return run(x_TD)
        finally:
            fastpaths.note = real

    return arm


def lines(costs: Sequence[Cost]) -> str:
    """One line a backend: medians, and ratios within a round with their 95 % intervals."""

    def text(ratio: timing.Timing) -> str:
        return f"{ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"

    head = f"{'':<10} {'decisions':>9} {'ms':>8}  {'over an empty function':<24}  over itself"
    return "\n".join(
        [head]
        + [
            f"{c.backend:<10} {c.decisions:>9} {c.ms.median:>8.3f}  {text(c.over_nothing):<24}  {text(c.over_itself)}"
            for c in costs
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.jobs.record_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="10B_2B/32", help="default 10B_2B/32")
    parser.add_argument("--tokens", type=int, default=48, help="times K a multiple of the experts (default 48)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds that every arm runs in turn (default 40)")
    args = parser.parse_args()
    facts = timing.environment(torch.device("cpu"))
    print("  ".join(f"{name} {fact}" for name, fact in facts.items()))
    print(f"{args.preset}, T {args.tokens}, forward\n{lines(measure(args.preset, args.tokens, args.rounds))}")


if __name__ == "__main__":
    main()
