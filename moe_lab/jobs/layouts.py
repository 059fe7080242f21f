"""One run on several layouts: loss curves beside those of one process in another order of sums, memory and time.

    python -m moe_lab.jobs.layouts docs/results/layouts.json
    python -m moe_lab.jobs.layouts docs/results/layouts.json --costs

Curves take minutes, time needs the machine to itself: `--costs` measures memory and time again, a minute, and leaves
the curves in the file as they are.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import statistics
import sys
import tarfile
import tempfile
import typing
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise, permutations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_lab.jobs.corpus_file import Corpus, Split
from moe_lab.jobs.evaluate import as_tensor
from moe_lab.jobs.memory import measure, watch_steps
from moe_lab.jobs.train import Losses, TrainConfig, Trainer, train
from moe_lab.jobs.train_distributed import DistributedTrainer
from moe_lab.models.lm import SMALL, LMConfig, MoELM, rotary_table
from moe_lab.parallel.ranks import RankPool
from moe_lab.parallel.sequence import SequenceShard, gather_all
from moe_lab.parallel.virtual import VirtualRanks
from moe_lab.study.planner import Layout, beforehand, plan
from moe_lab.study.recorder import record
from moe_lab.study.trace import Document, RoutingTrace

ONE = "1 process"
LAYOUTS = {
    "EP 2": Layout(2, 2),
    "EP 4": Layout(4, 4),
    "FSDP 4": Layout(4),
    "dp 2 x ep 2": Layout(4, 2),
    "sp 2": Layout(2, sp=2),
    "dp 2 x sp 2": Layout(4, sp=2),
    "sp 2 x ep 2": Layout(4, 2, sp=2),
}
THREADS = (1, 2, 3, 4)
SEEDS = range(5)
STEPS = 1000  # whose fullest is what a plan at p99.9 is to hold
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
        return Split(as_tensor(part), torch.tensor([0, len(part)]), (_document(argparse, part, 0, len(part)),))

    return Corpus(split(text[:-300]), split(text[-300:]), {})


class InOrder(Trainer):
    """One process that sums as the ranks of a layout do: its ranks are virtual, gradients added by rank.

    Each rank has a copy of the model, on the same weights, for gradients of its own. Ranks of one `dp`, as (sp, ep),
    run in lock step: those of one `sp` share experts, those of one `ep` sequences.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, device: str, *, layout: Layout) -> None:
        self.layout = layout
        super().__init__(config, corpus, device)

    def spread(self, model: MoELM) -> MoELM:
        """Whole, beside its copies."""
        self.copies = [_copy(model) for _ in range(self.layout.ep * self.layout.sp)]
        return model

    def gradients(self, bytes_BL: Tensor) -> Losses:
        """Those of the mean of all ranks' losses; that mean."""
        ep, sp, found = self.layout.ep, self.layout.sp, []
        for group_BL in bytes_BL.chunk(self.layout.replicas // sp):
            shares = group_BL.chunk(ep) * sp
            batch, length = len(shares[0]), group_BL.shape[1] - 1
            parts = [SequenceShard(batch, length, sp, rank // ep) for rank in range(ep * sp)]
            cut = [part.cut(share_BL[:, :-1]) for part, share_BL in zip(parts, shares)]
            logits = in_lock_step(self.copies, parts, cut)
            losses = [p.cross_entropy(l_BlV, share_BL[:, 1:]) for p, l_BlV, share_BL in zip(parts, logits, shares)]
            (torch.stack(losses).sum() / self.layout.ranks).backward()
            found += [loss.detach() for loss in losses]
            for one in self.copies:
                for p, mine in zip(self.model.parameters(), one.parameters()):
                    if mine.grad is not None:  # experts have theirs in the first copy of each `ep`
                        p.grad = mine.grad if p.grad is None else p.grad + mine.grad
                    mine.grad = None
        return Losses(torch.stack(found).mean(), torch.zeros(()))


def _copy(model: MoELM) -> MoELM:
    """A copy whose weights, with gradients of their own, and buffers are the model's."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    return copy.deepcopy(model, shared | {id(buffer): buffer for buffer in model.buffers()})


def in_lock_step(copies: Sequence[MoELM], parts: Sequence[SequenceShard], cut: Sequence[Tensor]) -> list[Tensor]:
    """Logits (B, l, V) of every rank's bytes (B, l) by its copy of the model, block by block; ranks are (sp, ep)."""
    config, sp, length, device = copies[0].config, parts[0].size, parts[0].length, cut[0].device
    ep, head_dim = len(parts) // sp, config.moe.dim // config.num_heads
    rotary = [rotary_table(part.local_length, head_dim, device, part.start) for part in parts]
    sees = [part.sees_lL(device) if sp > 1 else None for part in parts]  # None for whole sequences, as ranks do
    hidden = [one.embedding(bytes_Bl) for one, bytes_Bl in zip(copies, cut)]
    for blocks in zip(*(one.blocks for one in copies)):
        heads = [b.attention.heads(b.attention_norm(x_BlD), r) for b, x_BlD, r in zip(blocks, hidden, rotary)]
        here = [torch.stack((k, v)) for _, k, v in heads]
        by_ep = [gather_all(here[rank::ep], length) for rank in range(ep)]
        whole = chain(*zip(*by_ep))  # as ranks are, ep last
        outs = [b.attention.attend(q, k, v, sees_lL) for b, (q, *_), (k, v), sees_lL in zip(blocks, heads, whole, sees)]
        hidden = [x_BlD + out for x_BlD, out in zip(hidden, outs)]
        rows = [part.real(b.moe_norm(x_BlD)) for part, b, x_BlD in zip(parts, blocks, hidden)]
        outs = []
        for rank in range(0, len(parts), ep):
            layers = [b.moe for b in blocks[rank : rank + ep]]
            outs += VirtualRanks(layers[0], ep, layers=layers)(rows[rank : rank + ep])
        hidden = [x_BlD + part.padded(out) for x_BlD, part, out in zip(hidden, parts, outs)]
    return [one.head(one.norm(x_BlD)) for one, x_BlD in zip(copies, hidden)]


IN_ORDER = {"FSDP 2": Layout(2), **LAYOUTS, "sp 4": Layout(4, sp=4)}  # sums over sp have an order from three ranks on


def in_order(config: TrainConfig, layout: Layout) -> Run:
    """One process that sums as the ranks of a layout do: over `dp` alone, a micro-batch for each is all it takes."""
    if layout.ep == layout.sp == 1:
        return one_process(dataclasses.replace(config, accumulate=layout.ranks))
    return one_process(config, make=partial(InOrder, layout=layout))


class Run(NamedTuple):
    """Bits per byte of every step, and the median seconds of a step after the first ten."""

    bits_per_byte: list[float]
    seconds: float


def one_process(config: TrainConfig, threads: int = 1, make: Callable[..., Trainer] = Trainer) -> Run:
    """On this process alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as out:
            run = _run(config, Path(out), make)
            assert run is not None  # one process leads
            return run
    finally:
        torch.set_num_threads(before)


def on_ranks(pool: RankPool, config: TrainConfig, layout: Layout, *, fixed_order: bool = False) -> Run:
    """On the ranks of a pool."""
    with tempfile.TemporaryDirectory() as out:
        return pool.run(on_rank, config, Path(out), layout, fixed_order=fixed_order)[0]


def on_rank(config: TrainConfig, out: Path, layout: Layout, *, fixed_order: bool = False) -> Run | None:
    """One rank's part; the run, on the rank that leads."""
    return _run(config, out, partial(DistributedTrainer, ep=layout.ep, sp=layout.sp, fixed_order=fixed_order))


def _run(config: TrainConfig, out: Path, make: Callable[..., Trainer]) -> Run | None:
    if not train(config, source_text(), out, progress=False, make=make).leads:
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


def trained(config: TrainConfig) -> MoELM:
    """The model after all steps of one process."""
    trainer = Trainer(config, source_text(), "cpu")
    while trainer.step < config.steps:
        trainer.advance()
    model = MoELM(config.model)  # without the trainer's hooks, which cannot be sent to ranks
    model.load_state_dict(trainer.model.state_dict())
    return model


def other_trace(model: MoELM) -> RoutingTrace:
    """Of text that is not trained on: three other modules, cut into sequences that are drawn apart as crops are."""
    length = model.config.max_length
    with record(model.eval()) as recorder, torch.no_grad():
        for module in (typing, inspect, tarfile):
            text = Path(str(module.__file__)).read_bytes()
            starts = range(0, len(text) - length + 1, length)
            for some in (starts[n : n + 64] for n in range(0, len(starts), 64)):
                recorder.begin(*(_document(module, text, start, length) for start in some))
                model(torch.stack([as_tensor(text[start : start + length]).long() for start in some]))
    return recorder.trace()


def _document(module: ModuleType, text: bytes, start: int, length: int) -> Document:
    return Document(f"stdlib:{module.__name__}.py", "python", hashlib.sha256(text).hexdigest(), start, length)


def next_batches(config: TrainConfig, steps: int) -> Tensor:
    """What training would draw after its last step, (S, batch, max_length + 1)."""
    trainer = Trainer(config, source_text(), "cpu")
    return torch.stack([trainer.batch(config.steps + step) for step in range(steps)])


def memory(
    model: MoELM, layout: Layout, text_SBL: Tensor, trace: RoutingTrace, pool: RankPool | None = None
) -> dict[str, dict[str, int]]:
    """Bytes of the fullest rank, term by term: counted, planned at the rows that came, and planned beforehand.

    Of the one of S steps in which a rank has most rows; `receive` is the largest of all steps. Beforehand is from a
    trace of other text. `pool`: ranks of the layout; None is one process.
    """
    tokens = text_SBL.shape[1] * layout.sp // layout.ranks * layout.positions(model.config)
    planned = partial(at_these_rows, model.config, layout, tokens)
    fullest_BL, most = text_SBL[0], None
    if pool and layout.ep > 1:  # without, a rank has the rows of all its tokens in every step
        came_SR = list(zip(*pool.run(watch_steps, model, text_SBL, layout.ep, layout.sp)))
        totals = [max(sum(came.rows) for came in ranks) for ranks in came_SR]
        fullest_BL = text_SBL[totals.index(max(totals))]
        most = max((came for ranks in came_SR for came in ranks), key=lambda came: came.receive)
    held = pool.run(measure, model, fullest_BL, layout.ep, layout.sp) if pool else [measure(model, fullest_BL, None)]
    counted = largest([rank.terms | {"peak": rank.peak} for rank in held])
    came = largest([planned(rank.rows) for rank in held])
    if most:
        counted["receive"], came["receive"] = most.receive, planned(most.rows)["receive"]
    return {
        "counted": counted,
        "planned": came,
        "beforehand": beforehand(model.config, layout, tokens, trace)._asdict(),
    }


def at_these_rows(
    config: LMConfig, layout: Layout, tokens: int, rows_L: Sequence[int], **options: Any
) -> dict[str, int]:
    """The plan of a rank with so many rows in each layer."""
    return plan(config, layout, tokens, [rows / (tokens * config.moe.top_k) for rows in rows_L], **options)._asdict()


def largest(ranks: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of every term that of the rank that has most of it."""
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


class Curves(NamedTuple):
    """The runs of one seed: with each number of threads, on each layout, and in a fixed order on ranks and in one."""

    threads: dict[int, Run]
    layouts: dict[str, Run]
    in_order: dict[str, tuple[Run, Run]]

    def summary(self) -> dict[str, Any]:
        """Largest relative differences: between numbers of threads, from one process, and in the ranks' order."""
        one = self.threads[1].bits_per_byte
        return {
            "threads": largest_between([run.bits_per_byte for run in self.threads.values()]),
            "layouts": {name: difference(run.bits_per_byte, one) for name, run in self.layouts.items()},
            "in_order": {
                name: difference(*(run.bits_per_byte for run in runs)) for name, runs in self.in_order.items()
            },
        }


def curves(config: TrainConfig, pools: dict[int, RankPool]) -> Curves:
    """All runs of one seed."""
    return Curves(
        {threads: one_process(config, threads) for threads in THREADS},
        {name: on_ranks(pools[layout.ranks], config, layout) for name, layout in LAYOUTS.items()},
        {
            name: (on_ranks(pools[layout.ranks], config, layout, fixed_order=True), in_order(config, layout))
            for name, layout in IN_ORDER.items()
        },
    )


def compare(config: TrainConfig = SHRUNK) -> dict[str, Any]:
    """Every layout's curve, how far apart curves are of one process, and `costs`."""
    torch.set_num_threads(1)
    with RankPool(2, backend="gloo", timeout=300) as two, RankPool(4, backend="gloo", timeout=300) as four:
        pools = {2: two, 4: four}
        found = {seed: curves(dataclasses.replace(config, seed=seed), pools) for seed in tqdm(SEEDS, file=sys.stderr)}
    runs = {ONE: found[0].threads[1], **found[0].layouts}
    return {
        "model": f"SMALL shrunk to {config.model.num_layers} layers, D {config.model.moe.dim}, gloo on one CPU",
        "text": f"argparse.py of Python {sys.version.split()[0]}",
        "torch": str(torch.__version__),
        "config": config.to_dict(),
        "by_seed": {str(seed): one.summary() for seed, one in found.items()},
        "bits_per_byte": {name: run.bits_per_byte for name, run in runs.items()}
        | {f"{ONE}, {threads} threads": run.bits_per_byte for threads, run in found[0].threads.items() if threads > 1},
    } | costs(config)


def costs(config: TrainConfig = SHRUNK) -> dict[str, Any]:
    """Memory and time of a step, of one process and on every layout, and what times hold for.

    Memory is that of the fullest of `STEPS` steps, by the weights that `config` trains to.
    """
    model, text_SBL = trained(config), next_batches(config, STEPS)
    trace = other_trace(model)
    short = dataclasses.replace(config, steps=30)
    footprints = {ONE: memory(model, Layout(1), text_SBL, trace)}
    seconds, fixed = {ONE: one_process(short).seconds}, {}
    with RankPool(2, backend="gloo", timeout=300) as two, RankPool(4, backend="gloo", timeout=300) as four:
        pools = {2: two, 4: four}
        for name, layout in tqdm(LAYOUTS.items(), desc="memory and time", file=sys.stderr):
            pool = pools[layout.ranks]
            footprints[name] = memory(model, layout, text_SBL, trace, pool)
            seconds[name] = on_ranks(pool, short, layout).seconds
        for name, layout in IN_ORDER.items():
            fixed[name] = on_ranks(pools[layout.ranks], short, layout, fixed_order=True).seconds
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "steps_watched": STEPS,
        "bytes": footprints,
        "seconds_a_step": seconds,
        "seconds_in_fixed_order": fixed,
    }


if __name__ == "__main__":
    from moe_lab.jobs import layouts  # by the name that ranks import

    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--costs", action="store_true", help="only memory and time, into a file that is there")
    args = parser.parse_args()
    result = json.loads(args.file.read_text()) | layouts.costs() if args.costs else layouts.compare()
    args.file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("by_seed", "bytes", "seconds_a_step")}, indent=1))
