"""Where a run on ranks first sends a token to other experts than one process does, and how near a tie that was.

Ranks sum in a fixed order, so that the answer does not hang on the backend's.

python -m moe_lab.jobs.first_flip "EP 4" --seed 1
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.jobs.layouts import LAYOUTS, SHRUNK, difference, source_text
from moe_lab.jobs.train import TrainConfig, Trainer
from moe_lab.jobs.train_distributed import DistributedTrainer
from moe_lab.layer.router import Routing
from moe_lab.parallel.ranks import RankPool
from moe_lab.study.planner import Layout


class Choices(NamedTuple):
    """Of S steps: losses, in each layer the values that experts are chosen by, and the experts, ascending."""

    losses: list[float]
    values_SLTE: Float[Tensor, "S L T E"]
    ids_SLTK: Int[Tensor, "S L T K"]


class Flip(NamedTuple):
    """A token whose experts differ, counted from 0, and its two candidates: one process's and the ranks'.

    `gap` and `gap_on_ranks`: how far the first is above the second. `rounding`: the largest difference of a value of
    that layer and step between both runs. `before` and `after`: of a step's loss, relative, up to that step and from
    it on. `tokens`: how many differ in that layer and step.
    """

    step: int
    layer: int
    token: int
    experts: tuple[int, int]
    gap: float
    gap_on_ranks: float
    rounding: float
    before: float
    after: float
    tokens: int


def watched(trainer: Trainer) -> Choices:
    """All steps of a run, watched."""
    values, ids = [], []

    def keep(router: object, args: tuple[Tensor, Tensor], routing: Routing) -> None:
        values.append(routing.scores_TE.detach() + args[1])
        ids.append(routing.expert_ids_TK.sort(dim=1).values)

    for moe in trainer.model.moe_layers:
        moe.router.register_forward_hook(keep)
    losses = [float(trainer.advance().losses.cross_entropy) for _ in range(trainer.config.steps)]
    num_layers = len(trainer.model.moe_layers)
    return Choices(losses, *(torch.stack(kept).unflatten(0, (-1, num_layers)) for kept in (values, ids)))


def on_rank(config: TrainConfig, layout: Layout) -> Choices:
    """One rank's tokens."""
    return watched(DistributedTrainer(config, source_text(), "cpu", ep=layout.ep, fixed_order=True))


def on_ranks(pool: RankPool, config: TrainConfig, layout: Layout) -> Choices:
    """All ranks' tokens, in the batch's order."""
    losses, values, ids = zip(*pool.run(on_rank, config, layout))
    return Choices(losses[0], torch.cat(values, dim=2), torch.cat(ids, dim=2))


def first_flip(one: Choices, ranks: Choices) -> Flip | None:
    """The first token that goes elsewhere; None where all go to the same experts."""
    differ_SLT = (one.ids_SLTK != ranks.ids_SLTK).any(dim=-1)
    if not differ_SLT.any():
        return None
    step, layer, token = (int(index) for index in differ_SLT.nonzero()[0])
    ours, theirs = (set(c.ids_SLTK[step, layer, token].tolist()) for c in (one, ranks))
    pair = min(ours - theirs), min(theirs - ours)
    gap, gap_on_ranks = (
        float(c.values_SLTE[step, layer, token, list(pair)].double().diff().neg()) for c in (one, ranks)
    )
    return Flip(
        step,
        layer,
        token,
        pair,
        gap,
        gap_on_ranks,
        rounding=float((one.values_SLTE - ranks.values_SLTE)[step, layer].abs().max()),
        before=difference(ranks.losses[:step], one.losses[:step]) if step else 0.0,
        after=difference(ranks.losses[step:], one.losses[step:]),
        tokens=int(differ_SLT[step, layer].sum()),
    )


def main() -> None:
    """Both runs, and what comes of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("layout", choices=[name for name, layout in LAYOUTS.items() if layout.sp == 1])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, layout = dataclasses.replace(SHRUNK, seed=args.seed), LAYOUTS[args.layout]
    with RankPool(layout.ranks, backend="gloo", timeout=300) as pool:
        found = first_flip(watched(Trainer(config, source_text(), "cpu")), on_ranks(pool, config, layout))
    print("all tokens go to the same experts" if found is None else found)


if __name__ == "__main__":
    from moe_lab.jobs import first_flip as job  # by the name that ranks import

    job.main()
