"""A row's bits do not depend on the rows beside it: products, elementwise functions, the whole layer."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moe_lab import MoE, MoEConfig
from moe_lab.config import RouterConfig
from moe_lab.kernels.blocks import BLOCK, fixed_elementwise, fixed_linear, fixed_linear_op, vector_rows
from moe_lab.layer.activations import clamped_swiglu, swiglu
from moe_lab.layer.router import score
from moe_lab.parallel.virtual import VirtualRanks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 32), (37, 5), (256, 64)], ids=str)
def test_rows_of_a_product_do_not_feel_each_other(sizes, dtype, threads):
    inner, outer = sizes
    x_RI, weight_OI = drawn(4096, inner, dtype=dtype), drawn(outer, inner, dtype=dtype, seed=1)
    whole_RO = fixed_linear(x_RI, weight_OI)
    for start, size in ((40, 1), (40, 7), (33, 31), (41, 2000)):
        part_RO = fixed_linear(x_RI[start : start + size], weight_OI)
        assert torch.equal(part_RO, whole_RO[start : start + size])
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fixed_linear(x_RI[order], weight_OI), whole_RO[order])


@pytest.mark.parametrize("width", [1, 36, 64, 1100, 2049])
@pytest.mark.parametrize("name", ["swiglu", "clamped_swiglu", "sigmoid", "sqrt_softplus", "softmax"])
def test_elements_do_not_feel_each_other(name, width, threads):
    one = {
        "swiglu": lambda x: swiglu(x, x),
        "clamped_swiglu": lambda x: clamped_swiglu(x, x),
    }.get(name) or partial(score, score_func=name)
    x_RF = drawn(1200, width)
    whole_RF = fixed_elementwise(one, x_RF)
    for start, size in ((40, 1), (40, 7), (33, 32)):
        assert torch.equal(fixed_elementwise(one, x_RF[start : start + size]), whole_RF[start : start + size])
    assert torch.equal(fixed_elementwise(one, x_RF.flip(0)), whole_RF.flip(0))


@pytest.mark.parametrize(("width", "rows"), [(64, 1), (128, 1), (40, 8), (36, 16), (1, 64), (512, 1), (2049, 1)])
def test_rows_that_fill_vectors_by_hand(width, rows):
    assert vector_rows(width) == rows


@pytest.mark.parametrize("rows", [0, 1, BLOCK["cpu"], 71])
def test_blocks_compute_what_linear_computes(rows):
    x, weight, bias = (drawn(*shape, dtype=torch.float64) for shape in ((rows, 12), (5, 12), (5,)))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    probe = drawn(rows, 5, dtype=torch.float64, seed=3)
    got, expected = fixed_linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad((out * probe).sum(), inputs) for out in (got, expected))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


def test_fixed_linear_is_an_op_as_pytorch_wants_them():
    x, weight, bias = drawn(40, 12).requires_grad_(), drawn(5, 12).requires_grad_(), drawn(5).requires_grad_()
    torch.library.opcheck(fixed_linear_op, (x, weight, bias))
    torch.library.opcheck(fixed_linear_op, (x, weight, None))


def invariant(**changes):
    config = {"dim": 48, "hidden_dim": 36, "num_experts": 6, "top_k": 2, "num_shared_experts": 1, "backend": "blocked"}
    torch.manual_seed(0)
    return MoE(MoEConfig(**config | {"batch_invariant": True} | changes))


LAYERS = {
    "softmax": {},
    "sigmoid": {"router": RouterConfig(score_func="sigmoid", route_norm=True)},
    "sqrt_softplus": {"router": RouterConfig(score_func="sqrt_softplus", route_norm=True)},
    "biases": {"mlp_bias": True, "activation": "clamped_swiglu", "router": RouterConfig(gate_bias=True)},
    "shared gate": {"shared_expert_gate": True},
    "scores first": {"score_before_experts": True},
    "scatter_add": {"combine": "scatter_add"},
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in LAYERS), ("shared gate", torch.bfloat16)], ids=str
)
def test_a_token_has_the_same_bits_alone_in_seven_and_in_4096(name, dtype):
    moe = invariant(**LAYERS[name]).to(dtype)
    x_TD = drawn(4096, 48, dtype=dtype).requires_grad_()
    probe_TD = drawn(4096, 48, dtype=dtype, seed=1)

    def run(start, end):
        part = x_TD[start:end].detach().requires_grad_()
        out = moe(part)
        (grad,) = torch.autograd.grad((out * probe_TD[start:end]).sum(), part)
        return out, grad

    whole = run(0, 4096)
    for start, size in ((100, 1), (100, 7), (4095, 1)):
        for got, expected in zip(run(start, start + size), whole):
            assert torch.equal(got, expected[start : start + size])


@pytest.mark.parametrize("ep", [2, 3])
def test_a_token_has_the_same_bits_under_any_number_of_ranks(ep):
    moe, x_TD = invariant(), drawn(600, 48)
    whole_TD = moe(x_TD)
    assert torch.equal(torch.cat(VirtualRanks(moe, ep)(list(x_TD.chunk(ep)))), whole_TD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "loop"}, "backend='loop'"),
        ({"capacity_factor": 1.0}, "drops depend on the batch"),
        ({"router": RouterConfig(force_load_balance="round_robin")}, "place in the batch"),
        ({"batch_invariant": "yes"}, "batch_invariant='yes'"),
    ],
    ids=str,
)
def test_what_depends_on_the_batch_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        invariant(**changes)
