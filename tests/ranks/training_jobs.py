"""Sharded training as ranks run it."""

import os
import signal
from functools import partial
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding_jobs import whole
from torch.distributed.checkpoint import filesystem

from moe_lab.jobs.train import train
from moe_lab.jobs.train_distributed import DistributedTrainer, load_checkpoint, newest, save_checkpoint


def state(trainer):
    """Every weight, bias and moment, whole."""
    found = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    names = {p: name for name, p in trainer.model.named_parameters()}
    for p, values in trainer.optimizer.state.items():
        found |= {f"{names[p]}.{key}": whole(value) for key, value in values.items()}
    return found


def run(config, corpus, out, ep, sp=1, fixed_order=False, **options):
    make = partial(DistributedTrainer, ep=ep, sp=sp, fixed_order=fixed_order)
    trainer = train(config, corpus, Path(out), make=make, **options)
    found = state(trainer)
    return found if dist.get_rank() == 0 else None


def loaded(config, corpus, path, ep, sp=1):
    trainer = DistributedTrainer(config, corpus, "cpu", ep=ep, sp=sp)
    load_checkpoint(newest(Path(path)), trainer.model, trainer.optimizer)
    found = state(trainer)
    return found if dist.get_rank() == 0 else None


def killed_in_save(config, corpus, path, ep, written):
    """A save that ends with a rank's death: once its data are written, or in the midst of writing them."""
    trainer = DistributedTrainer(config, corpus, "cpu", ep=ep)
    room, name = (dcp, "save") if written else (filesystem, "_write_item")
    act, done = getattr(room, name), []

    def die(*args, **kwargs):
        result = act(*args, **kwargs)
        done.append(name)
        if dist.get_rank() == 0 and len(done) == (1 if written else 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(room, name, die)
    save_checkpoint(Path(path), 99, trainer.model, trainer.optimizer, config)
