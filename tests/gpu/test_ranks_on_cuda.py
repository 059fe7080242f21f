"""Real ranks on NCCL, a GPU each: the pool, and layers spread over them. Needs two GPUs or more."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])

import cuda_jobs  # noqa: E402  (ranks import it by this name)

from moe_lab.parallel.ranks import RankError, RankPool  # noqa: E402
from parallel_cases import check, draw, one_rank  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SIZES = [size for size in (2, 4, 8) if size <= torch.cuda.device_count()]


@pytest.fixture(scope="module", params=SIZES)
def pool(request):
    with RankPool(request.param, timeout=120.0) as pool:
        yield pool


def total_of(pool):
    return float(sum(range(1, pool.size + 1)))


def test_the_pool_uses_nccl_and_stays_warm(pool):
    assert pool.run(cuda_jobs.total, 2) == [("nccl", 2 * total_of(pool))] * pool.size
    pids = pool.pids
    assert pool.run(cuda_jobs.total, 1) == [("nccl", total_of(pool))] * pool.size
    assert pool.pids == pids


def test_a_hung_collective_is_ended_and_the_pool_starts_again(pool):
    pool.start()
    pids = pool.pids
    with pytest.raises(RankError, match="no answer within 3 s; killed"):
        pool.run(cuda_jobs.hang_in_an_exchange, 1, timeout=3.0)
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < end, "a rank outlived its pool"
        time.sleep(0.05)
    assert pool.run(cuda_jobs.total, 1) == [("nccl", total_of(pool))] * pool.size


@pytest.mark.parametrize("collectives", ["functional", "c10d"])
def test_layers_over_ranks_equal_the_one_rank_layer(pool, collectives):
    seeds = list(range(20))
    for seed, real in zip(seeds, zip(*pool.run(cuda_jobs.run_cases, seeds, collectives))):
        case = draw(seed, (pool.size,))
        expected = one_rank(case)
        for name in ("out", "x", "gates"):
            got, exact = (torch.cat([r[name].flatten() for r in results]) for results in (real, expected))
            check(got, [exact], f"{case}: {name}")
        for name in real[0]:
            if not name.startswith("experts") and name not in ("out", "x", "gates"):
                check(sum(got[name] for got in real), [exact[name] for exact in expected], f"{case}: {name}")
            elif name.startswith("experts") and case.placement is None:
                whole = torch.cat([got[name] for got in real])
                check(whole, [sum(exact[name] for exact in expected)], f"{case}: {name}")


def test_fused_experts_over_ranks_are_as_exact_as_bfloat16_allows(pool):
    for over_ranks, one in pool.run(cuda_jobs.low_precision, 700):
        assert over_ranks <= 2 * one


def test_forced_balance_makes_two_exchanges_and_no_other_collective(pool):
    for kernels in pool.run(cuda_jobs.collectives_of_forced_balance, 96):
        assert len(kernels) == 2, kernels
