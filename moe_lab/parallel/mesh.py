"""The exchange between processes: torch.distributed, on gloo or NCCL, with gradients.

Where a gradient flows an all-to-all is two nodes of the autograd graph, one that starts it and one that waits. What
runs between the two overlaps with it, and in backward the order turns round: the waiting node starts the gradients'
exchange, whatever ran in between runs its backward, the starting node waits. (The functional collectives' own autograd
waits at once.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab import contracts, fastpaths
from moe_lab.config import check_choice
from moe_lab.layer.exchange import Log

Wait = Callable[[], Tensor]


class MeshExchange:
    """The ranks of a process group. `collectives`: by which of PyTorch's interfaces rows move, functional or c10d."""

    def __init__(self, group: dist.ProcessGroup, *, collectives: str = "functional") -> None:
        check_choice("collectives", collectives, ("functional", "c10d"))
        self.group, self.functional = group, collectives == "functional"
        self.rank, self.size = group.rank(), group.size()
        self.log = Log()

    def all_gather(self, counts_P: Tensor) -> _Ready:
        """(P,) integers of each rank -> (R, P), on the CPU."""
        if counts_P.device.type != "cpu":
            fastpaths.note("host_sync", "splits are read from the gathered counts")
        # By c10d the name of this one depends on PyTorch's version, and its list of tensors costs NCCL copies.
        flat = torch.ops._c10d_functional.all_gather_into_tensor(counts_P, self.size, self.group.group_name)
        return _Ready(lambda: torch.ops._c10d_functional.wait_tensor(flat).view(self.size, -1).cpu())

    def all_reduce(self, counts_E: Tensor) -> _Ready:
        """The sum over ranks."""
        total_E = counts_E.clone()
        work = dist.all_reduce(total_E, group=self.group, async_op=True)
        return _Ready(lambda: _done(work, total_E))

    def all_to_all(
        self, rows_SD: Tensor, send: list[int] | None, receive: list[int] | None, *, overlap: bool = False
    ) -> _Flight | _Ready:
        """Rows to and from each rank, rank by rank; None for even splits. Gradients go the other way."""
        self.log.note(rows_SD, send, self.size)
        if torch.is_grad_enabled() and rows_SD.requires_grad:
            return _Flight(self, rows_SD, send, receive, overlap)
        return _Ready(self.start(rows_SD, send, receive, overlap)[1])

    def start(
        self, rows_SD: Tensor, send: list[int] | None, receive: list[int] | None, overlap: bool
    ) -> tuple[Tensor, Wait]:
        """Launch one all-to-all: the buffer that rows are arriving in, and what waits for them.

        Without `overlap` by c10d there is nothing to wait for: NCCL then runs it among this stream's kernels, which
        spares two streams the waiting for each other.
        """
        rows_SD = rows_SD.contiguous()
        contracts.check_splits(rows_SD.shape[0], send, receive, self.size)
        num_received = len(rows_SD) if receive is None else sum(receive)
        if self.functional:
            even = [len(rows_SD) // self.size] * self.size
            out_SD = torch.ops._c10d_functional.all_to_all_single(
                rows_SD, receive or even, send or even, self.group.group_name
            )
            return out_SD, lambda: _kept(torch.ops._c10d_functional.wait_tensor(out_SD), rows_SD)
        out_SD = rows_SD.new_empty(num_received, rows_SD.shape[1])
        if not overlap:
            dist.all_to_all_single(out_SD, rows_SD, receive, send, group=self.group)
            return out_SD, lambda: out_SD
        work = self.post(out_SD, rows_SD, receive, send)
        return out_SD, lambda: _kept(_done(work, out_SD), rows_SD)

    def post(self, out_SD: Tensor, rows_SD: Tensor, receive: list[int] | None, send: list[int] | None) -> Any:
        """Start one all-to-all by c10d; the work that says when it is done."""
        return dist.all_to_all_single(out_SD, rows_SD, receive, send, group=self.group, async_op=True)


def _done(work: Any, result: Tensor) -> Tensor:
    work.wait()
    return result


def _kept(result: Tensor, sent: Tensor) -> Tensor:
    """The result; what was sent lives until now because the caller's closure held it."""
    return result


class _Ready:
    """A pending result that nothing is differentiated through."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self.wait = wait


class _Flight:
    """One all-to-all under way, and in backward the one that brings its gradients back."""

    def __init__(
        self, exchange: MeshExchange, rows: Tensor, send: list[int] | None, receive: list[int] | None, overlap: bool
    ) -> None:
        self.exchange, self.send, self.receive, self.overlap = exchange, send, receive, overlap
        self.landed: Wait
        self.returned: Wait
        self.rows = _Start.apply(rows, self)

    def wait(self) -> Tensor:
        """Rows that have arrived."""
        return _Finish.apply(self.rows, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        out, flight.landed = flight.exchange.start(rows, flight.send, flight.receive, flight.overlap)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        returned = ctx.flight.returned()
        del ctx.flight.returned  # what was sent is free as soon as it has arrived
        return returned, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        landed = flight.landed()
        del flight.landed, flight.rows
        return landed.view_as(landed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.exchange.log.note(grad, flight.receive, flight.exchange.size)
        _, flight.returned = flight.exchange.start(grad, flight.receive, flight.send, flight.overlap)
        return grad, None  # of the right shape; what `_Start` passes on is the buffer now arriving
