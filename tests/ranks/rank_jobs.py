"""Functions for ranks to run: what goes well, and every way in which things go wrong."""

import os
import signal
import time

import torch
import torch.distributed as dist


def whoami():
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads()


def total(value):
    tensor = torch.tensor([float(value * (dist.get_rank() + 1))])
    dist.all_reduce(tensor)
    return tensor.item()


def say(text):
    print(text, dist.get_rank())


def fail_on(rank):
    """One rank raises while the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise ArithmeticError(f"rank {rank} cannot go on")
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on(rank):
    """One rank never enters the collective that the others wait in."""
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def unpicklable():
    return lambda: None


def hang_in_exchange(*args):
    """Whatever it is given: rank 0 never comes."""
    hang_on(0)
