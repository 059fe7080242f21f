"""The record of decisions: which path ran, how often, and why. Off and free by default.

    with fastpaths.record() as r:
        moe(x)
    print(r)

A decision is noted where it is taken, by name, with a reason made of numbers. Notes are dropped at once while
nobody records and while a graph is being compiled, so that the record never changes what runs.
`MOE_LAB_FASTPATHS=1` records the whole process and prints on exit, `rank0` only on rank 0.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

NAMES = (
    "batched_no_grad_experts",
    "buffered_dispatch_combine",
    "cached_w13_hit",
    "cached_w13_miss",
    "cached_w2_t_hit",
    "cached_w2_t_miss",
    "direct_equal_split_dispatch",
    "direct_equal_split_skip",
    "equal_a2a_padding_combine",
    "equal_a2a_padding_dispatch",
    "equal_count_permute",
    "equal_count_unpermute",
    "experts_backend",
    "force_load_balance_dispatch",
    "fused_dispatch_combine",
    "host_sync",
    "index_permute",
    "index_unpermute",
    "normal_equal_a2a_padding_adaptive_dispatch",
    "normal_equal_a2a_padding_adaptive_skip",
    "normal_equal_a2a_padding_combine",
    "normal_equal_a2a_padding_dispatch",
    "padded_rows",
    "padding_overhead_bp",
    "scatter_add_autograd_or_alias",
    "scatter_add_inplace_no_grad",
    "score_after_experts",
    "score_after_experts_bf16",
    "score_before_experts",
    "segment_cat_permute",
    "segment_cat_unpermute",
)


@dataclass
class Entry:
    """One decision: how often it was taken, and the reasons given with their counts.

    `total`, `low` and `high` sum up the values noted with it, where a decision has one (padded rows, overhead).
    """

    count: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    total: int = 0
    low: int | None = None
    high: int | None = None


@dataclass
class Record:
    """Decisions by name, in the order first taken. `str(record)` is a table."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def note(self, name: str, reason: str, value: int | None = None) -> None:
        entry = self.entries.setdefault(name, Entry())
        entry.count += 1
        entry.reasons[reason] = entry.reasons.get(reason, 0) + 1
        if value is not None:
            entry.total += value
            entry.low = value if entry.low is None else min(entry.low, value)
            entry.high = value if entry.high is None else max(entry.high, value)

    def count(self, name: str) -> int:
        """How often `name` was decided, 0 if never. `ValueError` for a name nothing ever notes."""
        if name not in NAMES:
            raise ValueError(f"fast path {name!r} is not known: choose one of {', '.join(NAMES)}")
        return self.entries[name].count if name in self.entries else 0

    def __str__(self) -> str:
        """A line a reason; under a decision with values their sum, smallest and largest."""
        if not self.entries:
            return "no decisions recorded"
        width = max(len(name) for name in self.entries)
        lines = []
        for name, entry in self.entries.items():
            for i, (reason, count) in enumerate(entry.reasons.items()):
                lines.append(f"{name if i == 0 else '':<{width}}  {count:>6}  {reason}")
            if entry.low is not None:
                lines.append(f"{'':<{width}}          sum {entry.total:,}, {entry.low:,} to {entry.high:,}")
        return "\n".join(lines)


_recorders: list[Record] = []


def note(name: str, reason: str | Callable[[], str], value: int | None = None) -> None:
    """Count decision `name` with its reason, and a value where it has one, on every active record.

    Pass the reason as a function when forming it costs anything: it is called only while recording.
    """
    if not _recorders or torch.compiler.is_compiling():
        return
    if name not in NAMES:
        raise ValueError(f"fast path {name!r} is not known: choose one of {', '.join(NAMES)}")
    text = reason() if callable(reason) else reason
    for recorder in _recorders:
        recorder.note(name, text, value)


@contextmanager
def record() -> Iterator[Record]:
    """Record the decisions taken inside the block, in every thread (autograd's included)."""
    recorder = Record()
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        # By identity: two records that hold the same decisions are equal.
        del _recorders[next(i for i, r in enumerate(_recorders) if r is recorder)]


def _record_process() -> None:
    wish = os.environ.get("MOE_LAB_FASTPATHS", "")
    if wish in ("", "0"):
        return
    if wish not in ("1", "rank0", "all"):
        raise ValueError(f"MOE_LAB_FASTPATHS={wish!r} is not known: choose 0, 1, rank0 or all")
    rank = os.environ.get("RANK", "0")
    if wish == "all" or rank == "0":
        recorder = Record()
        _recorders.append(recorder)
        atexit.register(lambda: print(f"moe_lab fast paths, rank {rank}\n{recorder}"))


_record_process()
