"""Measure the routed part of a layer, or one step of it, against its bounds and other libraries.

    moe-lab bench layer --device cuda --preset 10B_2B --preset fine --peers all --json results.json
    moe-lab bench combine --preset 10B_2B/8 --tokens 2048 --dtype float32

"10B_2B/8" has an eighth of the widths. All arms compute the same, and each is run and compared first: one whose
output is beyond the budget is not timed. Bounds are two dense products of the same operations (three times that with
backward), and a copy of the bytes that must move. Routing is skewed: logits are normal, plus half a normal number an
expert.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lab.config import check_choice, check_int
from moe_lab.jobs import ranks_bench
from moe_lab.jobs.bench_inputs import DEFAULT_TOKENS, SKEW, TOKENS, Inputs, default_tokens, layer_config, make_inputs
from moe_lab.jobs.bench_run import Settings, fields_of, phase_rows, timed
from moe_lab.jobs.contests import FIELDS, Contest, hold
from moe_lab.jobs.kernel_bench import kernel_rows
from moe_lab.jobs.options import new_file
from moe_lab.study import timing
from moe_lab.study.measurement_text import lines
from moe_lab.study.measurements import Measurement, Measurements

DEFAULT_LAYERS = ("10B_2B", "olmoe_1b_7b", "mixtral_8x7b", "fine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab bench`."""
    parser.add_argument("what", choices=list(FIELDS), help="the routed part of one layer, or one step of it")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument("--preset", action="append", help=f"repeatable; default: {', '.join(DEFAULT_LAYERS)}")
    parser.add_argument("--tokens", type=int, help=f"default: {_defaults()}")
    parser.add_argument("--backends", default="all", help="all (default) or some of ours, separated by commas")
    parser.add_argument("--peers", default="all", help="all (default), none, or some, separated by commas")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that every arm runs in turn (default 8)")
    parser.add_argument("--compile", action="store_true", help="each arm under torch.compile too")
    parser.add_argument("--json", type=new_file, help="also write the numbers, with the environment, here")
    ranks = parser.add_argument_group("bench layer under torchrun, over all ranks (see moe_lab.jobs.ranks_bench)")
    ranks_bench.add_arguments(ranks)


def main(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status. An interrupt keeps what was measured."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        check_choice("bench", args.what, ("layer",))
        ranks_bench.main_under_torchrun(args)
        return 0
    ranks_bench.refuse_options(args)
    device = checked_device(args.device)
    check_int("rounds", args.rounds, 1)
    if args.tokens is not None:
        check_int("tokens", args.tokens, 1)
    check_choice("dtype", args.dtype, ("bfloat16", "float16", "float32"))
    field = FIELDS[args.what]
    backends, peers = _names("backends", args.backends, field.backends), _names("peers", args.peers, field.peers)
    layers = {name: layer_config(name) for name in args.preset or DEFAULT_LAYERS}
    modes = ("eager", "compile") if args.compile else ("eager",)
    facts: dict[str, Any] = timing.environment(device) | {"dtype": args.dtype, "rounds": args.rounds}
    facts["command"] = " ".join(["moe-lab", *(Path(a).name if a == str(args.json) else a for a in sys.argv[1:])])
    print("  ".join(f"{name} {fact}" for name, fact in facts.items()), flush=True)
    rows: list[Measurement] = []
    finished = 0
    try:
        for name, config in layers.items():
            tokens = default_tokens(name) if args.tokens is None else args.tokens
            print(f"{name}, {tokens:,} tokens: comparing what every arm computes", file=sys.stderr)
            inputs = make_inputs(config, tokens, device, getattr(torch, args.dtype))
            contest = hold(args.what, inputs, backends, peers)
            of = fields_of(args.what, name, inputs, SKEW, str(facts["device"]))
            for group in _measured(args.what, inputs, contest, Settings(args.rounds, modes=modes), of):
                rows += group
                print(f"\n{lines(group)}", flush=True)
            for arm, reason in contest.missing.items():
                facts[f"{name} without {arm}"] = reason
                print(f"  {arm}: not run: {reason}", flush=True)
            finished += 1
    finally:
        if args.json:
            facts["layers"] = f"{finished} of {len(layers)}"
            Measurements(facts, tuple(rows)).save(args.json)
    return 0


def _measured(
    what: str, inputs: Inputs, contest: Contest, settings: Settings, of: dict[str, Any]
) -> Iterator[list[Measurement]]:
    yield from timed(contest, settings, of)
    if what == "layer":
        yield list(phase_rows(contest, settings, of))
        if "fused" in contest.arms:
            yield list(kernel_rows(inputs, settings.rounds, of | {"bench": "kernels"}))


def _defaults() -> str:
    return ", ".join([str(DEFAULT_TOKENS), *(f"{tokens} for {layer}" for layer, tokens in TOKENS.items())])


def _names(option: str, given: str, known: Sequence[str] | Any) -> list[str]:
    if given in ("all", "none"):
        return list(known) if given == "all" else []
    names = given.split(",")
    for name in names:
        check_choice(option, name, known)
    return names


def checked_device(name: str) -> torch.device:
    """A device that is here. `ValueError` for any other."""
    check_choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not here: torch sees no GPU")
    return torch.device(name)
