"""Measure the routed part of a layer (dispatch, experts, combine) against its dense bound and its peers.

    moe-lab bench layer --device cuda --preset 10B_2B --preset fine --peers all --json results.json

The bound is two dense products of the same floating-point operations, forward; three times that with backward.
Routing is skewed: logits are normal, plus half a normal number an expert.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import PRESETS, MoEConfig, check_choice, check_int
from moe_lab.jobs.bench_table import measurements
from moe_lab.jobs.peers import PEERS, Arm, Inputs, arms
from moe_lab.study import timing
from moe_lab.study.timing import Timing

LAYERS: dict[str, MoEConfig] = PRESETS | {"fine": MoEConfig(dim=1536, hidden_dim=256, num_experts=128, top_k=8)}
TOKENS = {"mixtral_8x7b": 8192}  # a layer's tokens where they are not DEFAULT_TOKENS
DEFAULT_TOKENS = 16384
DEFAULT_LAYERS = ("10B_2B", "olmoe_1b_7b", "mixtral_8x7b", "fine")


@dataclass(frozen=True)
class Row:
    """One arm on one layer. Times in ms, error relative to float32; None: not measured.

    `saved`, `peak`: bytes above the inputs when forward ends, without its output, and at the worst moment of forward
    and backward, without the weights' gradients.
    """

    arm: str
    forward: Timing
    forward_ratio: Timing
    both: Timing | None = None
    both_ratio: Timing | None = None
    saved: int | None = None
    peak: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Result:
    """One layer: its shape, its imbalance (largest count over mean), a row an arm, and single kernels in ms."""

    layer: str
    shape: dict[str, int]
    imbalance: float
    rows: tuple[Row, ...]
    kernels: dict[str, Timing]
    bounds: dict[str, float]
    missing: dict[str, str]

    def __str__(self) -> str:
        """A table; `x bound` is the ratio to the dense products, saved and peak are MiB."""
        shape = "  ".join(f"{name} {size}" for name, size in self.shape.items())
        lines = [
            f"{self.layer}   {shape}   max/mean {self.imbalance:.2f}",
            f"{'':14}{'forward ms':>11}{'95 %':>17}{'x bound':>9}{'+ backward ms':>15}{'95 %':>19}{'x bound':>9}"
            f"{'saved':>8}{'peak':>8}{'error':>10}",
        ]
        for row in self.rows:
            both, ratio = row.both, row.both_ratio
            cells = [f"{row.arm:14}", f"{row.forward.median:11.3f}", f"{_interval(row.forward):>17}"]
            cells += [f"{row.forward_ratio.median:9.2f}"]
            cells += [f"{both.median:15.3f}{_interval(both):>19}" if both else f"{'-':>15}{'':>19}"]
            cells += [f"{ratio.median:9.2f}" if ratio else f"{'-':>9}"]
            cells += [f"{value / 2**20:8.0f}" if value is not None else f"{'-':>8}" for value in (row.saved, row.peak)]
            cells += [f"{row.error:10.1e}" if row.error is not None else f"{'-':>10}"]
            lines.append("".join(cells))
        for name, time in self.kernels.items():
            bound = self.bounds.get(name)
            share = f"   {time.median / bound:.2f} x its bytes ({bound:.4f} ms)" if bound else ""
            lines.append(f"  {name:12}{time.median:9.4f} ms {_interval(time, 4)}{share}")
        lines += [f"  {name}: not run: {reason}" for name, reason in self.missing.items()]
        return "\n".join(lines)


def _interval(time: Timing, digits: int = 3) -> str:
    return f"[{time.low:.{digits}f}, {time.high:.{digits}f}]"


def make_inputs(config: MoEConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Seeded tokens, skewed routing and weights of fan-in scale."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype).mul_(std)

    experts, hidden_dim, dim = config.num_experts, config.hidden_dim, config.dim
    logits_TE = torch.randn(tokens, experts, generator=draw, device=device)
    logits_TE += 0.5 * torch.randn(experts, generator=draw, device=device)
    gates_TK, ids_TK = logits_TE.softmax(dim=-1).topk(config.top_k, dim=-1)
    up, down = (experts, hidden_dim, dim), (experts, dim, hidden_dim)
    weights = normal(*up, std=dim**-0.5), normal(*down, std=hidden_dim**-0.5), normal(*up, std=dim**-0.5)
    return Inputs(normal(tokens, dim), gates_TK.contiguous(), ids_TK, *weights)


def bench_layer(
    layer: str, tokens: int, device: torch.device, dtype: torch.dtype, peers: Sequence[str], rounds: int
) -> Result:
    """Forward, then forward and backward, of every arm in turn on one layer."""
    config = LAYERS[layer]
    inputs = make_inputs(config, tokens, device, dtype)
    able, missing = arms(inputs, tuple(peers))
    bound = dense_bound(inputs)
    grad_TD = torch.randn_like(inputs.x_TD)

    def forward(arm: Arm) -> Callable[[], object]:
        return torch.no_grad()(lambda: arm.run(inputs.x_TD, inputs.gates_TK))

    def both(arm: Arm) -> Callable[[], object]:
        def run() -> None:
            _forward(arm, inputs).backward(grad_TD)
            _clear(arm)

        return run

    ahead = timing.interleave({"dense": bound} | {n: forward(a) for n, a in able.items()}, device, rounds=rounds)
    there_and_back = timing.interleave(
        {"dense": lambda: [bound() for _ in range(3)]} | {n: both(a) for n, a in able.items()}, device, rounds=rounds
    )
    reference_TD = reference(inputs)
    rows = []
    for name in ("dense", *able):
        memory = error = None
        if name in able:
            arm = able[name]
            with torch.no_grad():
                error = _relative_error(arm.run(inputs.x_TD, inputs.gates_TK), reference_TD)
            if device.type == "cuda":
                memory = timing.measure_memory(partial(_forward, arm, inputs), lambda out: out.backward(grad_TD))
                memory = memory._replace(peak=memory.peak - sum(w.nbytes for w in arm.weights))
                _clear(arm)
        rows.append(
            Row(
                name,
                timing.summarise(ahead[name]),
                timing.ratio(ahead[name], ahead["dense"]),
                timing.summarise(there_and_back[name]),
                timing.ratio(there_and_back[name], there_and_back["dense"]),
                memory.saved if memory else None,
                memory.peak if memory else None,
                error,
            )
        )
    counts_E = torch.bincount(inputs.expert_ids_TK.flatten(), minlength=config.num_experts).float()
    shape = {"T": tokens, "D": config.dim, "F": config.hidden_dim, "E": config.num_experts, "K": config.top_k}
    kernels, bounds = bench_kernels(inputs) if "fused" in able else ({}, {})
    imbalance = float(counts_E.max() / counts_E.mean())
    return Result(layer, shape, imbalance, tuple(rows), kernels, bounds, missing)


def dense_bound(inputs: Inputs) -> Callable[[], object]:
    """Two products with as many floating-point operations as all experts together, into buffers of their own."""
    rows, (_, hidden_dim, dim) = inputs.expert_ids_TK.numel(), inputs.w1_EFD.shape
    x, w13 = (torch.randn(*s, device=inputs.x_TD.device).to(inputs.x_TD) for s in ((rows, dim), (dim, 2 * hidden_dim)))
    h, w2 = (torch.randn(*s, device=x.device).to(x) for s in ((rows, hidden_dim), (hidden_dim, dim)))
    up, down = x.new_empty(rows, 2 * hidden_dim), x.new_empty(rows, dim)
    return lambda: (torch.mm(x, w13, out=up), torch.mm(h, w2, out=down))


def reference(inputs: Inputs) -> Tensor:
    """(T, D) float32: every expert on its own tokens, in float32."""
    out_TD = torch.zeros_like(inputs.x_TD, dtype=torch.float32)
    for expert in range(inputs.w1_EFD.shape[0]):
        token, slot = (inputs.expert_ids_TK == expert).nonzero(as_tuple=True)
        w1, w2, w3 = (w[expert].float() for w in inputs[3:])
        x = inputs.x_TD[token].float()
        y = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
        out_TD.index_add_(0, token, y * inputs.gates_TK[token, slot, None])
    return out_TD


def bench_kernels(inputs: Inputs) -> tuple[dict[str, Timing], dict[str, float]]:
    """The kernels that only move rows, and what their bytes take at the copy rate of the same minute."""
    from moe_lab.kernels import combine
    from moe_lab.kernels.tiles import tile_rows

    tokens, dim = inputs.x_TD.shape
    num_rows = inputs.expert_ids_TK.numel()
    rows = tile_rows(inputs.expert_ids_TK, inputs.w1_EFD.shape[0])
    rows_PD = combine.gather(inputs.x_TD, rows)
    big, other = torch.empty(2, 2**30, dtype=torch.uint8, device=rows_PD.device)
    arms = {
        "copy": lambda: other.copy_(big),
        "gather": lambda: combine.gather(inputs.x_TD, rows),
        "combine": lambda: combine.combine(rows_PD, inputs.gates_TK, rows),
    }
    times = {k: timing.summarise(v) for k, v in timing.interleave(arms, rows_PD.device, rounds=8, block_ms=10).items()}
    times["sort"] = timing.time_replayed(lambda: tile_rows(inputs.expert_ids_TK, inputs.w1_EFD.shape[0]))
    byte = times.pop("copy").median / 2**31
    row = dim * inputs.x_TD.element_size()
    return times, {"gather": 2 * num_rows * row * byte, "combine": (num_rows + tokens) * row * byte}


def _forward(arm: Arm, inputs: Inputs) -> Tensor:
    return arm.run(inputs.x_TD.detach().requires_grad_(), inputs.gates_TK.detach().requires_grad_())


def _clear(arm: Arm) -> None:
    for weight in arm.weights:
        weight.grad = None


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab bench`."""
    parser.add_argument("what", choices=["layer"], help="the routed part of one layer")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument("--preset", action="append", help=f"repeatable; default: {', '.join(DEFAULT_LAYERS)}")
    parser.add_argument("--tokens", type=int, help=f"default: {DEFAULT_TOKENS}, or {TOKENS}")
    parser.add_argument("--peers", default="all", help=f"all (default), or some of {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that every arm runs in turn (default 8)")
    parser.add_argument("--json", type=Path, help="also write the numbers, with the environment, here")
    ranks = parser.add_argument_group("under torchrun, over all ranks (see moe_lab.jobs.ranks_bench)")
    ranks.add_argument("--kinds", nargs="+", help="kinds of splits: unequal, adaptive, equal, forced (default all)")
    ranks.add_argument("--routing", nargs="+", help="skewed (default), zipf, trace")
    ranks.add_argument("--shrink", type=int, default=1, help="divide D and F by this")
    ranks.add_argument("--iterations", type=int, default=100, help="of each arm (default 100)")


def main(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from moe_lab.jobs import ranks_bench

        ranks_bench.main_under_torchrun(args)
        return 0
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not here: torch sees no GPU")
    check_int("rounds", args.rounds, 1)
    if args.tokens is not None:
        check_int("tokens", args.tokens, 1)
    check_choice("dtype", args.dtype, ("bfloat16", "float16", "float32"))
    peers = tuple(PEERS) if args.peers == "all" else tuple(args.peers.split(","))
    for name in peers:
        check_choice("peers", name, PEERS)
    layers = args.preset or DEFAULT_LAYERS
    for layer in layers:
        check_choice("preset", layer, LAYERS)
    facts: dict[str, Any] = timing.environment(device) | {"dtype": args.dtype, "rounds": args.rounds}
    print("  ".join(f"{name} {fact}" for name, fact in facts.items()))
    results: list[Result] = []
    try:
        for layer in layers:
            tokens = TOKENS.get(layer, DEFAULT_TOKENS) if args.tokens is None else args.tokens
            results.append(bench_layer(layer, tokens, device, getattr(torch, args.dtype), peers, args.rounds))
            print(f"\n{results[-1]}", flush=True)
    finally:  # an interrupt keeps the layers that were measured
        if args.json:
            argv = [Path(a).name if a == str(args.json) else a for a in sys.argv[1:]]
            facts |= {"command": " ".join(["moe-lab", *argv]), "layers": f"{len(results)} of {len(layers)}"}
            measurements(results, facts).save(args.json)
    return 0
