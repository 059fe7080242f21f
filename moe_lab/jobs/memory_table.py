"""Planned beside counted on two GPUs: a training step of the shipped model, by layout, precision and recompute.

    python -m moe_lab.jobs.memory_table docs/results/h200x2_memory.json

Formulas are of gloo on a CPU. Here NCCL sums without a second buffer, attention is another kernel, and the most at once
is what CUDA's allocator reports.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moe_lab import data
from moe_lab.jobs.layouts import at_these_rows, largest, source_text
from moe_lab.jobs.memory import Held, measure
from moe_lab.jobs.options import new_file
from moe_lab.models.lm import MoELM
from moe_lab.parallel.ranks import RankPool
from moe_lab.study import timing
from moe_lab.study.planner import Layout

RANKS = 2
LAYOUTS = {"FSDP 2": Layout(2), "EP 2": Layout(2, 2), "sp 2": Layout(2, sp=2)}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
SEQUENCES = 8  # a rank
MIB = 2**20


def on_rank(model: MoELM, text_BL: Tensor, layout: Layout, **options: Any) -> Held:
    """Rank function: `measure` where the backend's tensors lie."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return measure(model, text_BL.to(device), layout.ep, layout.sp, **options)


def rows(pool: RankPool, model: MoELM, text_BL: Tensor) -> list[dict[str, Any]]:
    """By layout, precision and recompute: bytes of the fullest rank, counted, and planned at the rows that came."""
    found = []
    cases = list(product(LAYOUTS.items(), DTYPES.items(), (False, True)))
    for (name, layout), (precision, dtype), checkpointing in tqdm(cases, desc="memory", file=sys.stderr):
        options = {"dtype": dtype, "checkpointing": checkpointing}
        held = pool.run(on_rank, model, text_BL, layout, **options)
        tokens = len(text_BL) * layout.sp // layout.ranks * layout.positions(model.config)
        found.append(
            {
                "layout": name,
                "dtype": precision,
                "recompute": checkpointing,
                "counted": largest([rank.terms | {"peak": rank.peak} for rank in held]),
                "planned": largest([at_these_rows(model.config, layout, tokens, r.rows, **options) for r in held]),
            }
        )
    return found


def text(result: dict[str, Any]) -> str:
    """MiB at most at once, and how far plans are off."""
    lines = [f"{result['device']}  torch {result['torch']}  {result['sequences']} x {result['length']} tokens a rank"]
    lines.append("layout  dtype     recompute  counted MiB  planned MiB     off  off in activations")
    for row in result["rows"]:
        counted, planned = row["counted"], row["planned"]
        peak, activations = (planned[name] / counted[name] - 1 for name in ("peak", "activations"))
        recompute = "yes" if row["recompute"] else "no"
        lines.append(
            f"{row['layout']:<6}  {row['dtype']:<8}  {recompute:<9}  {counted['peak'] / MIB:11.1f}  "
            f"{planned['peak'] / MIB:11.1f}  {peak:+6.1%}  {activations:+18.1%}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print. `ValueError` without two GPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=new_file)
    args = parser.parse_args(argv)
    if torch.cuda.device_count() < RANKS:
        raise ValueError(f"{torch.cuda.device_count()} GPUs: {RANKS} are needed")
    model = data.load_lm()
    length = model.config.max_length
    text_BL = source_text().train_U8.long().unfold(0, length + 1, length + 1)[: RANKS * SEQUENCES]
    with RankPool(RANKS, backend="nccl", timeout=300) as pool:
        facts = timing.environment(torch.device("cuda"))
        result = facts | {"sequences": SEQUENCES, "length": length, "rows": rows(pool, model, text_BL)}
    args.file.write_text(json.dumps(result, indent=1) + "\n")
    print(text(result))
    return 0


if __name__ == "__main__":
    from moe_lab.jobs import memory_table  # by the name that ranks import

    sys.exit(memory_table.main())
