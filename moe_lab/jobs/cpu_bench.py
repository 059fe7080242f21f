"""Our layer on a CPU beside transformers' experts and the dense bound: times, peak memory, and combine alone.

    python -m moe_lab.jobs.cpu_bench --json cpu_layer.json
    python -m moe_lab.jobs.cpu_bench --show cpu_layer.json

`batched_mm` is left out: it copies three weights for each assignment. Peak memory is that of a fresh process, forward
and backward, above what it held before the first call: inputs and weights.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moe_lab.config import check_choice
from moe_lab.jobs.bench_inputs import SKEW, Inputs, dense_bound, layer_config, make_inputs
from moe_lab.jobs.bench_run import Settings, collect, fields_of, timed
from moe_lab.jobs.contests import FIELDS, hold
from moe_lab.jobs.options import new_file
from moe_lab.jobs.peers import ours
from moe_lab.kernels import crew
from moe_lab.layer.plan import plan_local
from moe_lab.study import timing
from moe_lab.study.measurements import Measurement, Measurements, load, measured
from moe_lab.study.standing import standings, summary

LAYERS = {"10B_2B/8": 2048, "10B_2B/4": 2048, "fine_64/4": 4096, "10B_2B/2": 4096}  # with their tokens
DTYPES = ("float32", "bfloat16")
OURS, PEERS = "buffered", ("transformers_eager", "transformers_grouped_mm")
CPU = torch.device("cpu")
CALLS = 3  # in the process whose memory is measured


def rows_of(layer: str, dtype: str, rounds: int) -> Iterator[Measurement]:
    """All rows of one layer in one dtype."""
    inputs = make_inputs(layer_config(layer), LAYERS[layer], CPU, getattr(torch, dtype))
    of = fields_of("layer", layer, inputs, SKEW, timing.environment(CPU)["device"])
    for group in timed(hold("layer", inputs, [OURS], PEERS), Settings(rounds, keep=True), of):
        yield from group
    yield from part_rows(inputs, rounds, of | {"bench": "parts"})
    combines = hold("combine", inputs, ["gather"], ["deterministic_2d_index"])
    for group in timed(combines, Settings(rounds, keep=True), of | {"bench": "combine"}):
        yield from group
    for arm in (OURS, *PEERS):
        command = [sys.executable, "-m", __package__ + ".cpu_bench", "--memory", arm, layer, dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        ms, peak = done.stdout.split()
        yield measured([[float(ms)]], arm=arm, peak=int(peak), **of | {"bench": "memory"}, direction="forward+backward")


def part_rows(inputs: Inputs, rounds: int, of: dict[str, Any]) -> Iterator[Measurement]:
    """What a forward is made of: one product of all rows, the experts' own products, plan, and all of it."""
    whole, plan = ours(inputs, OURS).run, partial(plan_local, inputs.expert_ids_TK, len(inputs.w1_EFD), dropless=False)
    arms: dict[str, Callable[[], object]] = {"dense": dense_bound(inputs), "products": products_alone(inputs)}
    arms |= {"plan": plan, "all": torch.no_grad()(lambda: whole(inputs.x_TD, inputs.gates_TK))}
    runs = timing.interleave(arms, CPU, rounds=rounds)
    for arm in arms:
        yield measured(runs[arm], to=("dense", runs["dense"]), keep=True, arm=arm, **of)


def products_alone(inputs: Inputs) -> Callable[[], object]:
    """The three products of every expert, shared by threads as `buffered` does, on rows that lie ready."""
    plan = plan_local(inputs.expert_ids_TK, len(inputs.w1_EFD))
    rows_RD, counts = inputs.x_TD[plan.token_R], plan.counts_E.tolist()
    gate_RF, up_RF = (rows_RD.new_zeros(len(rows_RD), inputs.w1_EFD.shape[1]) for _ in range(2))
    weights = (w.mT.unbind() for w in (inputs.w1_EFD, inputs.w3_EFD, inputs.w2_EDF))
    out_RD = torch.empty_like(rows_RD)
    experts = zip(*(t.split(counts) for t in (rows_RD, gate_RF, up_RF, out_RD)), *weights)
    pieces = sorted(experts, key=lambda piece: -len(piece[0]))

    def work(mine: Iterator[tuple[Tensor, ...]]) -> None:
        for x, gate, up, out, w1, w3, w2 in mine:
            torch.mm(x, w1, out=gate)
            torch.mm(x, w3, out=up)
            torch.mm(gate, w2, out=out)

    return lambda: crew.share(work, pieces)


def print_memory(arm: str, layer: str, dtype: str) -> None:
    """The median ms of forward and backward, and the peak above inputs and weights in bytes, of this process."""
    inputs = make_inputs(layer_config(layer), LAYERS[layer], CPU, getattr(torch, dtype))
    field = FIELDS["layer"]
    run, weights = (field.backends | field.peers)[arm](inputs)  # type: ignore[operator]
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    taken = []
    for _ in range(CALLS):
        start = time.perf_counter()
        out_TD = run(inputs.x_TD.detach().requires_grad_(), inputs.gates_TK.detach().requires_grad_())
        out_TD.backward(torch.ones_like(out_TD))
        taken.append(1e3 * (time.perf_counter() - start))
        for weight in weights:
            weight.grad = None
    print(statistics.median(taken), _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def text(table: Measurements) -> str:
    """Each layer over the fastest peer and the bound, combine over deterministic scatter_add, and peaks."""
    lines = ["  ".join(f"{name} {fact}" for name, fact in table.environment.items())]
    for bench, arm, peers in (("layer", OURS, PEERS), ("combine", "gather", ("deterministic_2d_index",))):
        for dtype in table.values("dtype"):
            for direction in table.values("direction"):
                found = standings(table.select(bench=bench, dtype=dtype, direction=direction).rows, arm, peers)
                lines.append(f"\n{bench}, {dtype}, {direction}: {arm} over the fastest of {', '.join(peers)}")
                for one in found:
                    dense = "" if one.dense is None else f"   {one.dense:.2f} x dense"
                    ratio = f"{one.ratio.median:.2f} [{one.ratio.low:.2f}, {one.ratio.high:.2f}] x {one.peer}"
                    lines.append(f"  {one.layer:10} {one.ms:8.2f} ms   {ratio}{dense}")
                if found:
                    lines.append("  " + ", ".join(f"{name} {value:.2f}" for name, value in summary(found).items()))
    lines.append("\nforward made of: the experts' products alone, the plan, and all of it, over the dense bound")
    for row in table.select(bench="parts", arm="products").rows:
        parts = (f"{a.arm} {a.ratio:.2f}" for a in table.select(bench="parts", layer=row.layer, dtype=row.dtype).rows)
        lines.append(f"  {row.layer:10} {row.dtype:9} {'   '.join(parts)}")
    lines.append("\npeak of a fresh process above inputs and weights, forward and backward, MiB")
    memory = table.select(bench="memory")
    for row in memory.rows:
        if row.arm == OURS:
            arms = memory.select(layer=row.layer, dtype=row.dtype).rows
            peaks = "   ".join(f"{a.arm} {(a.peak or 0) / 2**20:.0f}" for a in arms)
            lines.append(f"  {row.layer:10} {row.dtype:9} {peaks}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print, or print what is stored; an interrupt keeps what was measured. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.jobs.cpu_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=new_file, help="the file to write")
    parser.add_argument("--show", type=Path, help="only print a file")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that every arm runs in turn (default 8)")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory:
        check_choice("arm", args.memory[0], (OURS, *PEERS))
        print_memory(*args.memory)
        return 0
    if args.show:
        print(text(load(args.show)))
        return 0
    facts: dict[str, str | int] = timing.environment(CPU) | {"rounds": args.rounds}
    cases = tqdm([(dtype, layer) for dtype in DTYPES for layer in LAYERS])
    groups = (rows_of(layer, dtype, args.rounds) for dtype, layer in cases)
    print(text(collect(groups, facts, args.json)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
