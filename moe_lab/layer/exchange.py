"""Where rows move between ranks: what a dispatcher asks of it, and how a program that waits is run.

A dispatcher is written as a program that yields what it waits for (`received = yield exchange.all_to_all(...)`).
On a real rank `finish` waits each time. Several programs of one process can be run in lock step instead, each to
its next wait, and so be ranks of one mesh (`moe_lab.parallel.virtual`): the same code under both.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Pending(Protocol[T_co]):
    """Something under way."""

    def wait(self) -> T_co:
        """Block until it is done, and give its result."""


Program = Generator[Pending[Any], Any, T]


def finish(program: Program[T]) -> T:
    """Run a program on its own: wait for whatever it waits for, return what it returns."""
    try:
        pending = next(program)
        while True:
            pending = program.send(pending.wait())
    except StopIteration as stop:
        return stop.value


class Sent(NamedTuple):
    """One all-to-all as a rank saw it: rows to each rank (its own included) and bytes of a row."""

    rows_R: tuple[int, ...]
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes handed to the exchange, those to the rank itself included."""
        return sum(self.rows_R) * self.row_bytes


class Log:
    """What went through an exchange while someone watched; nothing is kept otherwise."""

    def __init__(self) -> None:
        self._watchers: list[list[Sent]] = []

    @contextmanager
    def watch(self) -> Iterator[list[Sent]]:
        """A list that every all-to-all inside the block is added to, those of gradients too."""
        sent: list[Sent] = []
        self._watchers.append(sent)
        try:
            yield sent
        finally:
            self._watchers = [watcher for watcher in self._watchers if watcher is not sent]

    def note(self, rows_SD: Tensor, send: list[int] | None, size: int) -> None:
        """Count one all-to-all, whose `send` splits are None when even."""
        if self._watchers:
            splits = [len(rows_SD) // size] * size if send is None else send
            entry = Sent(tuple(splits), rows_SD.shape[1] * rows_SD.element_size())
            for watcher in self._watchers:
                watcher.append(entry)


@runtime_checkable
class Exchange(Protocol):
    """A rank's way to the other ranks of its mesh. Calls post; results come from `wait`."""

    rank: int
    size: int
    log: Log

    def all_gather(self, counts_P: Tensor) -> Pending[Tensor]:
        """(P,) integers of each rank -> (R, P), on the CPU."""

    def all_reduce(self, counts_E: Tensor) -> Pending[Tensor]:
        """The sum over ranks."""

    def all_to_all(
        self, rows_SD: Tensor, send: list[int] | None, receive: list[int] | None, *, overlap: bool = False
    ) -> Pending[Tensor]:
        """Rows to and from each rank, rank by rank; None for even splits. Gradients go the other way.

        `overlap`: other work comes before `wait`, and runs while the rows travel. Without it rows may travel at once.
        """
