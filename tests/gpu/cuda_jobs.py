"""What ranks with a GPU each run."""

import time

import torch
import torch.distributed as dist

import parallel_cases
from moe_lab import MoE, MoEConfig, RouterConfig
from moe_lab.jobs.bench_inputs import LAYERS
from moe_lab.parallel import wire


def total(value):
    tensor = torch.tensor([float(value * (dist.get_rank() + 1))], device="cuda")
    dist.all_reduce(tensor)
    return dist.get_backend(), tensor.item()


def hang_in_an_exchange(rank):
    """One rank never comes; the others' kernel waits on the device."""
    if dist.get_rank() == rank:
        time.sleep(600)
    rows = torch.ones(dist.get_world_size(), 4, device="cuda")
    dist.all_to_all_single(torch.empty_like(rows), rows)
    torch.cuda.synchronize()


def run_cases(seeds, collectives):
    """This rank's results of each case, float64, its layer on the GPU."""
    rank, results = dist.get_rank(), []
    for seed in seeds:
        case = parallel_cases.draw(seed, (dist.get_world_size(),))
        moe = wire(case.build().cuda(), dist.group.WORLD, collectives=collectives, **case.options)
        got = parallel_cases._run(moe, *(tensor.cuda() for tensor in case.inputs()[rank]))
        results.append({name: tensor.cpu() for name, tensor in got.items()})
    return results


def low_precision(tokens):
    """Relative errors against float64 of the fused layer over ranks, and of the one-rank loop, on these tokens."""
    config = LAYERS["10B_2B"].replace(dim=256, hidden_dim=176, load_balance_coeff=None, num_shared_experts=0)
    torch.manual_seed(0)
    exact = MoE(config).double().cuda()
    low = MoE(config).bfloat16().cuda()
    wired = MoE(config.replace(backend="fused")).bfloat16().cuda()
    low.load_state_dict(exact.state_dict())
    for target in (exact, wired):
        target.load_state_dict(low.state_dict())  # all three have the rounded weights
    wired = wire(wired, dist.group.WORLD)
    torch.manual_seed(dist.get_rank() + 1)
    x = torch.randn(tokens, config.dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        right = exact(x.double())
        return [float((moe(x).double() - right).norm() / right.norm()) for moe in (wired, low)]


def collectives_of_forced_balance(tokens):
    """Which collectives a forward with known splits makes."""
    config = MoEConfig(
        dim=64, hidden_dim=64, num_experts=8, top_k=4, router=RouterConfig(force_load_balance="round_robin")
    )
    moe = wire(MoE(config).cuda(), dist.group.WORLD, tokens_per_rank=tokens, collectives="c10d")
    x = torch.randn(tokens, 64, device="cuda")
    with torch.no_grad():
        moe(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            moe(x)
            torch.cuda.synchronize()
    return sorted(
        event.key for event in profile.key_averages() if "nccl" in event.key.lower() for _ in range(event.count)
    )
