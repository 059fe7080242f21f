import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import rank_jobs
import torch

from moe_lab.parallel.ranks import RankError, RankPool, choose_backend

HERE = Path(__file__).parent
TIMES = pytest.mark.parametrize(
    "turn", [*range(3), *(pytest.param(turn, marks=pytest.mark.soak) for turn in range(3, 20))]
)


@pytest.fixture(scope="module")
def pool():
    with RankPool(3, backend="gloo") as pool:
        yield pool


def _runs(pid):
    try:
        return psutil.Process(pid).status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def gone(pids, seconds=20):
    """Whether all of these processes end."""
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > end:
            return alive
        time.sleep(0.02)
    return True


def test_every_rank_answers_in_order(pool):
    assert pool.run(rank_jobs.whoami) == [(0, 3, 1), (1, 3, 1), (2, 3, 1)]
    assert pool.run(rank_jobs.total, 2) == [12.0] * 3
    assert pool.run(rank_jobs.total, value=3) == [18.0] * 3


def test_calls_are_warm(pool):
    pool.start()
    pids = pool.pids
    for _ in range(5):
        pool.run(rank_jobs.whoami)
    assert pool.pids == pids


def test_rank_0_prints(pool, capsys):
    pool.run(rank_jobs.say, "hello")
    assert capsys.readouterr().out == "hello 0\n"


@TIMES
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (rank_jobs.fail_on, r"rank 1\] ArithmeticError: rank 1 cannot go on\n(?s:.*)rank 1 failed first:\nTraceback"),
        (rank_jobs.die_on, r"rank 1\] process died \(exit code -9\)\n(?s:.*)rank 1 failed first"),
        (rank_jobs.hang_on, r"\[ranks 0, 1, 2\] no answer within 0.5 s; killed"),
    ],
    ids=["raise", "die", "hang"],
)
def test_a_failing_rank_ends_all_and_the_pool_starts_again(pool, turn, function, message):
    pool.start()
    pids = pool.pids
    with pytest.raises(RankError, match=message):
        pool.run(function, 1, timeout=0.5 if function is rank_jobs.hang_on else 30.0)
    assert gone(pids) is True
    assert pool.pids == []
    assert pool.run(rank_jobs.total, 1) == [6.0] * 3


def test_results_that_cannot_be_sent_are_the_rank_s_error(pool):
    with pytest.raises(RankError, match=r"rank 0\] .*pickle"):
        pool.run(rank_jobs.unpicklable)


@TIMES
def test_ranks_that_died_between_calls_are_started_again(pool, turn):
    pool.start()
    rank = psutil.Process(pool.pids[2])
    rank.kill()
    rank.wait(20)  # gone, not a zombie: until the last of its threads ends, it still holds its pipe open
    assert pool.run(rank_jobs.total, 1) == [6.0] * 3


@TIMES
def test_cancel_works_on_a_hung_exchange(pool, turn):
    pool.start()
    pids = pool.pids
    timer = threading.Timer(0.2, pool.cancel)
    timer.start()
    with pytest.raises(RankError, match=r"cancelled after"):
        pool.run(rank_jobs.hang_on, 0, timeout=60.0)
    timer.join()
    assert gone(pids) is True


def test_threads_take_turns(pool):
    answers = []
    threads = [threading.Thread(target=lambda n=n: answers.append(pool.run(rank_jobs.total, n))) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [[6.0 * n] * 3 for n in range(1, 5)]


OWNER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
import rank_jobs
from moe_lab.parallel.ranks import RankPool
pool = RankPool(2, backend="gloo")
pool.start()
print("ready", flush=True)
pool.run(rank_jobs.hang_on, 0)
"""


@TIMES
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_nothing_outlives_its_owner(end, turn):
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=os.environ | {"PYTHONPATH": path},
        cwd=HERE.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout.readline() == "ready\n"
    pids = [child.pid for child in psutil.Process(owner.pid).children(recursive=True)]
    assert len(pids) >= 3  # the forkserver and two ranks at least
    time.sleep(0.1)
    owner.send_signal(end)
    _, error = owner.communicate(timeout=60.0)
    assert ("KeyboardInterrupt" in error) is (end == signal.SIGINT)
    assert gone(pids) is True


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankPool(0), "size=0 must be an integer >= 1"),
        (lambda: RankPool(2, threads=0), "threads=0 must be an integer >= 1"),
        (lambda: RankPool(2, timeout=0.0), "timeout=0.0 must be a positive number of seconds"),
        (lambda: RankPool(2, timeout=float("nan")), "timeout=nan must be"),
        (lambda: RankPool(2, backend="mpi"), "backend='mpi' is not known: choose one of 'auto', 'gloo', 'nccl'"),
        (lambda: RankPool(2).run(lambda: 1), "must live in a module that ranks can import"),
        (lambda: RankPool(2).run(rank_jobs.whoami, timeout=-1.0), "timeout=-1.0 must be a positive number"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_nccl_without_gpus_is_refused():
    with pytest.raises(ValueError, match="backend='nccl' needs a GPU for each of 2 ranks, here are 0: choose 'gloo'"):
        RankPool(2, backend="nccl")
    assert choose_backend("auto", 2) == "gloo"
