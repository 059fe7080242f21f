import pytest
import torch

from moe_lab import MoE, fastpaths
from moe_lab.jobs.bench_inputs import Inputs
from moe_lab.kernels.buffered import (
    _filled,
    _for_each,
    _segments,
    buffered_backward,
    buffered_experts,
    buffered_forward,
)
from moe_lab.layer.plan import plan_local
from reference import relative_error


def draw(tokens, dim, hidden_dim, experts, top_k, dtype):
    ids_TK = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].contiguous()
    weights = [torch.randn(experts, *s) / 3 for s in ((hidden_dim, dim), (dim, hidden_dim), (hidden_dim, dim))]
    gates_TK = torch.rand(tokens, top_k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return Inputs(torch.randn(tokens, dim).to(dtype), gates_TK, ids_TK, *[w.to(dtype) for w in weights])


def by_loop(inputs, dtype):
    """Output and gradients, token by token, the sum over experts in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [inputs.x_TD.to(dtype), inputs.gates_TK.to(wide), *[w.to(dtype) for w in inputs[3:]]]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x_TD, gates_TK, w1, w2, w3 = leaves
    out = []
    for t, ids in enumerate(inputs.expert_ids_TK.tolist()):
        total = torch.zeros(x_TD.shape[1], dtype=wide)
        for k, e in enumerate(ids):
            if e >= 0:
                y = w2[e] @ (torch.nn.functional.silu(w1[e] @ x_TD[t]) * (w3[e] @ x_TD[t]))
                total = total + gates_TK[t, k] * y.to(wide)
        out.append(total.to(dtype))
    return leaves, torch.stack(out)


def by_buffers(inputs):
    leaves = [t.detach().requires_grad_() for t in (inputs.x_TD, inputs.gates_TK, *inputs[3:])]
    plan = plan_local(inputs.expert_ids_TK, len(inputs.w1_EFD), dropless=False)
    return leaves, buffered_experts(leaves[0], leaves[1], plan.order_R, plan.ends_E, *leaves[2:])


def results(leaves, out, probe):
    return [out.detach(), *torch.autograd.grad(out, leaves, probe.to(out.dtype), materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drop", [False, True])
def test_output_and_every_gradient_within_budget(dtype, drop):
    inputs = draw(40, 16, 24, 6, 3, dtype)
    inputs.expert_ids_TK[inputs.expert_ids_TK == 4] = -1 if drop else 5  # expert 4 has no rows
    probe = torch.randn(40, 16)
    got = results(*by_buffers(inputs), probe)
    exact = results(*by_loop(inputs, torch.float64), probe)
    low = results(*by_loop(inputs, dtype), probe)
    for mine, theirs, right in zip(got, low, exact):
        budget = 1e-13 if dtype == torch.float64 else 2 * relative_error(theirs, right)
        assert relative_error(mine, right) <= budget
    assert all(not grad[4].any() for grad in got[3:])


def test_runs_agree_to_the_bit():
    inputs, probe = draw(64, 16, 8, 4, 2, torch.bfloat16), torch.randn(64, 16)
    first, second = (results(*by_buffers(inputs), probe) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_threads_share_experts_unless_one_has_more_than_its_share(two_threads):
    """The same bits on one thread and on two, where they share; close where they share products."""
    even, probe = draw(64, 16, 8, 4, 2, torch.float32), torch.randn(64, 16)
    heavy = even._replace(expert_ids_TK=torch.tensor([[0, 1]] * 60 + [[2, 3]] * 4))
    for inputs in (even, heavy):
        shared = results(*by_buffers(inputs), probe)
        torch.set_num_threads(1)
        alone = results(*by_buffers(inputs), probe)
        torch.set_num_threads(2)
        for mine, theirs in zip(shared, alone):
            torch.testing.assert_close(mine, theirs)
    segments = _segments(torch.tensor([60, 120, 124, 128], dtype=torch.int32))
    assert [segment.expert for segment in segments] == [0, 1, 2, 3]
    threads = []
    _for_each(segments, lambda mine: threads.append(list(mine)))
    assert sum(map(len, threads)) == 4
    threads.clear()
    _for_each(_segments(torch.tensor([65, 120, 124, 128], dtype=torch.int32)), lambda m: threads.append(list(m)))
    assert [len(mine) for mine in threads] == [4]  # one thread had them all


def test_rows_of_16_bits_are_filled_up_so_that_products_have_few_shapes():
    assert [_filled(rows, torch.bfloat16) for rows in (1, 16, 17)] == [16, 16, 32]
    assert _filled(17, torch.float32) == 17


def test_both_ops_keep_the_contract_of_custom_ops():
    inputs = draw(6, 8, 8, 3, 2, torch.float32)
    plan = plan_local(inputs.expert_ids_TK, 3)
    leaves = [t.clone().requires_grad_() for t in (inputs.x_TD, inputs.gates_TK, *inputs[3:])]
    args = (leaves[0], leaves[1], plan.order_R, plan.ends_E, *leaves[2:])
    torch.library.opcheck(buffered_forward, (*args, True))
    plain = [t.detach() for t in args]
    _, gate_RF, up_RF = buffered_forward(*plain, True)
    torch.library.opcheck(buffered_backward, (torch.randn(6, 8), *plain, gate_RF, up_RF))


def test_the_layer_runs_it_and_notes_it(layer_config):
    torch.manual_seed(0)
    loop = MoE(layer_config(backend="loop", num_shared_experts=1))
    buffered = MoE(layer_config(backend="buffered", num_shared_experts=1))
    buffered.load_state_dict(loop.state_dict())
    x = torch.randn(2, 9, 16)
    with fastpaths.record() as record:
        out = buffered(x)
    torch.testing.assert_close(out, loop(x))
    assert record.count("buffered_dispatch_combine") == 1


def test_away_from_the_cpu_it_is_refused():
    args = [t.to("meta") for t in (torch.zeros(2, 8), torch.ones(2, 1), torch.arange(2), torch.tensor([1, 2]))]
    with pytest.raises(ValueError, match=r"^backend='buffered' runs on the CPU, but x is on meta: choose 'fused'"):
        buffered_experts(*args, *[torch.zeros(2, 8, 8, device="meta")] * 3)
