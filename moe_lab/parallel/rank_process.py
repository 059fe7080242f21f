"""The processes behind a `RankPool`: what one rank does all its life, and all ranks of one start as one thing.

A rank joins the process group, then answers one call after another over its pipe. It ends when its owner does.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

PR_SET_PDEATHSIG, M_TRIM_THRESHOLD, M_MMAP_MAX = 1, -1, -4  # of sys/prctl.h and malloc.h


def _end_with(life: Connection) -> None:
    """Runs in a thread of a rank: nothing is ever sent, the pipe closes when the owner is gone."""
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def rank_main(
    pipe: Connection, life: Connection, rank: int, size: int, backend: str, store: str, timeout: float, threads: int
) -> None:
    """The process of one rank: join the group, then answer calls until the owner is gone."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Keep freed memory: fresh pages for every exchanged buffer cost more than copying the rows.
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the owner, who then kills
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)

    def join() -> None:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )

    if _answer(pipe, join):
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                return
            _answer(pipe, partial(_call, message))


def _call(message: bytes) -> Any:
    function, args, kwargs = pickle.loads(message)
    return function(*args, **kwargs)


def _answer(pipe: Connection, work: Callable[[], Any]) -> bool:
    """Send (ok, pickled result or traceback, what was printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            ok, value = True, pickle.dumps(work())
        except BaseException:
            ok, value = False, traceback.format_exc().encode()
    pipe.send((ok, value, printed.getvalue()))
    return ok


class Ranks:
    """The processes of one start."""

    def __init__(self, size: int, backend: str, timeout: float, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", __name__])
        # Rendezvous through a file without a name: fresh for each start, and gone with this process.
        self.store = os.memfd_create("moe_lab_rendezvous")
        path = f"/proc/{os.getpid()}/fd/{self.store}"
        self.pipes: list[Connection] = []
        self.lives: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            life, held = context.Pipe(duplex=False)
            process = context.Process(
                target=rank_main,
                args=(theirs, life, rank, size, backend, path, timeout, threads),
                name=f"moe_lab rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            life.close()
            self.pipes.append(ours)
            self.lives.append(held)
            self.processes.append(process)

    def idle(self) -> bool:
        """Whether every rank waits for work. A dead one's pipe is at its end before its exit is known."""
        return all(process.is_alive() for process in self.processes) and not any(pipe.poll() for pipe in self.pipes)

    def kill(self) -> None:
        """End every rank, now. Safe to call twice, and from another thread."""
        for process in self.processes:
            with contextlib.suppress(ValueError):
                process.kill()
        for process in self.processes:
            process.join(5)

    def release(self) -> None:
        """Kill, then give back pipes and the rendezvous."""
        self.kill()
        for connection in (*self.pipes, *self.lives):
            connection.close()
        if self.store >= 0:
            os.close(self.store)
            self.store = -1
