import pytest
import torch

from moe_lab.kernels.rows import combine_gather, combine_gather_backward, gather_rows
from moe_lab.layer.plan import plan_local
from reference import relative_error

IDS_TK = torch.tensor([[2, 0], [-1, 2], [1, -1], [-1, -1], [0, 3]])
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def plan_of(ids_TK=IDS_TK):
    plan = plan_local(ids_TK, 4, dropless=False)
    return plan.order_R, plan.position_TK


def draw(plan, dtype, dim=8):
    order_R, position_TK = plan
    rows_RD = torch.randn(len(order_R), dim).to(dtype)
    gates_TK = torch.rand(position_TK.shape, dtype=torch.promote_types(dtype, torch.float32))
    return rows_RD, gates_TK


def combine_loop(rows_RD, gates_TK, order_R, position_TK, wide):
    """Token by token, slot by slot, in the dtype `wide`."""
    out_TD = torch.zeros(len(position_TK), rows_RD.shape[1], dtype=wide)
    for t, positions in enumerate(position_TK.tolist()):
        for k, position in enumerate(positions):
            if position >= 0:
                gate = 1 if gates_TK is None else gates_TK[t, k].to(wide)
                out_TD[t] += gate * rows_RD[position].to(wide)
    return out_TD


def test_rows_are_copies_of_their_tokens():
    x_TD = torch.randn(5, 8)
    rows_RD = gather_rows(x_TD, *plan_of())
    assert torch.equal(rows_RD, x_TD[[0, 4, 2, 0, 1, 4]])  # experts 0, 0, 1, 2, 2, 3
    assert torch.equal(gather_rows(x_TD.t().contiguous().t(), *plan_of()), rows_RD)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropless", [False, True])
def test_combine_sums_in_slot_order_and_rounds_once(dtype, gated, dropless):
    plan = plan_of(IDS_TK.abs() if dropless else IDS_TK)
    rows_RD, gates_TK = draw(plan, dtype)
    gates_TK = gates_TK if gated else None
    got_TD = combine_gather(rows_RD, gates_TK, *plan)
    assert got_TD.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    expected_TD = combine_loop(rows_RD, gates_TK, *plan, wide).to(dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(got_TD, expected_TD)
    else:  # a fused multiply-add may round a product away
        torch.testing.assert_close(got_TD, expected_TD, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_combine_does_not_depend_on_the_order_of_experts():
    ids_TK = torch.randint(0, 4, (50, 3))
    plan, relabelled = plan_of(ids_TK), plan_of(3 - ids_TK)
    for dtype in DTYPES:
        rows_NkD = torch.randn(150, 8).to(dtype)  # by assignment
        gates_TK = torch.rand(50, 3)
        first, second = (combine_gather(rows_NkD[p[0]], gates_TK, *p) for p in (plan, relabelled))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_as_exact_as_the_dtype_allows(dtype):
    plan = plan_of(torch.randint(-1, 4, (40, 3)))
    rows_RD, gates_TK = (t.requires_grad_() for t in draw(plan, dtype))
    probe_TD = torch.randn(40, 8).to(dtype)

    def grads(combine, wide, rows_RD, gates_TK):
        out_TD = combine(rows_RD, gates_TK, *plan, *wide)
        return torch.autograd.grad((out_TD * probe_TD.to(out_TD.dtype)).sum(), (rows_RD, gates_TK))

    got = grads(combine_gather, (), rows_RD, gates_TK)
    low = grads(combine_loop, (torch.float32,), rows_RD, gates_TK)
    exact = grads(combine_loop, (torch.float64,), rows_RD.double(), gates_TK.double())
    assert [g.dtype for g in got] == [dtype, torch.float32]
    for g, own, e in zip(got, low, exact):
        assert relative_error(g, e) <= 2 * relative_error(own, e)


def test_gradcheck():
    plan = plan_of()
    rows_RD, gates_TK = (t.requires_grad_() for t in draw(plan, torch.float64))
    x_TD = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, *plan), x_TD)
    assert torch.autograd.gradcheck(lambda r, g: combine_gather(r, g, *plan), (rows_RD, gates_TK))
    assert torch.autograd.gradcheck(lambda r: combine_gather(r, None, *plan), rows_RD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_a_dropped_slot_takes_nothing_and_gives_nothing(dtype, gated):
    order_R, position_TK = plan_of()
    rows_RD, gates_TK = draw((order_R, position_TK), dtype)
    rows_RD[0] = torch.nan  # token 0's row of expert 0, where a clamped index of a dropped slot would look
    gates_TK[3] = torch.nan  # token 3 keeps no assignment
    rows_RD.requires_grad_()
    gates_TK.requires_grad_()
    out_TD = combine_gather(rows_RD, gates_TK if gated else None, order_R, position_TK)
    assert out_TD.isfinite().all(dim=1).tolist() == [False, True, True, True, True]
    assert out_TD[3].eq(0).all()
    out_TD[1:].sum().backward()
    assert rows_RD.grad[order_R >= 2].isfinite().all()
    if gated:
        assert gates_TK.grad[1:].isfinite().all()
        assert gates_TK.grad[position_TK < 0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_the_gradient_of_one_token_stays_there(dtype):
    plan = plan_of()
    x_TD = torch.randn(5, 8).to(dtype).requires_grad_()
    rows_RD = gather_rows(x_TD, *plan)
    grad_RD = torch.ones_like(rows_RD)
    grad_RD[0] = torch.nan  # row 0 is token 0's
    rows_RD.backward(grad_RD)
    assert x_TD.grad.isfinite().all(dim=1).tolist() == [False, True, True, True, True]
    assert x_TD.grad[:, 0].tolist()[1:] == [1, 1, 0, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_rows_may_lie_anyhow(dtype):
    plan = plan_of(torch.randint(0, 4, (6, 2)))
    rows_RD, gates_TK = draw(plan, dtype)
    strided = [t.t().contiguous().t().requires_grad_() for t in (rows_RD, gates_TK)]
    plain = [t.clone().requires_grad_() for t in (rows_RD, gates_TK)]
    probe_TD = torch.randn(8, 6).to(dtype).t()
    outs = [combine_gather(*t, *plan) for t in (strided, plain)]
    assert torch.equal(*outs)
    for got, expected in zip(*(torch.autograd.grad(o, t, probe_TD) for o, t in zip(outs, (strided, plain)))):
        torch.testing.assert_close(got, expected)  # a dot product of strided rows may sum in another order


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_rows_the_sum_is_zero(num_tokens, top_k):
    plan = plan_of(torch.full((num_tokens, top_k), -1))
    rows_RD, gates_TK = (t.requires_grad_() for t in draw(plan, torch.float32))
    out_TD = combine_gather(rows_RD, gates_TK, *plan)
    assert torch.equal(out_TD, torch.zeros(num_tokens, 8))
    out_TD.sum().backward()
    assert torch.equal(gates_TK.grad, torch.zeros(num_tokens, top_k))
    assert rows_RD.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropless", [False, True])
def test_opcheck(dtype, dropless):
    plan = plan_of(IDS_TK.abs() if dropless else IDS_TK)
    rows_RD, gates_TK = (t.requires_grad_() for t in draw(plan, dtype))
    x_TD = torch.randn(5, 8).to(dtype).requires_grad_()
    torch.library.opcheck(gather_rows, (x_TD, *plan))
    torch.library.opcheck(combine_gather, (rows_RD, gates_TK, *plan))
    torch.library.opcheck(combine_gather, (rows_RD, None, *plan))
    torch.library.opcheck(combine_gather, (rows_RD.detach(), gates_TK, *plan))
    torch.library.opcheck(combine_gather, (rows_RD.detach(), gates_TK.detach().t().contiguous().t(), *plan))
    torch.library.opcheck(
        combine_gather_backward, (x_TD.detach(), rows_RD.detach(), gates_TK.detach().t().contiguous().t(), *plan)
    )
