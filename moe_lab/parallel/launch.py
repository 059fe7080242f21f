"""One rank function on ranks that someone else starts: torchrun on one or several machines, or srun.

    torchrun --nproc-per-node 4 -m moe_lab.parallel.launch package.module:function --arguments '{"name": 3}'
    srun --ntasks 8 python -m moe_lab.parallel.launch package.module:function --rendezvous host:29500

Rank 0 prints the results of all ranks as one line of JSON. A rank that fails ends with status 1, and its launcher
ends the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_lab.parallel.ranks import choose_backend

SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def rank_environment(environ: Mapping[str, str], rendezvous: str | None) -> dict[str, str]:
    """What `init_process_group` reads, from torchrun's variables or else SLURM's.

    `ValueError` where neither is set, or SLURM's ranks have no rendezvous address.
    """
    if "RANK" in environ and "MASTER_ADDR" in environ:
        return {}
    if "SLURM_PROCID" not in environ:
        raise ValueError("RANK and SLURM_PROCID are not set: start this with torchrun or srun")
    if rendezvous is None or not rendezvous.rpartition(":")[0]:
        raise ValueError(f"rendezvous={rendezvous!r} must be host:port of rank 0 under srun")
    host, _, port = rendezvous.rpartition(":")
    found = {name: environ[slurm] for name, slurm in SLURM.items() if slurm in environ}
    return {"LOCAL_WORLD_SIZE": "1", **found, "MASTER_ADDR": host, "MASTER_PORT": port}


def main(argv: Sequence[str] | None = None) -> None:
    """Join the group, call the function, gather and print."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.parallel.launch", description=__doc__.split("\n")[0])
    parser.add_argument("function", help="package.module:function")
    parser.add_argument("--arguments", default="{}", help="keyword arguments as JSON")
    parser.add_argument("--backend", default="auto", choices=("auto", "gloo", "nccl"))
    parser.add_argument("--rendezvous", help="host:port of rank 0, under srun")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds any collective may take")
    args = parser.parse_args(argv)
    os.environ.update(rank_environment(os.environ, args.rendezvous))
    module, _, name = args.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    backend = choose_backend(args.backend, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=args.timeout))
    results: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(results, function(**json.loads(args.arguments)))
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.barrier()  # without it gloo now and then aborts at exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
