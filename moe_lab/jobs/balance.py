"""Train the small language model under every method of balancing, several seeds each: loss against imbalance.

    moe-lab balance --corpus corpus.safetensors --out docs/results/balance.json --device cuda

Runs of one seed begin with the same weights and read the same crops, so that methods are compared in pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moe_lab.config import check_int
from moe_lab.jobs.corpus_file import Corpus, load_corpus
from moe_lab.jobs.options import new_file
from moe_lab.jobs.train import TrainConfig, Trainer
from moe_lab.layer.capacity import capacity
from moe_lab.layer.router import Routing
from moe_lab.models.lm import SMALL, MoELM
from moe_lab.study.balance_runs import BalanceRuns, Run
from moe_lab.study.balancing import METHODS, method
from moe_lab.study.metrics import measure

LENGTH, WINDOW = 512, 4096  # bytes of a crop, and of a held-out window
LAST = 50  # steps that stand for the end of training
TRAINED = tuple(name for name in METHODS if name != "expert choice")
BASE = TrainConfig(
    model=dataclasses.replace(SMALL, max_length=LENGTH, moe=SMALL.moe.replace(load_balance_coeff=None)),
    steps=400,
    batch=32,
    switch_parts=4,
    warmup=50,
    learning_rate=3e-3,
)


def config_of(name: str, base: TrainConfig) -> TrainConfig:
    """`base` under one method, at its usual strength. `ValueError` for methods that no causal model can have."""
    way = method(name)
    moe = way.config(base.model.moe)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, moe=moe), **way.losses())


def run(name: str, base: TrainConfig, corpus: Corpus, *, device: str = "cpu", windows: int = 64) -> Run:
    """Train one model and measure it on `windows` held-out windows."""
    config = config_of(name, base)
    trainer = Trainer(config, corpus, device)
    history, last = [], []
    for step in range(config.steps):
        done = trainer.advance()
        if (step + 1) % config.log_every == 0 or step >= config.steps - LAST:
            load_L = max_over_mean(done.counts_LE)
        if (step + 1) % config.log_every == 0:
            history.append(float(load_L.mean()))
        if step >= config.steps - LAST:
            last.append((float(done.losses.cross_entropy) / math.log(2), load_L))
    bits, load_L, dropped = heldout(trainer.model, corpus.heldout_U8.to(device), windows)
    return Run(
        method=name,
        seed=config.seed,
        bits=round(bits, 6),
        load=_rounded(load_L),
        dropped=round(dropped, 6),
        train_bits=round(sum(bits for bits, _ in last) / len(last), 6),
        train_load=_rounded(torch.stack([load_L for _, load_L in last]).mean(dim=0)),
        history=_rounded(torch.tensor(history)),
    )


def max_over_mean(counts_LE: Tensor) -> Tensor:
    """Max/mean of each layer's counts, (L,) float64 on CPU."""
    return torch.from_numpy(measure(counts_LE.cpu().numpy())[:, 0])


@torch.inference_mode()
def heldout(model: MoELM, text_B: Tensor, windows: int) -> tuple[float, Tensor, float]:
    """Bits per byte, max/mean by layer, and the share of assignments dropped, over windows spread evenly over a text.

    Each window is one forward of `WINDOW` bytes in crops of the model's length, whose first bytes cost what the model
    says without context. Max/mean is of what was asked for, before drops, and a mean over windows.
    """
    model.eval()
    length, moe = model.config.max_length, model.config.moe
    crops = max(1, WINDOW // length)
    if windows * crops * (length + 1) > len(text_B):
        raise ValueError(f"windows={windows} of {crops} crops of {length + 1} bytes: the text has {len(text_B):,}")
    start_N = torch.linspace(0, len(text_B) - length - 1, windows * crops, device=text_B.device).long()
    start_WC = start_N.view(crops, windows).T  # so that each window holds text from all over, every domain in it
    routings: list[Routing] = []
    hooks = [layer.router.register_forward_hook(lambda _, __, out: routings.append(out)) for layer in model.moe_layers]
    nats, loads, dropped, total = 0.0, [], 0, 0
    for start_C in start_WC:
        bytes_CL = text_B[start_C[:, None] + torch.arange(length + 1, device=text_B.device)].long()
        routings.clear()
        logits_CLV = model(bytes_CL[:, :-1]).float()
        nats += float(F.cross_entropy(logits_CLV.flatten(0, 1), bytes_CL[:, 1:].flatten()))
        counts_LE = torch.stack([routing.counts_E for routing in routings])
        loads.append(max_over_mean(counts_LE))
        total += int(counts_LE.sum())
        if moe.capacity_factor is not None:
            room = capacity(crops * length, moe.top_k, moe.num_experts, moe.capacity_factor)
            dropped += int((counts_LE - room).clamp(min=0).sum())
    for hook in hooks:
        hook.remove()
    return nats / windows / math.log(2), torch.stack(loads).mean(dim=0), dropped / total


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values.tolist())


_corpus = lru_cache(maxsize=1)(load_corpus)  # once a process


def _work(name: str, base: TrainConfig, path: Path, device: str, windows: int) -> Run:
    torch.set_num_threads(1 if device != "cpu" else torch.get_num_threads())
    return run(name, base, _corpus(path), device=device, windows=windows)


def run_all(
    names: Sequence[str],
    seeds: int,
    base: TrainConfig,
    corpus: Path,
    out: Path,
    *,
    device: str = "cpu",
    workers: int = 1,
    windows: int = 64,
    limit: float = math.inf,
) -> BalanceRuns:
    """Every method with seed 0, then with seed 1 and so on, `workers` at a time; the file is whole after each run.

    Runs that the file holds already are not run again. No run starts after `limit` seconds. An error in one ends
    them all. Raises `ValueError` for a file of other settings.
    """
    queue = [(name, dataclasses.replace(base, seed=seed)) for seed in range(seeds) for name in names]
    for name, config in queue:
        config_of(name, config)  # refused before anything runs
    order = {(name, config.seed): i for i, (name, config) in enumerate(queue)}
    about = _about(base, device, windows)
    done = _kept(out, about)
    have = {(run.method, run.seed) for run in done}
    queue = [(name, config) for name, config in queue if (name, config.seed) not in have]
    began = time.monotonic()
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(queue), desc="balance", unit="run", file=sys.stderr) as bar,
    ):
        busy: set[Future[Run]] = set()
        while queue or busy:
            while queue and len(busy) < workers and time.monotonic() - began < limit:
                name, config = queue.pop(0)
                busy.add(pool.submit(_work, name, config, corpus, device, windows))
            if not busy:
                break
            ready, busy = wait(busy, return_when=FIRST_COMPLETED)
            done += [future.result() for future in ready]
            done.sort(key=lambda run: order.get((run.method, run.seed), len(order)))
            BalanceRuns(about, tuple(done)).save(out)
            bar.update(len(ready))
    return BalanceRuns(about, tuple(done))


def _kept(out: Path, about: dict[str, Any]) -> list[Run]:
    """What a file holds already of runs with these settings."""
    if not out.exists():
        return []
    kept = BalanceRuns.read(out)
    for name, value in json.loads(json.dumps(about)).items():
        if kept.about.get(name) != value:
            raise ValueError(f"{out.name} holds runs with {name}={kept.about.get(name)!r:.200}, not {value!r:.200}")
    return list(kept.runs)


def _about(base: TrainConfig, device: str, windows: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    strength = {name: method(name).coefficient for name in METHODS}
    versions = {"torch": str(torch.__version__)}
    about = {"device": gpu, "versions": versions, "windows": windows, "window": WINDOW, "last_steps": LAST}
    return about | {"coefficients": strength, "config": base.to_dict()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab balance`."""
    parser.add_argument("--corpus", type=Path, required=True, help="file written by moe-lab corpus")
    parser.add_argument("--out", type=new_file, required=True, help="JSON file of the results, whole after every run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", default=list(TRAINED), metavar="METHOD", help="by name (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--batch", type=int, default=BASE.batch, help="crops a step")
    parser.add_argument("--windows", type=int, default=64, help=f"held-out windows of {WINDOW} bytes")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, on one device")
    parser.add_argument("--limit", type=float, default=math.inf, help="start no run after this many seconds")


def main(args: argparse.Namespace) -> None:
    """Run everything and print a line a method."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={args.device!r}: PyTorch sees no GPU here, choose 'cpu'")
    for name in ("seeds", "workers", "windows"):
        check_int(name, getattr(args, name), 1)
    cuda = args.device.startswith("cuda")
    model = dataclasses.replace(BASE.model, moe=BASE.model.moe.replace(backend="grouped" if cuda else "loop"))
    base = dataclasses.replace(
        BASE, model=model, steps=args.steps, batch=args.batch, dtype="bfloat16" if cuda else "float32"
    )
    chosen = {"workers": args.workers, "windows": args.windows, "limit": args.limit}
    found = run_all(args.methods, args.seeds, base, args.corpus, args.out, device=args.device, **chosen)
    for name in found.methods:
        bits, load = found.paired(name), found.load(name)
        print(f"{name:<24} bits {bits.mean:+.4f} ± {bits.half:.4f}  max/mean {load.mean:.3f} ± {load.half:.3f}")
