"""The shipped model run under another method of balancing: what the counterfactual cannot know, its bits per byte."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from moe_lab.jobs.balance import max_over_mean
from moe_lab.jobs.evaluate import bits
from moe_lab.layer.router import Routing
from moe_lab.models.lm import MoELM
from moe_lab.study.balancing import method
from moe_lab.study.counterfactual import SETUP, Setup, learn
from moe_lab.study.trace import RoutingTrace

AS_TRAINED = "as trained"


class LiveRun(NamedTuple):
    """One model over some texts: bits per byte of them all, and max/mean of what experts were asked for, by layer."""

    method: str
    bits: float
    load_L: Float[Tensor, " L"]


def under(
    model: MoELM, name: str, state_LE: Float[Tensor, "L E"] | None = None, coefficient: float | None = None
) -> MoELM:
    """A model of the same weights under a method, its routers as in training where they differ from eval.

    `state_LE` is what the method learned (`study.counterfactual.learn`): the balancing bias, or an offset of logits for
    a loss; without it both are zero. `ValueError` for a method that cannot run live.
    """
    way = method(name)
    moe = way.config(model.config.moe, coefficient)
    offset = way.where == "loss" and state_LE is not None
    if offset:
        moe = moe.replace(router=dataclasses.replace(moe.router, gate_bias=True))
    made = MoELM(dataclasses.replace(model.config, moe=moe))
    made.load_state_dict(model.state_dict(), strict=False)
    made.eval()
    for i, layer in enumerate(made.moe_layers):
        layer.router.train()  # for Sinkhorn and jitter; the others do not tell
        layer.expert_bias_E.zero_()
        if state_LE is not None:
            target = layer.router.gate.bias.data if offset else layer.expert_bias_E
            target.copy_(state_LE[i])
    return made


def measure(model: MoELM, texts: Sequence[UInt8[Tensor, " _"]], name: str = AS_TRAINED) -> LiveRun:
    """Run each text by itself, as one micro-batch. Noise is drawn from a fixed seed."""
    seen: list[Routing] = []
    hooks = [moe.router.register_forward_hook(lambda _, __, out: seen.append(out)) for moe in model.moe_layers]
    scored = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for text_B in texts:
            scored += bits(model, [text_B], batch=1, progress=False)
    for hook in hooks:
        hook.remove()
    depth = len(model.moe_layers)
    counts_LE = torch.stack([routing.counts_E for routing in seen]).unflatten(0, (-1, depth)).sum(dim=0)
    return LiveRun(name, float(torch.cat(scored).mean()), max_over_mean(counts_LE))


def live(
    model: MoELM,
    texts: Sequence[UInt8[Tensor, " _"]],
    trace: RoutingTrace,
    names: Sequence[str],
    *,
    coefficients: Mapping[str, float] | None = None,
    setup: Setup = SETUP,
    progress: bool = True,
) -> list[LiveRun]:
    """The model as it was trained, then under each method, after it learned on the trace's logits."""
    runs = [measure(model, texts)]
    for name in tqdm(names, desc="live", unit="method", file=sys.stderr, disable=not progress):
        strength = (coefficients or {}).get(name)
        learns = method(name).where == "loss" or method(name).sets == "load_balance_coeff"
        state_LE = learn(trace, name, strength, setup=setup).state_LE if learns else None
        runs.append(measure(under(model, name, state_LE, strength), texts, name))
    return runs
