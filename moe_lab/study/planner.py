"""What a training step of the language model needs in memory on the fullest rank, by formula, before it runs.

T tokens a rank, R = T * K * load rows on the rank of a layer, N = dp * sp * ep ranks; float32, 4 bytes a number.

| term        | bytes                                                                                        |
|-------------|----------------------------------------------------------------------------------------------|
| parameters  | 4 * the sum over weights of the largest shard: ceil(cut dimension / ranks) * the others      |
| gradients   | as parameters                                                                                |
| optimizer   | 2 * parameters (the moments of AdamW), and 4 a weight for its step                           |
| activations | what autograd keeps until backward: see `activations`                                        |
| receive     | 4 * R * D, the rows of one layer as they arrive from the other ranks; none for ep = 1        |
| gathered    | whole weights outside the blocks, and of one block but its gate: none for N = 1              |
| logits      | 4 * 2 * T * 256: gradients of the logits and log-probabilities, where backward begins        |

The most at once is in backward: parameters, optimizer, weights outside blocks, and the largest of its stages. It
begins with all activations and the logits' gradients. In a block, activations are left of this one and those before,
but of what follows the last; there are gradients of the head and of the blocks done, cut, and what a moment needs: see
`_in_experts` and `_in_attention`. Sums and gathers take a second buffer, as gloo's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from moe_lab.config import check_int
from moe_lab.models.lm import VOCAB, LMConfig, MoELM
from moe_lab.parallel.sharding import check_layout, expert_dim
from moe_lab.study.load import packing_order
from moe_lab.study.ranks import block_placement, forward_rows
from moe_lab.study.trace import RoutingTrace

FLOAT, INT = 4, 8


@dataclass(frozen=True)
class Layout:
    """`ranks` ranks as (dp, sp, ep). `ValueError` unless `ep` and `sp` divide them."""

    ranks: int
    ep: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name in ("ranks", "ep", "sp"):
            check_int(name, getattr(self, name), 1)
        if self.ranks % self.ep:
            raise ValueError(f"ep={self.ep} must divide the {self.ranks} ranks")
        if self.ranks % (self.ep * self.sp):
            raise ValueError(f"sp={self.sp} must divide the {self.ranks // self.ep} ranks beside ep={self.ep}")

    @property
    def replicas(self) -> int:
        """Ranks that hold parts of the same experts, over dp and sp."""
        return self.ranks // self.ep

    def positions(self, config: LMConfig) -> int:
        """Positions of each of its sequences on a rank, where they are longest."""
        return math.ceil(config.max_length / self.sp)


class Footprint(NamedTuple):
    """Bytes of the fullest rank, by term."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    receive: int
    gathered: int
    logits: int
    peak: int


def plan(config: LMConfig, layout: Layout, tokens: int, load: float | Sequence[float] = 1.0) -> Footprint:
    """The footprint of one step with `tokens` tokens a rank, where the fullest rank has `load` times the mean rows.

    `load`: in every layer, or of each. Over `sp` a rank has ceil(max_length / sp) positions of each of its sequences.
    For float32, backend "loop", dropless routing, sequences of `max_length`, no recompute. `ValueError` for what does
    not divide, and for settings that the formulas do not cover.
    """
    check_int("tokens", tokens, 1)
    moe = config.moe
    loads = [load] * config.num_layers if isinstance(load, (int, float)) else list(load)
    if len(loads) != config.num_layers or not all(0 <= one <= layout.ep for one in loads):
        raise ValueError(f"load={load!r} must be of 1 or {config.num_layers} layers, from 0 to ep={layout.ep}")
    if moe.backend != "loop" or moe.mlp_bias or moe.shared_expert_gate or moe.score_before_experts:
        raise ValueError("planned are backend='loop', scores after experts, no biases and no gate of shared experts")
    positions = layout.positions(config)
    if moe.capacity_factor is not None or tokens % positions:
        raise ValueError(
            f"tokens={tokens} must be {positions} positions of each of some sequences of {config.max_length} over "
            f"sp={layout.sp}, and nothing dropped"
        )
    check_layout(moe, layout.replicas, layout.ep)
    shapes = weights(config)
    parameters = FLOAT * sum(shard(config, layout, name, shape) for name, shape in shapes.items())
    optimizer = 2 * parameters + FLOAT * len(shapes)
    rows_L = [math.ceil(round(tokens * moe.top_k * one, 6)) for one in loads]  # n / T / K may be a bit above n
    outside, block = gathered(shapes, layout)
    logits = FLOAT * 2 * tokens * VOCAB
    kept = activations(config, layout, tokens, rows_L)
    stages = [kept + logits]
    for stage in (_in_experts, _in_attention) if layout.sp > 1 else (_in_experts,):
        stages += [stage(config, layout, tokens, rows_L[: n + 1], block) for n in range(config.num_layers)]
    return Footprint(
        parameters=parameters,
        gradients=parameters,
        optimizer=optimizer,
        activations=kept,
        receive=FLOAT * max(rows_L) * moe.dim if layout.ep > 1 else 0,
        gathered=outside + block,
        logits=logits,
        peak=parameters + optimizer + outside + max(stages),
    )


def beforehand(config: LMConfig, layout: Layout, tokens: int, trace: RoutingTrace) -> Footprint:
    """What all but one of a thousand steps stay within, if they route as a trace of the model does: p99.9 by term.

    Every forward of the trace, packed as `rank_load` packs it, is planned on each rank with the rows of each of its
    layers: they are seldom all full at once. A trace of fewer forwards than a thousand gives its fullest; one shorter
    than a forward is one. `ValueError` for a trace of other layers or experts, and as `plan` does.
    """
    shape = (config.num_layers, config.moe.num_experts, config.moe.top_k)
    if (trace.num_layers, trace.num_experts, trace.top_k) != shape:
        raise ValueError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, top {trace.top_k}, the model "
            f"{shape[0]} of {shape[1]}, top {shape[2]}"
        )
    if layout.ep == 1:
        return plan(config, layout, tokens)  # a rank has all experts
    rank_E = block_placement(trace.num_experts, layout.ep)
    packed = max(1, min(tokens, int(trace.valid_T.sum()) // layout.ep))
    rows_WLR = forward_rows(trace, packing_order(trace), rank_E, layout.ep, packed)
    loads_NL = rows_WLR.transpose(1, 2).flatten(0, 1) / (packed * trace.top_k)
    planned = np.array([plan(config, layout, tokens, load_L) for load_L in loads_NL.tolist()])
    by_forward = planned.reshape(-1, layout.ep, planned.shape[1]).max(axis=1)
    return Footprint(*np.quantile(by_forward, 0.999, axis=0, method="higher").tolist())


def _in_experts(config: LMConfig, layout: Layout, tokens: int, rows_L: Sequence[int], block: int) -> int:
    """Bytes as the last of the blocks whose rows are given undoes its experts, beside weights that are always there.

    The most of these moments, each beside what is kept of blocks so far and gradients of the head, of blocks done and
    of this one's output, over sp of that of its layer too:

    - combine is undone: its outputs, their gradients, and the products that give those of the gates;
    - then the outputs are gone, and an expert is undone, at most of all rows: gradients of its outputs, and of its
      input by two weights, where three of its four activations are gone. With ep > 1 at least what came from other
      ranks and the same in the experts' order;
    - all are undone: gradients of weights by expert, those of one of the three stacked, and of the input twice;
    - gradients of the experts' weights are summed over ranks, from one buffer by another to this rank's part, while
      those of one weight are still there;
    - dense weights of the block before are gathered, from one buffer to another, beside this one's.
    """
    moe = config.moe
    experts, dense = _block_weights(config, layout)
    outputs, row, hidden = (
        FLOAT * n for n in (tokens * moe.top_k * moe.dim, rows_L[-1] * moe.dim, rows_L[-1] * moe.hidden_dim)
    )
    done = config.num_layers - len(rows_L)
    always = sum(block_activations(config, layout, tokens, rows) for rows in rows_L) - outputs
    always += FLOAT * VOCAB * moe.dim + done * (experts // layout.replicas + dense // layout.ranks)
    always += FLOAT * tokens * moe.dim * (1 if layout.sp == 1 else 2)
    still_whole = dense if done and layout.ranks > 1 else 0
    moments = [
        3 * outputs + block + still_whole,
        row + max(row if layout.ep > 1 else 0, 2 * row - 3 * hidden) + experts + block + still_whole,
        2 * row - 4 * hidden + experts + experts // 3 + block + still_whole,
    ]
    if layout.ranks > 1:
        mine, whole = experts // layout.replicas, block - experts
        moments.append(row - 4 * hidden + 2 * experts + experts // 3 + mine + whole)
        if len(rows_L) > 1:
            moments.append(row - 4 * hidden + experts + mine + 3 * whole)
    return always + max(moments)


def _in_attention(config: LMConfig, layout: Layout, tokens: int, rows_L: Sequence[int], block: int) -> int:
    """The same as it brings the gradients of keys and values home."""
    moe = config.moe
    experts, dense = _block_weights(config, layout)
    done = config.num_layers - len(rows_L)
    cut = experts // layout.replicas + dense // layout.ranks
    gradients = FLOAT * VOCAB * moe.dim + experts // layout.replicas + dense + done * cut
    still_whole = block if done else 0
    kept = sum(block_activations(config, layout, tokens, rows) for rows in rows_L[:-1])
    kept += FLOAT * tokens * (8 * moe.dim + 1 + 2 * config.num_heads)
    moving = 3 if config.max_length % layout.sp == 0 else 4
    return kept + gradients + dense + still_whole + moving * FLOAT * 2 * layout.sp * tokens * moe.dim


def _block_weights(config: LMConfig, layout: Layout) -> tuple[int, int]:
    """Bytes of the experts of a block that a rank computes with, and of everything else in a block, whole."""
    sizes = {n: s.numel() for n, s in weights(config).items() if n.startswith("blocks.0.")}
    experts = sum(size // layout.ep for name, size in sizes.items() if ".experts." in name)
    return FLOAT * experts, FLOAT * sum(size for name, size in sizes.items() if ".experts." not in name)


@cache
def weights(config: LMConfig) -> dict[str, torch.Size]:
    """Shapes of all weights by name; nothing is allocated."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in MoELM(config).named_parameters()}


def shard(config: LMConfig, layout: Layout, name: str, shape: torch.Size) -> int:
    """Numbers of one weight on the rank that holds the largest part."""
    if ".experts." not in name:
        return math.ceil(shape[0] / layout.ranks) * shape[1:].numel()
    dim = expert_dim(config.moe, name.rsplit(".", 1)[1], layout.replicas, layout.ep)
    local = [shape[0] // layout.ep, *shape[1:]]
    local[dim] = math.ceil(local[dim] / layout.replicas)
    return math.prod(local)


def gathered(shapes: dict[str, torch.Size], layout: Layout) -> tuple[int, int]:
    """Bytes of whole weights at hand while a block runs: those outside blocks, and the block's.

    Of experts only this rank's; the gate is gathered, used and freed before them.
    """
    if layout.ranks == 1:
        return 0, 0
    outside = sum(shape.numel() for name, shape in shapes.items() if not name.startswith("blocks."))
    block = {n: s.numel() for n, s in shapes.items() if n.startswith("blocks.0.") and ".router." not in n}
    mine = sum(size // layout.ep if ".experts." in name else size for name, size in block.items())
    return FLOAT * outside, FLOAT * mine


def activations(config: LMConfig, layout: Layout, tokens: int, rows_L: Sequence[int]) -> int:
    """Bytes kept from forward to backward, with so many rows in each layer.

    Beside its blocks the model keeps its last norm, log-probabilities, rotary table, input bytes and targets, and one
    number of the loss; over sp also which of the logits are of real positions, twice.
    """
    moe = config.moe
    rotary = layout.positions(config) * moe.dim // config.num_heads
    ends = FLOAT * (tokens * (3 * moe.dim + 1) + tokens * VOCAB + rotary + 1)
    ends += INT * (2 * tokens + (tokens // config.max_length if layout.sp == 1 else 2 * tokens))
    return ends + sum(block_activations(config, layout, tokens, rows) for rows in rows_L)


def block_activations(config: LMConfig, layout: Layout, tokens: int, rows: int) -> int:
    """Bytes that one block keeps.

    In floats: of each norm its input, its normalised rows, its output and one scale a token; of attention q, k, v, the
    rotated q, the output twice and 3 scales a head, the rotated k; scores T * E; expert inputs R * D and four times
    R * F; the T * K outputs; four times the shared experts' width. And 3 integers an assignment. Over sp keys and
    values of whole sequences are kept in place of the rotated k, what each position may look at, and 4 integers a token
    that say which are real.
    """
    moe = config.moe
    norm = tokens * (3 * moe.dim + 1)
    attention = tokens * (6 * moe.dim + 3 * config.num_heads)
    attention += tokens * moe.dim if layout.sp == 1 else _gathered_positions(config, layout, tokens)
    router = tokens * (moe.num_experts + moe.top_k)
    experts = rows * (moe.dim + 4 * moe.hidden_dim) + tokens * moe.top_k * moe.dim
    shared = 4 * tokens * moe.num_shared_experts * moe.hidden_dim
    integers = 3 * tokens * moe.top_k + (4 * tokens if layout.sp > 1 else 0)
    return FLOAT * (2 * norm + attention + router + experts + shared) + INT * integers


def _gathered_positions(config: LMConfig, layout: Layout, tokens: int) -> int:
    """Numbers that attention keeps of other ranks' positions: keys and values of all, and a mask (l, L)."""
    return 2 * layout.sp * tokens * config.moe.dim + layout.positions(config) * config.max_length
