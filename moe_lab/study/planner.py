"""What a training step of the language model needs in memory on the fullest rank, by formula, before it runs.

T tokens a rank, R = T * K * load rows on the rank of a layer, N = dp * sp * ep ranks; b bytes a number of `dtype`, 4 or
2. Shards of weights, their gradients and moments are float32 in either.

| term        | bytes                                                                                        |
|-------------|----------------------------------------------------------------------------------------------|
| parameters  | 4 * the sum over weights of the largest shard: ceil(cut dimension / ranks) * the others      |
| gradients   | as parameters                                                                                |
| optimizer   | 2 * parameters (the moments of AdamW), and 4 a weight for its step                           |
| activations | what is kept until backward: see `Step.activations`                                          |
| receive     | b * R * D, the rows of one layer as they arrive from the other ranks; none for ep = 1        |
| gathered    | b * whole weights outside the blocks, and of one block but its gate: none for N = 1          |
| logits      | 4 * 2 * T * 256: gradients of the logits and log-probabilities, where backward begins        |

The most at once is in backward: parameters, optimizer, weights outside blocks, and the largest of its stages. It
begins with all activations and the logits' gradients, or those of the head (`Step.in_head`). In a block, activations
are left of this one and those before, with checkpointing of this one alone; `Step.in_block` has its stages. They are of
gloo, which copies the gradients that it sums: without copies there is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
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
GENERATOR = 5056  # the state of the CPU's random numbers, which a checkpoint keeps


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


def plan(
    config: LMConfig,
    layout: Layout,
    tokens: int,
    load: float | Sequence[float] = 1.0,
    *,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
) -> Footprint:
    """The footprint of one step with `tokens` tokens a rank, where the fullest rank has `load` times the mean rows.

    `load`: in every layer, or of each. `dtype` (None is float32) and `checkpointing`: as of `shard_moe`. Over `sp` a
    rank has ceil(max_length / sp) positions of each of its sequences. For backend "loop", dropless routing, sequences
    of `max_length`. `ValueError` for what does not divide, and for settings that the formulas do not cover.
    """
    step = Step(config, layout, tokens, dtype or torch.float32, checkpointing)
    moe = config.moe
    loads = [load] * config.num_layers if isinstance(load, (int, float)) else list(load)
    if len(loads) != config.num_layers or not all(0 <= one <= layout.ep for one in loads):
        raise ValueError(f"load={load!r} must be of 1 or {config.num_layers} layers, from 0 to ep={layout.ep}")
    shapes = weights(config)
    parameters = FLOAT * sum(shard(config, layout, name, shape) for name, shape in shapes.items())
    optimizer = 2 * parameters + FLOAT * len(shapes)
    rows_L = [math.ceil(round(tokens * moe.top_k * one, 6)) for one in loads]  # n / T / K may be a bit above n
    outside, block = step.gathered()
    logits = FLOAT * 2 * tokens * VOCAB
    kept = step.activations(rows_L)
    stages = [kept + logits, kept + step.in_head()]
    for n in range(config.num_layers):
        stages += step.in_block(rows_L[: n + 1]).values()
    return Footprint(
        parameters=parameters,
        gradients=parameters,
        optimizer=optimizer,
        activations=kept,
        receive=step.size * max(rows_L) * moe.dim if layout.ep > 1 else 0,
        gathered=outside + block,
        logits=logits,
        peak=parameters + optimizer + outside + max(stages),
    )


def beforehand(
    config: LMConfig,
    layout: Layout,
    tokens: int,
    trace: RoutingTrace,
    *,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
) -> Footprint:
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
    planned_at = partial(plan, config, layout, tokens, dtype=dtype, checkpointing=checkpointing)
    if layout.ep == 1:
        return planned_at()  # a rank has all experts
    rank_E = block_placement(trace.num_experts, layout.ep)
    packed = max(1, min(tokens, int(trace.valid_T.sum()) // layout.ep))
    rows_WLR = forward_rows(trace, packing_order(trace), rank_E, layout.ep, packed)
    loads_NL = rows_WLR.transpose(1, 2).flatten(0, 1) / (packed * trace.top_k)
    planned = np.array([planned_at(load_L) for load_L in loads_NL.tolist()])
    by_forward = planned.reshape(-1, layout.ep, planned.shape[1]).max(axis=1)
    return Footprint(*np.quantile(by_forward, 0.999, axis=0, method="higher").tolist())


@dataclass(frozen=True)
class Step:
    """A step of the rank that is planned, with `tokens` tokens. `ValueError` for what the formulas do not cover."""

    config: LMConfig
    layout: Layout
    tokens: int
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, 1)
        config, layout, moe = self.config, self.layout, self.config.moe
        if moe.backend != "loop" or moe.mlp_bias or moe.shared_expert_gate or moe.score_before_experts:
            raise ValueError(
                "planned are backend='loop', scores after experts, no biases and no gate of shared experts"
            )
        positions = layout.positions(config)
        if moe.capacity_factor is not None or self.tokens % positions:
            raise ValueError(
                f"tokens={self.tokens} must be {positions} positions of each of some sequences of {config.max_length} "
                f"over sp={layout.sp}, and nothing dropped"
            )
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={self.dtype} must be torch.float32 or torch.bfloat16")
        if layout.ranks == 1 and (self.low or self.checkpointing):
            raise ValueError("one process is planned in float32 without checkpointing")
        check_layout(moe, layout.replicas, layout.ep)

    @property
    def size(self) -> int:
        """Bytes of a number of gathered weights and what is computed with them."""
        return self.dtype.itemsize

    @property
    def low(self) -> bool:
        """Whether that is fewer than of float32, so that what is computed in float32 is copied."""
        return self.size < FLOAT

    def gathered(self) -> tuple[int, int]:
        """Bytes of whole weights at hand while a block runs: those outside blocks, and the block's.

        Of experts only this rank's; the gate is gathered, used and freed before them.
        """
        if self.layout.ranks == 1:
            return 0, 0
        outside = sum(shape.numel() for name, shape in weights(self.config).items() if not name.startswith("blocks."))
        experts, dense, gate = block_weights(self.config, self.layout.ep)
        return self.size * outside, self.size * (experts + dense - gate)

    def activations(self, rows_L: Sequence[int]) -> int:
        """Bytes kept from forward to backward, with so many rows in each layer.

        Beside its blocks the model keeps its last norm, log-probabilities, rotary table, input bytes and targets, and
        one number of the loss; over sp also which of the logits are of real positions, twice. The targets of one whole
        sequence lie among its inputs.
        """
        tokens = self.tokens
        ends = self._norm() + self.size * tokens * self.config.moe.dim + FLOAT * (tokens * VOCAB + 1)
        sequences = tokens // self.config.max_length
        ends += INT * (4 * tokens if self.layout.sp > 1 else min(sequences, 2) * tokens + sequences)
        return ends + FLOAT * self._rotary() + self._kept(rows_L)

    def _kept(self, rows_L: Sequence[int]) -> int:
        """Bytes that blocks keep."""
        if self.checkpointing:
            return len(rows_L) * self.checkpoint()
        return sum(self.block_activations(rows) for rows in rows_L)

    def checkpoint(self) -> int:
        """Bytes that a block keeps to run again: its input and a state of random numbers."""
        return self.size * self.tokens * self.config.moe.dim + GENERATOR

    def block_activations(self, rows: int) -> int:
        """Bytes that one block keeps, or has there again.

        In numbers of `dtype`: outputs of both norms, q, k, v, the rotated q, the attention's output twice, the rotated
        k; expert inputs R * D and four times R * F; the T * K outputs; four times the shared experts' width. In
        float32: of each norm its input, its normalised rows and one scale a token; 3 scales a head; scores T * E and
        gates T * K. And 3 integers an assignment. Over sp keys and values of whole sequences are kept in place of the
        rotated k, what each position may look at, and 4 integers a token that say which are real.

        In bfloat16 also copies in float32 of q and k and of the router's input. Then q, k and v themselves are kept for
        v alone, which over sp is among those of whole sequences; and the second norm's output only for shared experts.
        """
        moe, tokens, spread = self.config.moe, self.tokens, self.layout.sp > 1
        per_token = 2 * moe.dim  # outputs of the norms
        per_token += 6 * moe.dim + (0 if spread else moe.dim)
        per_token += moe.top_k * moe.dim + 4 * moe.num_shared_experts * moe.hidden_dim
        wide = tokens * (3 * self.config.num_heads + moe.num_experts + moe.top_k)
        if self.low:
            per_token -= (3 * moe.dim if spread else 0) + (0 if moe.num_shared_experts else moe.dim)
            wide += tokens * 3 * moe.dim
        numbers = tokens * per_token + rows * (moe.dim + 4 * moe.hidden_dim)
        numbers += self._gathered_positions() if spread else 0
        integers = 3 * tokens * moe.top_k + (4 * tokens if spread else 0)
        return self.size * numbers + 2 * self._norm() + FLOAT * wide + INT * integers

    def in_head(self) -> int:
        """Bytes beside all activations as the head is undone: its gradients, and the last block's dense weights.

        The gradient of the logits is in place of the log-probabilities. In bfloat16 a CPU's product copies its factors
        and sums in float32 (oneDNN); elsewhere in a step that is less than what is planned.
        """
        dim, tokens = self.config.moe.dim, self.tokens
        _, dense, _ = block_weights(self.config, self.layout.ep)
        found = self.size * (VOCAB * dim + tokens * dim) + (self.size - FLOAT) * tokens * VOCAB
        if self.low:
            found += FLOAT * VOCAB * dim + self.size * tokens * (VOCAB + dim)
        return found + (self.size * dense if self.layout.ranks > 1 else 0)

    def in_block(self, rows_L: Sequence[int]) -> dict[str, int]:
        """Bytes by stage of backward through the last of the blocks whose rows are given, beside what is always there.

        In each: input bytes, the rotary table, what blocks before this one keep, gradients of the head, of blocks done
        and of this block's output; its activations, until they are said to be gone. In order:

        - gather: its weights, its experts' twice, and gradients of the block after it, which were summed last and are
          still whole. With checkpointing it has run again by now: its experts' outputs are there once more, and the
          router's logits; over ep outputs are on their way home, beside those of shared experts.
        - combine: two products of the outputs in float32, and the outputs copied to it; over sp the gradient once more.
        - returned, over ep: outputs are gone; their gradients are there as they came and in the experts' order.
        - expert: it is undone, at most of all rows: gradients of its outputs and of its inputs by two weights are
          there, where three of its four activations are gone.
        - experts: all between outputs and inputs is gone; there are gradients of weights, of the inputs and of the
          block's input, then of the inputs twice more, or of one of three weights once more.
        - reduce: of experts' weights only gradients are left, in float32 twice, and summed; one of three as it came.
        - router: those summed, and once whole; the dense weights of the block before twice.
        - attention, over sp: left are the first norm, q, k, v and the gradient of q; the gradients of keys and values
          of whole sequences are there three times, or four where padding copies them.
        - dense: gradients of all else in float32 twice, and summed.
        """
        moe, layout, tokens, size = self.config.moe, self.layout, self.tokens, self.size
        experts, dense, gate = block_weights(self.config, self.layout.ep)
        done, spread = self.config.num_layers - len(rows_L), layout.ranks > 1
        inputs, outputs, stream = rows_L[-1] * moe.dim, tokens * moe.top_k * moe.dim, tokens * moe.dim
        shared = moe.num_shared_experts * moe.hidden_dim

        block = self.block_activations(rows_L[-1])
        if self.checkpointing and not self.low:
            block -= FLOAT * stream  # its input, which its checkpoint counts
        hidden = rows_L[-1] * moe.hidden_dim
        undone = block - size * (outputs + 4 * hidden + 4 * tokens * shared)
        gathered = size * (experts + dense - gate) + FLOAT * gate if spread else 0
        gathered += FLOAT * (dense - gate) if spread and done else 0
        gradients = size * (3 * shared * moe.dim + stream)  # of shared experts and of the block's input
        summed = FLOAT * experts // layout.replicas
        twice = size * experts if layout.replicas > 1 else 0

        stages = {
            "gather": block + gathered + twice,
            "combine": block + gathered + FLOAT * (3 if self.low else 2) * outputs,
            "expert": block + gathered + size * (experts + 3 * inputs - 3 * hidden - outputs),
            "experts": undone + gathered + gradients + size * (experts + inputs + max(2 * inputs, experts // 3)),
        }
        if layout.ep > 1:
            stages["returned"] = block + gathered + size * (2 * inputs - outputs)
        if self.checkpointing:
            running = inputs if layout.ep == 1 else 2 * inputs + stream
            stages["gather"] += size * running + FLOAT * tokens * moe.num_experts + GENERATOR
        if spread:
            gradients += size * dense
            before = size * dense if len(rows_L) > 1 else 0
            stages["reduce"] = undone + gradients + 2 * FLOAT * experts + summed + twice // 3
            stages["router"] = undone - size * inputs + gradients + FLOAT * experts + summed + 2 * before
            stages["dense"] = (2 * FLOAT + size) * dense + summed + FLOAT * dense // layout.ranks
        if layout.sp > 1:
            stages["combine"] += size * stream
            heads = (
                2 * (FLOAT + size) if self.low else 5 * FLOAT
            ) * stream + FLOAT * 2 * tokens * self.config.num_heads
            copies = 3 if self.config.max_length % layout.sp == 0 else 4
            moving = size * copies * 2 * layout.sp * stream
            stages["attention"] = self._norm() + heads + 2 * size * dense + summed + moving

        always = INT * tokens + FLOAT * self._rotary() + size * (VOCAB * moe.dim + stream)
        always += self._kept(rows_L if self.checkpointing else rows_L[:-1])
        always += done * (summed + FLOAT * dense // layout.ranks)
        return {name: always + there for name, there in stages.items()}

    def _norm(self) -> int:
        """Bytes in float32 that a norm keeps: its input, its normalised rows and one scale a token."""
        return FLOAT * self.tokens * (2 * self.config.moe.dim + 1)

    def _rotary(self) -> int:
        """Numbers of the rotary table."""
        return self.layout.positions(self.config) * self.config.moe.dim // self.config.num_heads

    def _gathered_positions(self) -> int:
        """Numbers that attention keeps of other ranks' positions: keys and values of all, and a mask (l, L)."""
        keys_and_values = 2 * self.layout.sp * self.tokens * self.config.moe.dim
        return keys_and_values + self.layout.positions(self.config) * self.config.max_length


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


@cache
def block_weights(config: LMConfig, ep: int) -> tuple[int, int, int]:
    """Numbers of the experts of a block that a rank computes with, of all else in a block, and of the gate in that."""
    sizes = {n: s.numel() for n, s in weights(config).items() if n.startswith("blocks.0.")}
    experts = sum(size // ep for name, size in sizes.items() if ".experts." in name)
    dense = sum(size for name, size in sizes.items() if ".experts." not in name)
    return experts, dense, sum(size for name, size in sizes.items() if ".router." in name)
