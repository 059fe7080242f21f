"""Make the table that `backend="auto"` reads, and say what choosing by it costs on shapes that it does not hold.

    python -m moe_lab.jobs.auto_table --device cpu --held-out docs/results/auto_held_out.json
    python -m moe_lab.jobs.auto_table --device cpu --check     # only the regret of the table in use

Every legal backend runs the routed part of a layer (dispatch, experts, combine) on seeded, skewed routing, all in turn;
`batched` on the same number of rows spread evenly, without gradients. Regret is how much longer the chosen backend
takes than the fastest legal one of the same run. `--held-out` keeps these times, for both devices in one file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moe_lab.config import MoEConfig
from moe_lab.jobs.bench_inputs import Inputs, make_inputs
from moe_lab.jobs.peers import Arm, ours
from moe_lab.layer import auto
from moe_lab.layer.auto import Case
from moe_lab.study import timing

Sizes = tuple[int, int, int, int]
TOP_K = 2
BLOCK_MS = 15.0
BACKENDS = {"cpu": ("loop", "padded", "grouped", "buffered"), "cuda": ("loop", "padded", "grouped", "fused")}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}
# (rows of a mean expert, D, F, E): measured for the table, and held out of it.
GRID = {
    "cpu": [
        *product((4, 16, 64, 256), (64,), (64,), (8, 36)),
        *product((4, 16, 64, 256), (256,), (176,), (8, 36)),
        *product((16, 64, 256), (512,), (128, 352), (16, 64)),
    ],
    "cuda": [*product((16, 64, 256, 1024), (256, 1024, 2048), (256, 1024), (8, 64))],
}
HELD_OUT = {
    "cpu": [(12, 96, 96, 16), (64, 128, 64, 12), (100, 384, 256, 24), (20, 192, 128, 48), (300, 320, 160, 32)],
    "cuda": [
        (48, 512, 512, 16),
        (300, 1536, 256, 128),
        (512, 2048, 1408, 36),
        (64, 768, 512, 32),
        (200, 1280, 768, 48),
    ],
}


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds by backend, medians over rounds."""
    device = torch.device(case.device)
    config = MoEConfig(dim=case.dim, hidden_dim=case.hidden_dim, num_experts=case.num_experts, top_k=TOP_K)
    tokens = round(case.rows * case.num_experts / TOP_K)
    inputs = make_inputs(config, tokens, device, getattr(torch, case.dtype))
    even = inputs._replace(expert_ids_TK=torch.arange(tokens * TOP_K, device=device).view(-1, TOP_K) % case.num_experts)
    arms = {
        name: (ours(inputs, name), inputs)
        for name in BACKENDS[case.device]
        if name != "fused" or case.dtype != "float32"
    }
    if not case.grad and tokens * TOP_K % case.num_experts == 0:
        arms["batched"] = ours(even, "batched"), even
    runs = {name: _run(arm, given, case.grad) for name, (arm, given) in arms.items()}
    times = {
        name: timing.medians(read)
        for name, read in timing.interleave(runs, device, rounds=rounds, block_ms=BLOCK_MS).items()
    }
    return {name: float(f"{statistics.median(read):.4g}") for name, read in times.items()}


def _run(arm: Arm, inputs: Inputs, grad: bool) -> Callable[[], object]:
    def forward() -> Tensor:
        return arm.run(inputs.x_TD, inputs.gates_TK)

    def both() -> None:
        out_TD = arm.run(inputs.x_TD.detach().requires_grad_(), inputs.gates_TK.detach().requires_grad_())
        out_TD.backward(torch.ones_like(out_TD))
        for weight in arm.weights:
            weight.grad = None

    return both if grad else torch.no_grad()(forward)


def cases(device: str, shapes: list[Sizes]) -> Iterator[Case]:
    """Every shape in every dtype, with and without gradients."""
    for dtype, grad, (rows, *sizes) in product(DTYPES[device], (False, True), shapes):
        yield Case(device, dtype, grad, float(rows), *sizes)


def regrets(measured: Sequence[tuple[Case, dict[str, float]]]) -> Iterator[tuple[Case, str, float]]:
    """What `auto` chooses of skewed routing for measured cases, and its time over that of the fastest, less 1."""
    for case, times in measured:
        choice = auto.choose(case, plain=True).backend
        legal = {name: ms for name, ms in times.items() if name != "batched"}
        yield case, choice, legal[choice] / min(legal.values()) - 1


def measured(device: str, shapes: list[Sizes], rounds: int) -> list[tuple[Case, dict[str, float]]]:
    """The times of every case of some shapes."""
    return [(case, measure(case, rounds)) for case in tqdm(list(cases(device, shapes)), unit="case")]


def write(path: Path, device: str, name: str, rows: list[tuple[Case, dict[str, float]]]) -> None:
    """Put a device's rows in a table in place of those it had; other devices' rows stay."""
    stored: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in stored if row["case"]["device"] != device]
    kept += [{"case": case._asdict(), "ms": ms, "on": name} for case, ms in rows]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")


def main(argv: list[str] | None = None) -> int:
    """Measure, write the device's part of the table, and print the regret; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.jobs.auto_table", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(GRID), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that every backend runs in turn (default 7)")
    parser.add_argument("--check", action="store_true", help="change no table: only measure the held-out shapes")
    parser.add_argument("--held-out", type=Path, help="a file for the times of the held-out shapes")
    args = parser.parse_args(argv)
    environment = timing.environment(torch.device(args.device))
    if not args.check:
        write(auto.TABLE, args.device, environment["device"], measured(args.device, GRID[args.device], args.rounds))
        auto.forget_table()
    times = measured(args.device, HELD_OUT[args.device], args.rounds)
    if args.held_out:
        write(args.held_out, args.device, environment["device"], times)
    print("  ".join(f"{name} {fact}" for name, fact in environment.items()))
    found = list(regrets(times))
    for case, choice, regret in found:
        print(f"{tuple(case)!s:70} {choice:10} {regret:6.1%}")
    values = [regret for *_, regret in found]
    print(f"{len(values)} held-out cases: regret mean {statistics.mean(values):.1%}, largest {max(values):.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
