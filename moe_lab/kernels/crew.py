"""OpenMP's threads, given pieces of work too small to be split themselves.

A product of 170 rows on two threads waits for the slower half, three times an expert; two experts at a time, on a
thread each, wait once a layer. The threads are those that PyTorch's own operations run on: others would have to share
the cores with these, which spin for milliseconds after each operation. What is computed within such a region runs on
one thread, so its bits depend neither on how many there are nor on who took which piece.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def can_share() -> bool:
    """Whether there are several threads, and the OpenMP here is GNU's, which can be called from Python."""
    return torch.get_num_threads() > 1 and _parallel is not None


def share(work: Callable[[Iterator[Piece]], None], pieces: Sequence[Piece]) -> None:
    """Run `work` on every thread; it is given an iterator, and each piece comes out of one of them.

    Pieces are taken in the order given: put large ones first. Autograd does not record. An error in any thread is
    raised here, after all have ended. Without `can_share`, on this thread alone.
    """
    if not can_share():
        work(iter(pieces))
        return
    queue, errors = deque(pieces), list[BaseException]()
    inference = torch.is_inference_mode_enabled()

    def region(_: int | None) -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                work(_taken(queue))
        except BaseException as error:  # nothing may leave a callback
            queue.clear()
            errors.append(error)

    assert _parallel is not None
    _parallel(_REGION(region), None, min(torch.get_num_threads(), len(pieces)), 0)
    if errors:
        raise errors[0]


def _taken(queue: deque[Piece]) -> Iterator[Piece]:
    while True:
        try:
            piece = queue.popleft()  # one thread gets it
        except IndexError:
            return
        yield piece


def _find() -> Callable[..., None] | None:
    """`GOMP_parallel(function, data, threads, flags)`: what a compiler makes of `#pragma omp parallel`."""
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    found.restype = None
    return found


_parallel = _find()
