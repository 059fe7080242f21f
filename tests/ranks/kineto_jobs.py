"""What ranks run to be profiled."""

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from moe_lab.jobs.exchange_runs import _wired


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
