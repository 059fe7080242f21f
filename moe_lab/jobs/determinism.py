"""The ladder of determinism of this machine, and what batch invariance costs on it: `moe-lab determinism`.

Bits are compared over the shipped model's layer and text. Prices are of that layer on a CPU; on CUDA of 10B_2B over
drawn tokens, since the small layer says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moe_lab import data
from moe_lab.config import MoEConfig, check_choice, check_int
from moe_lab.jobs.exchange_runs import page_inputs
from moe_lab.jobs.exchange_table import cpu_model
from moe_lab.jobs.options import new_file
from moe_lab.layer.moe import MoE
from moe_lab.parallel.ranks import RankPool
from moe_lab.parallel.virtual import VirtualRanks
from moe_lab.parallel.wire import wire
from moe_lab.study import timing
from moe_lab.study.determinism import LEAST, Difference, Ladder, arms_on, climb, make_arm

FORMAT = "moe_lab determinism"
LAYER, TOKENS = 3, 640
PRICED = {"cpu": (1, 7, 64, 2529), "cuda": (1, 7, 256, 4096, 16384)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Price(NamedTuple):
    """Forward (or forward and backward) of a batch-invariant arm: ms, and its ratio to `base` in the same rounds."""

    layer: str
    dtype: str
    tokens: int
    direction: str
    arm: str
    base: str
    ms: float
    base_ms: float
    ratio: float
    low: float
    high: float


def on_rank(layer: int, arm: str, tokens: int) -> str:
    """Rank function: the bits, as a hash, of this rank's output and input gradient over its share of the tokens."""
    moe, x_TD = page_inputs(layer)
    moe = wire(make_arm(moe, arm).moe, dist.group.WORLD)
    x_TD = x_TD[:tokens].tensor_split(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    out_TD = moe(x_TD)
    return _bits_of(out_TD, *torch.autograd.grad(out_TD.sum(), x_TD))


def real_ranks(pool: RankPool, layer: int, arms: Sequence[str], tokens: int) -> dict[str, bool]:
    """By arm, whether every real rank has the bits of its virtual one. Both sides run on one thread."""
    moe, x_TD = page_inputs(layer)
    before, same = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for arm in arms:
            xs = [part.clone().requires_grad_() for part in x_TD[:tokens].tensor_split(pool.size)]
            outs = VirtualRanks(make_arm(moe, arm).moe, pool.size)(xs)
            grads = torch.autograd.grad(torch.stack([out.sum() for out in outs]).sum(), xs)
            virtual = [_bits_of(out, grad) for out, grad in zip(outs, grads)]
            same[arm] = pool.run(on_rank, layer, arm, tokens) == virtual
    finally:
        torch.set_num_threads(before)
    return same


def _bits_of(*tensors: Tensor) -> str:
    parts = (t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab determinism`."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=LAYER, help="of the shipped model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the shipped text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of timing (default: %(default)s)")
    parser.add_argument("--skip", choices=("bits", "price"), help="leave one half out")
    parser.add_argument("--json", type=new_file, help="write the results here, beside other machines'")


def main(args: argparse.Namespace) -> None:
    """Compare, time, print, write."""
    check_choice("device", args.device, ("cpu", "cuda"))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': no GPU is here")
    check_int("tokens", args.tokens, LEAST, len(page_inputs(args.layer)[1]))
    device = torch.device(args.device)
    machine = timing.environment(device)
    machine |= {} if device.type == "cuda" else {"device": f"{cpu_model()}, {torch.get_num_threads()} threads"}
    ladders = [] if args.skip == "bits" else [ladder for dtype in DTYPES for ladder in _bits(args, device, dtype)]
    prices = [] if args.skip == "price" else [price for dtype in DTYPES for price in _prices(args, device, dtype)]
    if args.json:
        result = {
            "environment": machine,
            "ladders": list(map(_plain, ladders)),
            "prices": [p._asdict() for p in prices],
        }
        _write(args.json, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    """Put one machine's results into a file, in place of what it held of a machine of that name."""
    others = json.loads(path.read_text())["machines"] if path.exists() else []
    others = [other for other in others if other["environment"]["device"] != result["environment"]["device"]]
    path.write_text(json.dumps({"format": FORMAT, "machines": [*others, result]}, indent=1) + "\n")


def _bits(args: argparse.Namespace, device: torch.device, dtype: str) -> list[Ladder]:
    moe, x_TD = page_inputs(args.layer)
    moe, x_TD = copy.deepcopy(moe).to(device, DTYPES[dtype]), x_TD[: args.tokens].to(device, DTYPES[dtype])
    ladders = []
    for arm in tqdm(arms_on(device, DTYPES[dtype]), f"bits, {dtype}", unit="arm", file=sys.stderr, disable=None):
        try:
            ladders.append(climb(moe, x_TD, arms=[arm]))
        except RuntimeError as error:  # products that this device does not have in this dtype
            print(f"{dtype} {arm}: {str(error).splitlines()[0]}", file=sys.stderr)
    cells = {name: cell for ladder in ladders for name, cell in ladder.cells.items()}
    ladder = ladders[0]._replace(cells=cells)
    print(f"{dtype}, {ladder.tokens} tokens, {ladder.device}")
    for name, cell in cells.items():
        for question, found in cell.items():
            print(f"  {name:<26}{question:<11}{_shown(found)}")
    return [ladder]


def _shown(found: Difference | None) -> str:
    if found is None:
        return "-"
    if found.stage is None:
        return "same"
    return f"{found.stage}: {100 * found.rows:.0f} % of rows, {found.ulps:.2g} ULP"


def _prices(args: argparse.Namespace, device: torch.device, dtype: str) -> list[Price]:
    if device.type == "cuda" and dtype == "float32":
        return []
    moe, x_TD, layer = _priced_layer(args.layer, device, DTYPES[dtype])
    arms = ("fused, batch_invariant", "fused") if device.type == "cuda" else ("blocked, batch_invariant", "loop")
    found = []
    for tokens in PRICED[device.type]:
        for direction in ("forward", "forward+backward"):
            run = {arm: partial(_step, make_arm(moe, arm).moe, x_TD[:tokens], direction) for arm in arms}
            timed = timing.interleave(run, device, rounds=args.rounds)
            times = {arm: timing.medians(runs) for arm, runs in timed.items()}
            ours, base = (timing.summarise(times[arm]) for arm in arms)
            ratio = timing.ratio(times[arms[0]], times[arms[1]])
            found.append(Price(layer, dtype, tokens, direction, *arms, ours.median, base.median, *ratio))
            print(
                f"{dtype} {tokens:>6} tokens {direction:<17}{ours.median:9.3f} ms, {ratio.median:.2f} "
                f"[{ratio.low:.2f}, {ratio.high:.2f}] x {arms[1]} ({base.median:.3f} ms), {layer}"
            )
    return found


def _priced_layer(layer: int, device: torch.device, dtype: torch.dtype) -> tuple[MoE, Tensor, str]:
    if device.type == "cpu":
        moe, x_TD = page_inputs(layer)
        return copy.deepcopy(moe).to(dtype), x_TD.to(dtype), f"shipped layer {layer}"
    with device:
        torch.manual_seed(0)
        moe = MoE(MoEConfig.preset("10B_2B")).to(dtype)
        return moe, torch.randn(max(PRICED["cuda"]), moe.config.dim).to(dtype), "10B_2B, drawn tokens"


def _step(moe: MoE, x_TD: Tensor, direction: str) -> None:
    if direction == "forward":
        with torch.no_grad():
            moe(x_TD)
        return
    x_TD = x_TD.detach().requires_grad_()
    out_TD = moe(x_TD)
    torch.autograd.grad(out_TD, (x_TD, *moe.parameters()), torch.ones_like(out_TD))


class Recorded(NamedTuple):
    """What one machine gave: its environment, a ladder a dtype, prices."""

    environment: dict[str, str]
    ladders: list[Ladder]
    prices: list[Price]


def recorded() -> list[Recorded]:
    """The shipped results, `data/determinism.json`, machine by machine."""
    stored = json.loads((data.root() / "determinism.json").read_text())
    return [
        Recorded(m["environment"], list(map(_ladder, m["ladders"])), [Price(**price) for price in m["prices"]])
        for m in stored["machines"]
    ]


def _ladder(stored: dict[str, Any]) -> Ladder:
    cells = {
        arm: {question: None if found is None else Difference(**found) for question, found in cell.items()}
        for arm, cell in stored["cells"].items()
    }
    return Ladder(**stored | {"cells": cells})


def _plain(ladder: Ladder) -> dict[str, Any]:
    cells = {
        arm: {question: None if found is None else found._asdict() for question, found in cell.items()}
        for arm, cell in ladder.cells.items()
    }
    return ladder._asdict() | {"cells": cells}
