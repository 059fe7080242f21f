"""When ranks meet: what each spent waiting for the last to arrive, and what rows took to travel.

For one exchange between ranks, with stamps of a clock that all of them share (monotonic time of one host):
wait = latest arrival - own arrival, transfer = own end - latest arrival. No barrier is needed, and none is added
unless asked for. While an exchange is under way a rank may compute: what it then does not notice of the exchange is
hidden, the rest exposed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from moe_lab.parallel.mesh import MeshExchange, Wait
from moe_lab.phases import Span

EXCHANGES = ("dispatch", "combine", "combine gradients", "dispatch gradients")


class Flight(NamedTuple):
    """One exchange as a rank saw it, in seconds: it posted its rows, asked for the result, and had it."""

    name: str
    arrival: float
    asked: float
    end: float


class Parts(NamedTuple):
    """One rank's share of an exchange, in seconds: wait + transfer = exposed + hidden = end - arrival."""

    wait: float
    transfer: float
    exposed: float
    hidden: float


class RankSteps(NamedTuple):
    """What one rank recorded of one step."""

    spans: tuple[Span, ...]
    flights: tuple[Flight, ...]


def parts(flights: Sequence[Flight]) -> list[Parts]:
    """Wait and transfer, exposed and hidden, of one exchange on each of its ranks.

    Hand-checked: arrivals 0 and 3, asked at 1 and 3, ends 5 and 6: rank 0 waits 3 and transfers 2, of which 1 is
    hidden and 4 exposed; rank 1 waits 0 and transfers 3, all exposed. An exchange cannot end before all arrived:
    `ValueError` then, since clocks differ. `ValueError` without ranks, or for flights of several exchanges.
    """
    if len({flight.name for flight in flights}) != 1:
        raise ValueError(f"flights of {sorted({f.name for f in flights})}: must be one exchange, seen by each rank")
    latest = max(flight.arrival for flight in flights)
    if any(flight.end < latest for flight in flights):
        raise ValueError(f"{flights[0].name} ends on a rank before all arrived: stamps are not of one clock")
    return [
        Parts(latest - f.arrival, f.end - latest, max(0.0, f.end - f.asked), min(f.asked, f.end) - f.arrival)
        for f in flights
    ]


def by_exchange(steps: Sequence[RankSteps]) -> dict[str, list[Parts]]:
    """The parts of every exchange of one step, by name, from what each rank recorded."""
    return {flights[0].name: parts(flights) for flights in zip(*(step.flights for step in steps), strict=True)}


class TimedExchange(MeshExchange):
    """An exchange that stamps what goes through it, forward and backward, in place of the one that it wraps.

    `overlap=False` waits for each exchange at once. `barrier=True` makes ranks meet before each: nobody then waits
    in the exchange, and the whole step is perturbed. Runs by c10d collectives, whose end is known when it happens.
    """

    def __init__(self, exchange: MeshExchange, *, overlap: bool = True, barrier: bool = False) -> None:
        super().__init__(exchange.group, collectives="c10d")
        self.overlap, self.barrier = overlap, barrier
        self.flights: list[Flight] = []
        self._started = 0
        self._ended: list[float] = []

    def all_gather(self, counts_P: Tensor) -> Any:
        """As an exchange named "count"."""
        arrival = self._arrive()
        return _Timed(self, "count", arrival, super().all_gather(counts_P).wait)

    def start(
        self, rows_SD: Tensor, send: list[int] | None, receive: list[int] | None, overlap: bool
    ) -> tuple[Tensor, Wait]:
        """As one of `EXCHANGES`, in their order; all the same whatever `overlap` is: an end is known by asking."""
        name = EXCHANGES[self._started % len(EXCHANGES)]
        self._started += 1
        arrival = self._arrive()
        out_SD, wait = super().start(rows_SD, send, receive, overlap=True)
        timed = _Timed(self, name, arrival, wait, self._ended)
        if self.overlap:
            return out_SD, timed.wait
        landed_SD = timed.wait(asked=arrival)
        return out_SD, lambda: landed_SD

    def post(self, out_SD: Tensor, rows_SD: Tensor, receive: list[int] | None, send: list[int] | None) -> Any:
        """Ask to be told of the end when it comes: the rank may be computing."""
        work = super().post(out_SD, rows_SD, receive, send)
        ended = self._ended = []
        work.get_future().add_done_callback(lambda _: ended.append(time.monotonic()))
        return work

    def _arrive(self) -> float:
        if self.barrier:
            dist.barrier(self.group)
        return time.monotonic()


class _Timed:
    def __init__(
        self, exchange: TimedExchange, name: str, arrival: float, wait: Wait, ended: list[float] | None = None
    ) -> None:
        self.exchange, self.name, self.arrival, self.land, self.ended = exchange, name, arrival, wait, ended

    def wait(self, asked: float | None = None) -> Tensor:
        asked = time.monotonic() if asked is None else asked
        landed = self.land()
        end = self.ended[0] if self.ended else time.monotonic()
        self.exchange.flights.append(Flight(self.name, self.arrival, asked, end))
        return landed
