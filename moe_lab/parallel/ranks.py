"""Real ranks from a notebook: processes that stay warm, answer or are killed, and never outlive their owner.

    with RankPool(4) as pool:
        pool.run(function, 3, name="x")       # function(3, name="x") on every rank; a list of results, by rank

Rank functions live in modules, see an initialised default process group, and return summaries rather than large
tensors. The same functions run under torchrun and srun with `python -m moe_lab.parallel.launch`.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from moe_lab.config import check_choice, check_int
from moe_lab.parallel.rank_process import Ranks

GRACE = 0.3  # seconds in which other ranks may still report, once one has failed
START_TIMEOUT = 120.0
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
        self._ranks: Ranks | None = None
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
            self._ranks = Ranks(self.size, self.backend, self.timeout, self.threads)
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
