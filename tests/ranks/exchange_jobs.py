"""Layers on real ranks, for comparison with one rank and with virtual ranks."""

import functools

import torch
import torch.distributed as dist

import parallel_cases
from moe_lab import MoE, MoEConfig
from moe_lab.parallel import wire


@functools.cache
def group_of(size):
    return dist.new_group(list(range(size)))


def run_cases(seeds, ep, collectives, dtype=torch.float64):
    """This rank's results of each case on the first `ep` ranks, and the bytes and fast paths that it counted."""
    group, rank = group_of(ep), dist.get_rank()
    if rank >= ep:
        return []
    results = []
    for seed in seeds:
        case = parallel_cases.draw(seed, (ep,))
        wired = functools.partial(wire, mesh=group, collectives=collectives)
        results.append(parallel_cases.on_this_rank(case, wired, rank, dtype))
    return results


def traffic(seeds, ep):
    """What the exchange counted in a forward of each case."""
    group, rank = group_of(ep), dist.get_rank()
    counted = []
    for seed in seeds if rank < ep else ():
        case = parallel_cases.draw(seed, (ep,))
        moe = wire(case.build(), group, **case.options)
        with moe.dispatcher.exchange.log.watch() as sent, torch.no_grad():
            moe(case.inputs()[rank][0])
        counted.append(sent)
    return counted


def traffic_both_ways(seed):
    """What the exchange counted forward and backward, and the splits of the plan."""
    case = parallel_cases.draw(seed, (dist.get_world_size(),))
    moe, plans = wire(case.build(), dist.group.WORLD, **case.options), []
    moe.dispatcher.unpack, unpack = (
        lambda rows, plan: (plans.append(plan), unpack(rows, plan))[1],
        moe.dispatcher.unpack,
    )
    with moe.dispatcher.exchange.log.watch() as sent:
        moe(case.inputs()[dist.get_rank()][0].requires_grad_()).sum().backward()
    (plan,) = plans
    return [list(one.rows_R) for one in sent], plan.send_splits, plan.receive_splits


def by_policy(policies, tokens):
    """For each policy's settings, on the same weights and tokens: this rank's ids, what its exchange counted forward
    and backward, and the rows that came to its experts."""
    results = []
    for changes, options in policies:
        torch.manual_seed(0)
        moe = wire(MoE(MoEConfig(dim=8, hidden_dim=8, num_experts=8, top_k=2, **changes)), dist.group.WORLD, **options)
        ids, rows = [], []
        moe.router.register_forward_hook(lambda module, args, routing, ids=ids: ids.append(routing.expert_ids_TK))
        moe.experts.register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(args[0])))
        torch.manual_seed(1 + dist.get_rank())
        x_TD = torch.randn(tokens[dist.get_rank()], 8, requires_grad=True)
        with moe.dispatcher.exchange.log.watch() as sent:
            moe(x_TD).sum().backward()
        results.append((ids[0].numpy(), [tuple(one) for one in sent], rows[0]))
    return results


def wire_with(changes, options):
    """Wire a layer whose settings this rank changes by `changes[rank]`, with `options[rank]`."""
    config = MoEConfig(dim=8, hidden_dim=8, num_experts=12, top_k=2).replace(**changes.get(dist.get_rank(), {}))
    try:
        wire(MoE(config), dist.group.WORLD, **options.get(dist.get_rank(), {}))
    except ValueError as error:
        return str(error)
    return None


def balance():
    """The bias after one step of balancing on this rank's own tokens."""
    torch.manual_seed(0)
    moe = wire(MoE(MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=1, load_balance_coeff=0.1)), dist.group.WORLD)
    torch.manual_seed(dist.get_rank())
    moe(torch.randn(7, 8))
    own = moe.tokens_per_expert_E.tolist()
    moe.update_expert_bias()
    return own, moe.expert_bias_E.tolist()


def on_dirty_memory(seed, collectives):
    """A case with every uninitialised buffer full of NaN: the same numbers, or something leaks."""
    case = parallel_cases.draw(seed, (dist.get_world_size(),))
    wired = functools.partial(wire, mesh=dist.group.WORLD, collectives=collectives)
    clean = parallel_cases.on_this_rank(case, wired, dist.get_rank())
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        dirty = parallel_cases.on_this_rank(case, wired, dist.get_rank())
    finally:
        torch.use_deterministic_algorithms(False)
    return [name for name in clean if not torch.equal(clean[name], dirty[name])]


def overlap_order():
    """In which order a layer's exchanges and shared experts start and end, forward and backward."""
    events = []
    moe = wire(MoE(MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=1, num_shared_experts=1)), dist.group.WORLD)
    start = moe.dispatcher.exchange.start

    def watched(rows, send, receive, overlap):
        events.append("start, others run" if overlap else "start")
        out, wait = start(rows, send, receive, overlap)
        return out, lambda: (events.append("wait"), wait())[1]

    moe.dispatcher.exchange.start = watched
    moe.shared_experts.register_forward_hook(lambda *args: events.append("shared"))
    x = torch.randn(6, 8, requires_grad=True)
    out = moe(x)
    forward, events[:] = list(events), []
    moe.shared_experts.w2.weight.register_hook(lambda grad: events.append("shared"))
    out.sum().backward()
    return forward, events
