"""How long ranks take to start and to answer: `python -m moe_lab.jobs.pool_bench --ranks 4`."""

from __future__ import annotations

import argparse
import statistics
import time

from moe_lab.jobs.exchange_table import cpu_model
from moe_lab.parallel.ranks import RankPool


def answer() -> None:
    """Rank function: nothing, to see what a call costs."""


def measure(ranks: int, calls: int = 200, starts: int = 5) -> dict[str, float]:
    """Seconds of the first start of this process and of later ones (median), and of a warm call (median, p99)."""
    cold = []
    for _ in range(1 + starts):
        with RankPool(ranks, backend="gloo") as pool:
            began = time.perf_counter()
            pool.run(answer)
            cold.append(time.perf_counter() - began)
            warm = []
            for _ in range(calls):
                began = time.perf_counter()
                pool.run(answer)
                warm.append(time.perf_counter() - began)
    p99 = statistics.quantiles(warm, n=100)[-1]
    return {"first": cold[0], "later": statistics.median(cold[1:]), "warm": statistics.median(warm), "warm_p99": p99}


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    found = measure(args.ranks)
    print(
        f"{args.ranks} gloo ranks on {cpu_model()}: first start {found['first']:.2f} s, later {found['later']:.2f} s, "
        f"warm call {1e3 * found['warm']:.2f} ms (p99 {1e3 * found['warm_p99']:.2f})"
    )


if __name__ == "__main__":
    from moe_lab.jobs import pool_bench  # ranks import functions by name, and not from here

    pool_bench.main()
