"""Time our backends over tokens x experts x top-k x skew, keeping every round, to see where which one wins.

    moe-lab sweep --preset 10B_2B/8 --dtype float32 --json sweep.json
    moe-lab sweep --preset 10B_2B --device cuda --tokens 256 1024 4096 16384 --json sweep.json

The file is written after each point, and a second run with it goes on where the first stopped. A CPU's crossover says
nothing of a GPU's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_lab.config import MoEConfig, check_choice, check_int, check_threshold
from moe_lab.jobs.bench import checked_device
from moe_lab.jobs.bench_inputs import layer_config, make_inputs
from moe_lab.jobs.bench_run import Settings, fields_of, timed
from moe_lab.jobs.contests import BACKENDS, hold
from moe_lab.jobs.options import new_file
from moe_lab.study import timing
from moe_lab.study.crossover import Point, point_of
from moe_lab.study.measurements import DIRECTIONS, Measurement, Measurements, load

CANDIDATES = tuple(name for name in BACKENDS if name != "auto")
DIGITS = 4  # of a stored number: what clocks are worth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab sweep`."""
    parser.add_argument("--json", type=new_file, required=True, help="the table to write, or to go on with")
    parser.add_argument("--preset", default="10B_2B/8", help="D and F (default 10B_2B/8)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 1.0], help="std of the experts' own logits")
    parser.add_argument("--backends", nargs="+", default=list(CANDIDATES), help=f"default: {' '.join(CANDIDATES)}")
    parser.add_argument("--direction", default="forward", help=f"one of {', '.join(DIRECTIONS)} (default forward)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that every backend runs in turn (default 10)")
    parser.add_argument("--block-ms", type=float, help="of a backend in a round (default: the device's)")


def main(args: argparse.Namespace) -> int:
    """Measure the points that the file lacks; returns the exit status."""
    device, config = checked_device(args.device), layer_config(args.preset)
    check_int("rounds", args.rounds, 1)
    check_choice("direction", args.direction, DIRECTIONS)
    check_choice("dtype", args.dtype, ("bfloat16", "float16", "float32"))
    for name in args.backends:
        check_choice("backends", name, CANDIDATES)
    points = list(points_of(args))
    table = _begun(args.json, timing.environment(device), args)
    done = {point_of(row) for row in table.rows if row.direction == args.direction}
    for point in tqdm([point for point in points if point not in done], unit="point"):
        rows = measure(point, config, args, device, str(table.environment["device"]))
        table = Measurements(table.environment, (*table.rows, *rows))
        table.save(args.json)
    print(f"{args.json.name}: {len(points)} points, {len(table.rows)} rows")
    return 0


def points_of(args: argparse.Namespace) -> Iterator[Point]:
    """Every point asked for with K <= E. `ValueError` for sizes below 1 or a negative skew."""
    for name in ("tokens", "experts", "top_k"):
        for size in getattr(args, name):
            check_int(name, size, 1)
    for skew in args.skew:
        check_threshold("skew", skew)
    for tokens, experts, top_k, skew in itertools.product(args.tokens, args.experts, args.top_k, args.skew):
        if top_k <= experts:
            yield Point(tokens, experts, top_k, skew)
    if min(args.top_k) > max(args.experts):
        raise ValueError(f"top_k={args.top_k} must have one of at most experts={args.experts}: nothing is left to time")


def measure(
    point: Point, config: MoEConfig, args: argparse.Namespace, device: torch.device, device_name: str
) -> list[Measurement]:
    """The rows of one point: bounds and backends, with the ms of every round."""
    config = config.replace(num_experts=point.num_experts, top_k=point.top_k, load_balance_coeff=None)
    inputs = make_inputs(config, point.tokens, device, getattr(torch, args.dtype), skew=point.skew)
    contest = hold("layer", inputs, args.backends)
    settings = Settings(args.rounds, (args.direction,), keep=True, block_ms=args.block_ms)
    of = fields_of("sweep", args.preset, inputs, point.skew, device_name)
    return [rounded(row) for group in timed(contest, settings, of) for row in group]


def rounded(row: Measurement) -> Measurement:
    """Times to the digits that a clock is worth, for a small file."""
    short: dict[str, Any] = {}
    for name, value in vars(row).items():
        if isinstance(value, float):
            short[name] = float(f"{value:.{DIGITS}g}")
    repeats = None if row.repeats is None else tuple(float(f"{ms:.{DIGITS}g}") for ms in row.repeats)
    return dataclasses.replace(row, **short, repeats=repeats)


def _begun(path: Path, facts: dict[str, str], args: argparse.Namespace) -> Measurements:
    """What the file holds already. `ValueError` where that is of another device, versions or layer."""
    argv: Sequence[str] = [Path(a).name if a == str(args.json) else a for a in sys.argv[1:]]
    about = {"preset": args.preset, "dtype": args.dtype, "rounds": args.rounds}
    if not path.exists():
        return Measurements(facts | about | {"command": " ".join(["moe-lab", *argv])})
    table = load(path)
    for name, value in ({name: fact for name, fact in facts.items() if name != "date"} | about).items():
        if table.environment.get(name) != value:
            raise ValueError(f"{path.name} is of {name} {table.environment.get(name)!r}, this run of {value!r}")
    return table
