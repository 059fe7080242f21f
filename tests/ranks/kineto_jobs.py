"""What ranks run to be profiled."""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moe_lab import MoE
from moe_lab.jobs.exchange_runs import _wired
from moe_lab.jobs.overlap import mark
from moe_lab.parallel.sharding import make_mesh, shard_moe
from moe_lab.study.timeline import RankSteps, TimedExchange


def profiled(folder):
    """Two layers forward and backward, in marks, as a trace of this rank."""
    moe, x_TD = _wired(3)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y_TD = x_TD[:64].clone().requires_grad_()
        for number in range(2):
            with record_function(f"layer {number}"):
                y_TD = moe(y_TD)
        y_TD.square().mean().backward()
    path = f"{folder}/rank{dist.get_rank()}.json"
    profiler.export_chrome_trace(path)
    return path


class LateExchange(TimedExchange):
    """Rank 1 comes `late` seconds later than it could to combine and its gradients, so that the others have to wait."""

    def __init__(self, exchange, late, **how):
        super().__init__(exchange, **how)
        self.late = late

    def start(self, *rows, **how):
        if self._started % 4 in (1, 2) and self.rank == 1:
            time.sleep(self.late)
        return super().start(*rows, **how)


under_way = []  # the exchange that shared experts run beside


@torch.library.custom_op("moe_lab_tests::until_landed", mutates_args=())
def until_landed(x_TD: torch.Tensor) -> torch.Tensor:
    """Work that goes on until the last exchange that was started has ended, and longer than a busy machine delays."""
    (exchange,) = under_way
    give_up = time.monotonic() + 30
    while not exchange._ended:
        if time.monotonic() > give_up:
            raise RuntimeError("shared experts run, but no exchange is under way")
        time.sleep(1e-3)
    time.sleep(0.1)
    return x_TD.clone()


until_landed.register_autograd(lambda ctx, grad_TD: until_landed(grad_TD))


class Patient(nn.Module):
    """Shared experts that take as long as the exchange beside them, forward and backward."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x_TD):
        return until_landed(self.experts(x_TD))


def patient(config, folder, overlap, late):
    """A sharded layer forward and backward: this rank's stamps, and its trace."""
    torch.manual_seed(0)
    moe = MoE(config)
    moe.shared_experts = Patient(moe.shared_experts)
    shard_moe(moe, make_mesh(2))
    exchange = moe.dispatcher.exchange = LateExchange(moe.dispatcher.exchange, late, overlap=overlap)
    under_way[:] = [exchange]
    mark([moe])
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        moe(torch.randn(16, config.dim, requires_grad=True)).square().mean().backward()
    path = f"{folder}/rank{dist.get_rank()}.json"
    profiler.export_chrome_trace(path)
    return RankSteps((), tuple(exchange.flights)), path
