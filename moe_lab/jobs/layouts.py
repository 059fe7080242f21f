"""One run on several layouts: loss curves beside those of one process in another order of sums, memory and time.

python -m moe_lab.jobs.layouts docs/results/layouts.json
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab.jobs.corpus_file import Corpus, Split
from moe_lab.jobs.evaluate import as_tensor
from moe_lab.jobs.memory import Held, measure
from moe_lab.jobs.train import Losses, TrainConfig, Trainer, train
from moe_lab.jobs.train_distributed import DistributedTrainer
from moe_lab.models.lm import SMALL, MoELM
from moe_lab.parallel.ranks import RankPool
from moe_lab.study.planner import Layout, plan, trace_load
from moe_lab.study.recorder import record
from moe_lab.study.trace import Document

ONE = "1 process"
LAYOUTS = {"EP 2": Layout(2, 2), "EP 4": Layout(4, 4), "FSDP 4": Layout(4, 1), "dp 2 x ep 2": Layout(4, 2)}
CONTROLS = {  # one process: threads, parts of a batch that it sums as so many ranks would
    "1 process, 2 threads": (2, 1),
    "1 process, 2 parts": (1, 2),
    "1 process, 4 parts": (1, 4),
    "1 process, 2 threads, 4 parts": (2, 4),
}
SHRUNK = TrainConfig(
    model=dataclasses.replace(
        SMALL, num_layers=2, max_length=32, moe=SMALL.moe.replace(dim=64, hidden_dim=16, num_experts=8)
    ),
    steps=50,
    batch=8,
    warmup=10,
    log_every=1,
    save_every=50,
    eval_files=1,
)


def source_text() -> Corpus:
    """One module of this Python's standard library: all but the last 300 bytes to train on."""
    text = Path(argparse.__file__).read_bytes()

    def split(part: bytes) -> Split:
        document = Document("stdlib:argparse.py", "python", hashlib.sha256(part).hexdigest(), 0, len(part))
        return Split(as_tensor(part), torch.tensor([0, len(part)]), (document,))

    return Corpus(split(text[:-300]), split(text[-300:]), {})


class InParts(Trainer):
    """One process that takes a batch in `parts`, each with the mean over its own, as many ranks do."""

    def __init__(self, config: TrainConfig, corpus: Corpus, device: str, *, parts: int) -> None:
        self.parts = parts
        super().__init__(config, corpus, device)

    def _losses(self, bytes_BL: Tensor) -> Losses:
        parts = [super(InParts, self)._losses(part) for part in bytes_BL.chunk(self.parts)]
        return Losses(*(torch.stack(values).mean() for values in zip(*parts)))


class Run(NamedTuple):
    """Bits per byte of every step, and the median seconds of a step after the first ten."""

    bits_per_byte: list[float]
    seconds: float


def one_process(config: TrainConfig, threads: int = 1, parts: int = 1) -> Run:
    """On this process alone."""
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as out:
            run = _run(config, Path(out), partial(InParts, parts=parts))
            assert run is not None  # one process leads
            return run
    finally:
        torch.set_num_threads(1)


def on_rank(config: TrainConfig, out: Path, layout: Layout) -> Run | None:
    """One rank's part; the run, on the rank that leads."""
    return _run(config, out, partial(DistributedTrainer, ep=layout.ep, sp=layout.sp))


def _run(config: TrainConfig, out: Path, make: Callable[..., Trainer]) -> Run | None:
    if not train(config, source_text(), out, make=make).leads:
        return None
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in log][min(10, len(log) // 2) :]
    seconds = statistics.median(b - a for a, b in pairwise(ends))
    return Run([line["bits_per_byte"] for line in log], seconds)


def difference(curve: list[float], baseline: list[float]) -> float:
    """Largest difference of a step, relative to the baseline."""
    return max(abs(a / b - 1) for a, b in zip(curve, baseline, strict=True))


def largest_between(curves: Sequence[list[float]]) -> float:
    """Largest difference of a step between any two curves."""
    return max(difference(a, b) for a, b in permutations(curves, 2))


def memory(config: TrainConfig, layout: Layout, held: Sequence[Held]) -> dict[str, Any]:
    """Bytes of the fullest rank: planned from the routing of other text, and counted."""
    tokens = config.batch // layout.ranks * config.model.max_length
    torch.manual_seed(0)
    model = MoELM(config.model)  # as `measure` builds it
    with record(model) as recorder, torch.no_grad():
        model(_sequences(config, 256)[config.batch :, :-1])
    planned = plan(config.model, layout, tokens, trace_load(recorder.trace(), layout, tokens))._asdict()
    counted = {name: max(rank.terms[name] for rank in held) for name in held[0].terms}
    return {"planned": planned, "counted": counted | {"peak": max(rank.peak for rank in held)}}


def _sequences(config: TrainConfig, count: int) -> Tensor:
    length = config.model.max_length + 1
    return source_text().train_U8[: count * length].long().view(count, length)


def compare(config: TrainConfig = SHRUNK) -> dict[str, Any]:
    """Every layout's curve, time and memory, and how far apart curves are of one process."""
    torch.set_num_threads(1)
    text_BL = _sequences(config, config.batch)
    runs = {ONE: one_process(config)}
    footprints = {ONE: memory(config, Layout(1), [measure(config.model, text_BL, None)])}
    runs |= {name: one_process(config, threads, parts) for name, (threads, parts) in CONTROLS.items()}
    for name, layout in LAYOUTS.items():
        with RankPool(layout.ranks, backend="gloo", timeout=300) as pool, tempfile.TemporaryDirectory() as out:
            runs[name] = pool.run(on_rank, config, Path(out), layout)[0]
            held = pool.run(measure, config.model, text_BL, layout.ep)
        footprints[name] = memory(config, layout, held)
    curves = {name: run.bits_per_byte for name, run in runs.items()}
    return {
        "model": f"SMALL shrunk to {config.model.num_layers} layers, D {config.model.moe.dim}, gloo on one CPU",
        "text": f"argparse.py of Python {sys.version.split()[0]}",
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "config": config.to_dict(),
        "largest_relative_difference": {name: difference(c, curves[ONE]) for name, c in curves.items()},
        "largest_between_controls": largest_between([curves[ONE], *(curves[name] for name in CONTROLS)]),
        "bytes": footprints,
        "seconds_a_step": {name: runs[name].seconds for name in (ONE, *LAYOUTS)},
        "bits_per_byte": curves,
    }


if __name__ == "__main__":
    from moe_lab.jobs import layouts  # by the name that ranks import

    result = layouts.compare()
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in list(result)[6:10]}, indent=1))
