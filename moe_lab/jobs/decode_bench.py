"""Few tokens: the routed part beside reading the weights of the used experts once, as decoding does it.

    python -m moe_lab.jobs.decode_bench --device cuda --json h100_decode.json
    python -m moe_lab.jobs.decode_bench --show h100_decode.json

Forward without gradients, launched by the host and, on CUDA, replayed from a graph, which leaves out what launches cost
the host. The bound is the bytes of tokens and of the weights of experts that some token chose, at the copy rate of the
same rounds: a copy writes half of its bytes, so that what only reads can be a little faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from moe_lab.config import check_int
from moe_lab.jobs.bench import checked_device
from moe_lab.jobs.bench_inputs import SKEW, layer_config, make_inputs
from moe_lab.jobs.bench_run import Settings, collect, fields_of, timed
from moe_lab.jobs.contests import hold
from moe_lab.jobs.options import new_file
from moe_lab.study import timing
from moe_lab.study.measurements import Measurement, Measurements, load

LAYERS = ("qwen3_30b_a3b", "olmoe_1b_7b", "10B_2B", "mixtral_8x7b")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
OURS, PEERS = ("fused", "grouped"), ("transformers_grouped_mm",)
BLOCK_MS = 100.0


def rows_of(layer: str, tokens: int, device: torch.device, dtype: str, rounds: int) -> Iterator[Measurement]:
    """All rows of one layer and number of tokens."""
    inputs = make_inputs(layer_config(layer), tokens, device, getattr(torch, dtype))
    of = fields_of("decode", layer, inputs, SKEW, timing.environment(device)["device"])
    modes = ("eager", "graph") if device.type == "cuda" else ("eager",)
    settings = Settings(rounds, ("forward",), modes, block_ms=BLOCK_MS)
    for group in timed(hold("layer", inputs, OURS, PEERS), settings, of):
        yield from group


def text(table: Measurements) -> str:
    """A table a layer and mode: by tokens the bound, and of each arm ms, their interval and how many bounds it is."""
    lines = ["  ".join(f"{name} {fact}" for name, fact in table.environment.items())]
    for layer in table.values("layer"):
        for mode in table.values("mode"):
            found = table.select(layer=layer, mode=mode).rows
            arms = list(dict.fromkeys(row.arm for row in found if row.bytes_ms is not None))
            first = found[0]
            lines.append(
                f"\n{layer}  D {first.dim}  F {first.hidden_dim}  E {first.num_experts}  K {first.top_k}, {mode}"
            )
            lines.append("".join([f"{'T':>6}{'rows an expert':>16}{'bound ms':>10}", *(f"{arm:>31}" for arm in arms)]))
            rows = {(row.tokens, row.arm): row for row in found}
            for tokens in dict.fromkeys(row.tokens for row in found):
                cells = [_cell(rows.get((tokens, arm))) for arm in arms]
                bound = rows[tokens, arms[0]].bytes_ms or 0.0
                mean = tokens * first.top_k / first.num_experts
                lines.append("".join([f"{tokens:6}{mean:16.2f}{bound:10.3f}", *(f"{cell:>31}" for cell in cells)]))
    return "\n".join(lines)


def _cell(row: Measurement | None) -> str:
    if row is None or row.bytes_ms is None:
        return "not run"
    return f"{row.median:.3f} [{row.low:.3f}, {row.high:.3f}] {row.median / row.bytes_ms:5.2f} x"


def main(argv: list[str] | None = None) -> int:
    """Measure and print, or print what is stored; an interrupt keeps what was measured. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.jobs.decode_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=new_file, help="the file to write")
    parser.add_argument("--show", type=Path, help="only print a file")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that every arm runs in turn (default 8)")
    args = parser.parse_args(argv)
    if args.show:
        print(text(load(args.show)))
        return 0
    device = checked_device(args.device)
    check_int("rounds", args.rounds, 1)
    facts: dict[str, str | int] = timing.environment(device) | {"dtype": args.dtype, "rounds": args.rounds}
    cases = tqdm([(layer, tokens) for layer in LAYERS for tokens in TOKENS])
    groups = (rows_of(layer, tokens, device, args.dtype, args.rounds) for layer, tokens in cases)
    print(text(collect(groups, facts, args.json)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
