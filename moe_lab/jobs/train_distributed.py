"""The trainer on many ranks: its share of each batch, weights cut over ranks, checkpoints that any layout reads.

    torchrun --nproc-per-node 4 -m moe_lab train --ep 2 --sp 2 --corpus corpus.safetensors --out run

A checkpoint is a folder of `torch.distributed.checkpoint`, whose metadata is a pickle: load only your own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from moe_lab.jobs.corpus_file import Corpus
from moe_lab.jobs.train import DTYPES, Groups, Losses, Step, TrainConfig, Trainer, auxiliary_loss, train
from moe_lab.models.lm import MoELM
from moe_lab.parallel.ordered import gather
from moe_lab.parallel.ranks import choose_backend
from moe_lab.parallel.sequence import MeshShard
from moe_lab.parallel.sharding import make_mesh, shard_moe, update_biases

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by name, so that groups may differ between layouts


class DistributedTrainer(Trainer):
    """One rank's part of a run. `config.batch` is that of all ranks; auxiliary losses are of each rank's share.

    Over `sp` ranks share their sequences: each has some positions of all of them.
    """

    checkpoint = "checkpoints"

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        device: str,
        *,
        ep: int,
        sp: int = 1,
        checkpointing: bool = False,
        fixed_order: bool = False,
    ) -> None:
        self.size = dist.get_world_size()
        self.mesh = make_mesh(ep, sp, device=torch.device(device).type)
        self.shares = self.size // sp
        if config.batch % (self.shares * config.accumulate * config.switch_parts):
            over = f"{self.shares} ranks" if sp == 1 else f"{self.shares} groups of sp={sp} ranks"
            micro = f" and accumulate={config.accumulate}" if config.accumulate > 1 else ""
            raise ValueError(f"batch={config.batch} must divide over {over}{micro}")
        if config.compile:
            raise ValueError("compile=True is for one process: many ranks run uncompiled")
        for name, apart in (("sequence_coeff", config.sequence_coeff > 0), ("switch_parts", config.switch_parts > 1)):
            if apart and sp > 1:
                raise ValueError(f"{name}={getattr(config, name)} is of whole sequences: sp={sp} must be 1")
        self.options = {"checkpointing": checkpointing, "fixed_order": fixed_order}
        super().__init__(config, corpus, device)
        self.leads = dist.get_rank() == 0

    def spread(self, model: MoELM) -> MoELM:
        """Cut over the mesh."""
        dtype = None if self.config.dtype == "float32" else DTYPES[self.config.dtype]
        shard_moe(model, self.mesh, dtype=dtype, **self.options)
        return model

    def split(self, groups: Groups) -> Groups:
        """Experts apart from the rest: they lie on another mesh, and one step runs on one."""
        experts = {p for moe in self.model.moe_layers for p in moe.experts.parameters()}
        parts = [([p for p in ps if (p in experts) == side], decay) for ps, decay in groups for side in (False, True)]
        return [part for part in parts if part[0]]

    def batch(self, step: int) -> Tensor:
        """This rank's share of the crops that one process would draw; whole, also where positions are cut."""
        share = self.mesh.get_local_rank("dp") * self.mesh["ep"].size() + self.mesh.get_local_rank("ep")
        return super().batch(step).chunk(self.shares)[share]

    def _losses(self, bytes_BL: Tensor) -> Losses:
        self._routings.clear()
        inputs_BL, targets_BL = bytes_BL[:, :-1], bytes_BL[:, 1:]
        if self.mesh["sp"].size() > 1:
            return self._losses_of_positions(inputs_BL, targets_BL)
        logits_BLV = self.model(inputs_BL)
        auxiliary = auxiliary_loss(self.config, self._routings, len(bytes_BL), self.counts())
        self._routings.clear()
        return Losses(F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten()), auxiliary)

    def _losses_of_positions(self, inputs_BL: Tensor, targets_BL: Tensor) -> Losses:
        """Of this rank's positions, weighted so that their mean over ranks is that over all tokens."""
        part = MeshShard.of(self.mesh["sp"], *inputs_BL.shape, fixed_order=self.options["fixed_order"])
        loss = part.cross_entropy(self.model(part.cut(inputs_BL), part), targets_BL)
        auxiliary, counts_LE = loss.new_zeros(()), self.counts()
        if here := int(part.valid_T.sum()):
            losses = auxiliary_loss(self.config, self._routings, len(inputs_BL), counts_LE)
            auxiliary = here * part.size / targets_BL.numel() * losses
        self._routings.clear()
        return Losses(loss, auxiliary)

    def counts(self) -> Tensor | None:
        """Of all ranks; every rank calls it."""
        counts_LE = super().counts()
        if counts_LE is not None:
            dist.all_reduce(counts_LE)
        return counts_LE

    def advance(self) -> Step:
        """One optimizer step of all ranks; its losses are means over them."""
        step = super().advance()
        of_ranks = gather(torch.stack([*step.losses]))
        return step._replace(losses=Losses(*(torch.stack(values).mean() for values in zip(*of_ranks))))

    def balance(self) -> Tensor:
        """By the counts of all ranks."""
        return update_biases(self.model, self.mesh)

    def save(self, path: Path) -> None:
        """Write a folder for this step, name it when it is whole, then drop older ones: a kill leaves one."""
        save_checkpoint(path, self.step, self.model, self.optimizer, self.config)

    def resume(self, path: Path) -> None:
        """Go on from the newest whole checkpoint, saved on this layout or another."""
        folder = newest(path)
        meta = json.loads((folder / "run.json").read_text())
        self.compare(meta["config"], folder)
        load_checkpoint(folder, self.model, self.optimizer)
        self.step = meta["step"]


def save_checkpoint(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> Path:
    """Weights, biases and optimizer state to `path/step-N`; every rank calls this. It appears when it is whole."""
    part, folder = path / f"part-{step:08d}", path / f"step-{step:08d}"
    leads = dist.get_rank() == 0
    if leads:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=part)
    if leads:
        (part / "run.json").write_text(json.dumps({"step": step, "config": config.to_dict()}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        for old in path.glob("*-*"):
            if old != folder:
                shutil.rmtree(old)
    dist.barrier()
    return folder


def newest(path: Path) -> Path:
    """The whole checkpoint of the latest step in a folder. `ValueError` where there is none."""
    found = sorted(path.glob("step-*"))
    if not found:
        raise ValueError(f"{path} holds no whole checkpoint: nothing to resume from")
    return found[-1]


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Into a model and optimizer of any layout, in place; every rank calls this."""
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT)


def train_on_ranks(
    config: TrainConfig, corpus: Corpus, out: Path, *, device: str, resume: bool, **options: Any
) -> None:
    """One rank of `torchrun -m moe_lab train`: checkpoints and, from rank 0, log and progress in `out`.

    `options`: of `DistributedTrainer`.
    """
    with joined(device) as mine:
        train(config, corpus, out, device=mine, resume=resume, make=partial(DistributedTrainer, **options))


@contextmanager
def joined(device: str) -> Iterator[str]:
    """The group of ranks that torchrun started, for a while; the device of this one."""
    cuda = device.startswith("cuda")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = choose_backend("auto" if cuda else "gloo", int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group(backend)
    try:
        yield f"cuda:{local}" if cuda else device
        dist.barrier()  # without it gloo now and then aborts at exit
    finally:
        dist.destroy_process_group()
