"""A layer over real ranks, timed: kinds of splits, phases with waiting told from transfer, beside plain collectives.

    torchrun --nproc-per-node 4 -m moe_lab bench layer --preset 10B_2B --ep 2 --json ranks.json
    python -m moe_lab.jobs.ranks_bench --ranks 2 --preset 10B_2B/8 --tokens 1024

Every rank holds its own tokens. Routing is given, not computed, so that all kinds of splits see the same: normal
logits with a random offset an expert ("skewed"), popularity as 1 / rank ("zipf"), or the shipped model's ("trace",
which brings its own 32 experts and K 4). Forward runs without gradients; backward is of mean(y^2) in float32. The
router and shared experts are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from moe_lab.jobs.options import new_file
from moe_lab.jobs.ranks_inputs import KINDS, Settings, all_settings
from moe_lab.jobs.ranks_measure import RankResult, measure
from moe_lab.jobs.ranks_table import Row, describe, gather_rows, save
from moe_lab.parallel.ranks import RankPool, choose_backend
from moe_lab.study.timing import environment

DEFAULTS: dict[str, Any] = {"ep": None, "kinds": list(KINDS), "routing": ["skewed"], "iterations": 100}


def add_arguments(parser: Any) -> None:
    """Options of their own of a bench over ranks."""
    parser.add_argument("--ep", type=int, help="ranks that share the experts (default all), the rest data parallel")
    parser.add_argument("--kinds", nargs="+", help=f"of {', '.join(KINDS)} (default all)")
    parser.add_argument("--routing", nargs="+", help="of skewed (default), zipf, trace")
    parser.add_argument("--iterations", type=int, help="of each arm (default 100)")
    parser.set_defaults(**DEFAULTS)


def refuse_options(args: argparse.Namespace) -> None:
    """`ValueError` for options of many ranks, which one process would not look at."""
    given = [name for name, default in DEFAULTS.items() if getattr(args, name) != default]
    if given:
        raise ValueError(
            f"{', '.join(given)}: for many ranks, start with torchrun --nproc-per-node N -m moe_lab bench layer"
        )


def settings_of(args: argparse.Namespace) -> list[Settings]:
    """All that the options ask for."""
    how = {"tokens": args.tokens, "dtype": args.dtype, "iterations": args.iterations, "ep": args.ep}
    return all_settings(args.preset or ["10B_2B"], args.routing, args.kinds, **how)


def run(call: Callable[[Settings], Sequence[RankResult] | None], work: Sequence[Settings], out: Path | None) -> None:
    """Measure everything, print a table a layer. Interrupted, the tables and the file hold what is done.

    `call` gives the results of all ranks on the rank that reports, None on the others.
    """
    rows: list[Row] = []
    try:
        for settings in tqdm(work, desc="bench", unit="arm", file=sys.stderr, delay=2, disable=None):
            by_rank = call(settings)
            if by_rank is None:
                continue
            rows.append(gather_rows(settings, by_rank))
            if out is not None:
                device = torch.device("cuda" if choose_backend("auto", len(by_rank)) == "nccl" else "cpu")
                save(out, environment(device), rows)
    finally:
        for name in dict.fromkeys(row.layer for row in rows):
            print(describe(name, [row for row in rows if row.layer == name]), flush=True)


def main_under_torchrun(args: argparse.Namespace) -> None:
    """On ranks that torchrun started: rank 0 reports."""
    backend = choose_backend("auto", int(os.environ["LOCAL_WORLD_SIZE"]))
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)

    def call(settings: Settings) -> Sequence[RankResult] | None:
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, measure(settings))
        return results if dist.get_rank() == 0 else None

    run(call, settings_of(args), args.json)
    dist.barrier()  # without it gloo now and then aborts at exit
    dist.destroy_process_group()


def main() -> None:
    """On a pool of ranks of this machine."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.jobs.ranks_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", action="append", help="repeatable, such as 10B_2B/8 (default 10B_2B)")
    parser.add_argument("--tokens", type=int, help="tokens a rank (default 16384)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=new_file, help="also write the numbers, with the environment, here")
    add_arguments(parser)
    args = parser.parse_args()
    work = settings_of(args)
    with RankPool(args.ranks, timeout=900.0) as pool:
        run(lambda settings: pool.run(measure, settings), work, args.json)


if __name__ == "__main__":
    from moe_lab.jobs import ranks_bench  # ranks import functions by module, and cannot import __main__

    ranks_bench.main()
