import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.layer.combine import COMBINE_ARMS, gather, scatter_add
from moe_lab.layer.plan import plan_local
from reference import relative_error

ARMS = pytest.mark.parametrize("arm", COMBINE_ARMS.values(), ids=COMBINE_ARMS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw(num_tokens, top_k, dtype, *, dropped=True, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1 if dropped else 0, 5, (num_tokens, top_k), generator=generator)
    plan = plan_local(ids_TK, 5, dropless=False)
    rows_RD = torch.randn(plan.num_rows, dim, generator=generator).to(dtype)
    return rows_RD, torch.rand(num_tokens, top_k, generator=generator), plan


def combine_loop(rows_RD, gates_TK, plan, wide):
    """Token by token, slot by slot, summed in the dtype `wide`."""
    sums = []
    for t, positions in enumerate(plan.position_TK.tolist()):
        sum_D = torch.zeros(rows_RD.shape[1], dtype=wide)
        for k, position in enumerate(positions):
            if position >= 0:
                sum_D = sum_D + (1 if gates_TK is None else gates_TK[t, k].to(wide)) * rows_RD[position].to(wide)
        sums.append(sum_D)
    return torch.stack(sums)


def with_gradients(combine, rows_RD, gates_TK, probe_TD):
    leaves = [t.detach().requires_grad_() for t in (rows_RD, gates_TK) if t is not None]
    out_TD = combine(*leaves) if gates_TK is not None else combine(leaves[0], None)
    return [out_TD.detach(), *torch.autograd.grad(out_TD, leaves, probe_TD.to(out_TD.dtype))]


@ARMS
@DTYPES
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_output_and_gradients_are_as_exact_as_the_dtype_allows(arm, dtype, gated, dropped):
    rows_RD, gates_TK, plan = draw(100, 3, dtype, dropped=dropped)
    gates_TK = gates_TK if gated else None
    wide_gates_TK = gates_TK.double() if gated else None
    probe_TD = torch.randn(100, 8).to(dtype)
    got = with_gradients(lambda r, g: arm(r, g, plan), rows_RD, gates_TK, probe_TD)
    low = with_gradients(lambda r, g: combine_loop(r, g, plan, torch.float32).to(dtype), rows_RD, gates_TK, probe_TD)
    exact = with_gradients(
        lambda r, g: combine_loop(r, g, plan, torch.float64), rows_RD.double(), wide_gates_TK, probe_TD
    )
    for g, own, e in zip(got, low, exact):
        assert g.dtype == own.dtype
        assert relative_error(g, e) <= 2 * relative_error(own, e)


@ARMS
@settings(max_examples=30)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_any_plan_in_float64(arm, num_tokens, top_k, seed, gated):
    rows_RD, gates_TK, plan = draw(num_tokens, top_k, torch.float64, seed=seed)
    gates_TK = gates_TK if gated else None
    out_TD = arm(rows_RD, gates_TK, plan)
    assert out_TD.shape == (num_tokens, 8)
    if num_tokens:
        torch.testing.assert_close(out_TD, combine_loop(rows_RD, gates_TK, plan, torch.float64), rtol=1e-14, atol=1e-14)


def test_gather_rounds_once_and_scatter_add_at_each_product():
    rows_RD, gates_TK, plan = draw(300, 4, torch.bfloat16)
    once_TD = combine_loop(rows_RD, gates_TK, plan, torch.float32).bfloat16()
    assert torch.equal(gather(rows_RD, gates_TK, plan), once_TD)
    gate_R = gates_TK.flatten()[plan.order_R]
    products_RD = (rows_RD.float() * gate_R[:, None]).bfloat16()
    twice_TD = torch.zeros(300, 8).index_add(0, plan.token_R, products_RD.float()).bfloat16()
    assert torch.equal(scatter_add(rows_RD, gates_TK, plan), twice_TD)
    assert not torch.equal(once_TD, twice_TD)


@ARMS
@DTYPES
@pytest.mark.parametrize("gated", [True, False])
def test_what_is_not_finite_stays_with_its_token(arm, dtype, gated):
    rows_RD, gates_TK, plan = draw(50, 3, dtype)
    bad = int(plan.token_R[0])  # row 0 is where a clamped index of a dropped slot would look
    rows_RD[0] = torch.nan
    dropped = plan.position_TK.lt(0)
    gates_TK[dropped] = torch.nan  # a dropped assignment's gate counts for nothing
    leaves = [rows_RD.requires_grad_(), gates_TK.requires_grad_()]
    out_TD = arm(rows_RD, gates_TK if gated else None, plan)
    good_T = torch.arange(50) != bad
    assert torch.equal(out_TD.isfinite().all(dim=1), good_T)
    out_TD[good_T].sum().backward()
    others_R = plan.token_R != bad
    assert leaves[0].grad[others_R].isfinite().all()
    assert leaves[0].grad[~others_R].eq(0).all()
    if gated:
        assert leaves[1].grad[good_T].isfinite().all()
        assert leaves[1].grad[dropped].eq(0).all()


@ARMS
def test_two_runs_agree_to_the_bit(arm):
    rows_RD, gates_TK, plan = draw(2000, 4, torch.bfloat16, dim=32)
    probe_TD = torch.randn(2000, 32)
    first, second = (with_gradients(lambda r, g: arm(r, g, plan), rows_RD, gates_TK, probe_TD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
