"""When each phase of a layer ran: spans between two stamps of a clock. Off and free by default.

    with phases.record() as spans:
        moe(x)
    spans[0].name, spans[0].end - spans[0].start

Code says `with phases.phase("pack"):` around what it does. While nobody records, and while a graph is being
compiled, that is an empty block, so that the record never changes what runs. Exchanges between ranks are not phases
but flights (`moe_lab.study.timeline`); backward has no phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

NAMES = (
    "router",
    "plan",
    "pack",
    "score",
    "unpack",
    "experts",
    "unpermute",
    "shared experts",
    "combine",
)


class Span(NamedTuple):
    """One phase; `start` and `end` are what the clock gave, seconds unless the recorder says otherwise."""

    name: str
    start: Any
    end: Any


class _Recorder(NamedTuple):
    spans: list[Span]
    clock: Callable[[], Any]


_recorders: list[_Recorder] = []


def phase(name: str) -> AbstractContextManager[None]:
    """The block inside is phase `name`, one of `NAMES`, on every active record."""
    if not _recorders or torch.compiler.is_compiling():
        return nullcontext()
    return _stamped(name)


@contextmanager
def _stamped(name: str) -> Iterator[None]:
    if name not in NAMES:
        raise ValueError(f"phase {name!r} is not known: choose one of {', '.join(NAMES)}")
    recorders = list(_recorders)
    starts = [recorder.clock() for recorder in recorders]
    try:
        yield
    finally:
        for recorder, start in zip(recorders, starts):
            recorder.spans.append(Span(name, start, recorder.clock()))


@contextmanager
def record(clock: Callable[[], Any] = time.monotonic) -> Iterator[list[Span]]:
    """A list that every phase inside the block is added to when it ends.

    `clock` makes a stamp: by default seconds, the same for all processes of one host; on CUDA it may record an
    event and return it.
    """
    recorder = _Recorder([], clock)
    _recorders.append(recorder)
    try:
        yield recorder.spans
    finally:
        # By identity: two records that hold the same spans are equal.
        del _recorders[next(i for i, r in enumerate(_recorders) if r is recorder)]
