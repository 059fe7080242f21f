"""Real ranks from a notebook: processes that stay warm, answer or are killed, and never outlive their owner.

    with RankPool(4) as pool:
        pool.run(function, 3, name="x")       # function(3, name="x") on every rank; a list of results, by rank

Rank functions live in modules, see an initialised default process group, and return summaries rather than large
tensors. The same functions run under torchrun and srun with `python -m moe_lab.parallel.launch`.
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
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from moe_lab.config import check_choice, check_int

GRACE = 0.3  # seconds in which other ranks may still report, once one has failed
START_TIMEOUT = 120.0
PR_SET_PDEATHSIG, M_TRIM_THRESHOLD, M_MMAP_MAX = 1, -1, -4  # of sys/prctl.h and malloc.h
DIED = "process died"


class RankError(RuntimeError):
    """Ranks failed, died, or did not answer in time; the message names them, with the first one's traceback."""


def choose_backend(backend: str, num_ranks: int) -> str:
    """`auto` is NCCL where each rank of this machine has a GPU, else gloo. `ValueError` for NCCL without."""
    check_choice("backend", backend, ("auto", "gloo", "nccl"))
    gpus = torch.cuda.device_count()
    if backend == "nccl" and gpus < num_ranks:
        raise ValueError(f"backend='nccl' needs a GPU for each of {num_ranks} ranks, here are {gpus}: choose 'gloo'")
    return ("nccl" if gpus >= num_ranks else "gloo") if backend == "auto" else backend


def _end_with(life: Connection) -> None:
    """Runs in a thread of a rank: nothing is ever sent, the pipe closes when the owner is gone."""
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def _rank_main(
    pipe: Connection, life: Connection, rank: int, size: int, backend: str, store: str, timeout: float, threads: int
) -> None:
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


class _Ranks:
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
                target=_rank_main,
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


class RankPool:
    """`size` ranks on this machine, started at first use, kept warm between calls, started again after a failure.

    `backend`: "auto" is NCCL where each rank has a GPU, else gloo. `timeout`: seconds a call may take unless it
    says otherwise. `threads`: of PyTorch, in each rank. Calls from several threads take turns.
    """

    def __init__(self, size: int, *, backend: str = "auto", timeout: float = 60.0, threads: int = 1) -> None:
        check_int("size", size, 1)
        check_int("threads", threads, 1)
        _check_timeout(timeout)
        self.size, self.timeout, self.threads = size, timeout, threads
        self.backend = choose_backend(backend, size)
        self._lock = threading.RLock()
        self._ranks: _Ranks | None = None
        self._cancelled = False

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank; none before the first use and after a failure."""
        return [] if self._ranks is None else [process.pid for process in self._ranks.processes]

    def start(self) -> None:
        """Start the ranks now, unless they are running. `RankError` if they cannot."""
        with self._lock:
            if self._ranks is not None and self._ranks.idle():
                return
            self.close()
            self._ranks = _Ranks(self.size, self.backend, self.timeout, self.threads)
            weakref.finalize(self, self._ranks.release)
            self._collect(START_TIMEOUT)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on every rank: its results, by rank. What rank 0 prints is printed.

        `RankError` when a rank raises, dies or is late: then all are killed, and started again at the next use.
        `ValueError` for a function of `__main__` or a lambda, which a rank cannot import.
        """
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(f"function={function!r} must live in a module that ranks can import")
        if timeout is not None:
            _check_timeout(timeout)
        message = pickle.dumps((function, args, kwargs))
        with self._lock:
            self._cancelled = False
            self.start()
            assert self._ranks is not None
            for pipe in self._ranks.pipes:
                with contextlib.suppress(OSError):  # a rank that died: its pipe says so when read
                    pipe.send_bytes(message)
            return self._collect(self.timeout if timeout is None else timeout)

    def cancel(self) -> None:
        """Kill the ranks of a call under way in another thread, which then raises `RankError`."""
        self._cancelled = True
        if (ranks := self._ranks) is not None:
            ranks.kill()

    def close(self) -> None:
        """End the ranks. The pool may be used again."""
        with self._lock:
            if self._ranks is not None:
                self._ranks.release()
                self._ranks = None

    def _collect(self, timeout: float) -> list[Any]:
        """One answer of each rank, or `RankError`, whatever happens with nothing left running or half read."""
        assert self._ranks is not None
        ranks, start = self._ranks, time.monotonic()
        waiting = {pipe: rank for rank, pipe in enumerate(ranks.pipes)}
        results, errors, end = {}, {}, start + timeout
        try:
            while waiting and (left := end - time.monotonic()) > 0:
                for pipe in wait(list(waiting), left):
                    rank = waiting.pop(pipe)  # type: ignore[call-overload]
                    ok, value, printed = _receive(pipe, ranks.processes[rank])  # type: ignore[arg-type]
                    if ok:
                        results[rank] = pickle.loads(value)
                    else:
                        errors[rank] = value.decode()
                        end = min(end, time.monotonic() + GRACE)
                    if rank == 0 and printed:
                        print(printed, end="")
        except BaseException:
            self.close()
            raise
        if not errors and not waiting:
            return [results[rank] for rank in range(self.size)]
        self.close()
        if self._cancelled:
            raise RankError(f"cancelled after {time.monotonic() - start:.1f} s; all ranks killed")
        raise RankError(_explain(errors, sorted(waiting.values()), timeout))


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds")


def _receive(pipe: Connection, process: Any) -> tuple[bool, bytes, str]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join(1)
        return False, f"{DIED} (exit code {process.exitcode})".encode(), ""


def _explain(errors: dict[int, str], silent: list[int], timeout: float) -> str:
    """One line a rank, then in full the failure that caused the others."""
    lines = [f"[rank {rank}] {error.strip().splitlines()[-1]}" for rank, error in sorted(errors.items())]
    if silent:
        why = "killed after the failure" if errors else f"no answer within {timeout:g} s; killed"
        lines.append(f"[ranks {', '.join(map(str, silent))}] {why}")
    if errors:
        # A dead rank makes its peers fail, and their reports may come first.
        rank, first = next((item for item in errors.items() if item[1].startswith(DIED)), next(iter(errors.items())))
        lines.append(f"\nrank {rank} failed first:\n{first.strip()}")
    return "\n".join(lines)
