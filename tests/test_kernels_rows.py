"""Gather, combine and SwiGLU's gradient against float64: natively on a GPU, in the interpreter without one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.kernels import combine, swiglu
from moe_lab.kernels.rows import combine_gather
from moe_lab.kernels.tiles import TileRows, tile_rows_op
from reference import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]  # the interpreter truncates to bfloat16


def case(num_tokens, top_k, num_experts, dropped=False, height=16):
    ids_TK = torch.rand(num_tokens, num_experts).topk(top_k).indices
    if dropped:
        ids_TK[::3, 0] = -1
    return TileRows(*(part.to(DEVICE) for part in tile_rows_op(ids_TK, num_experts, height)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("top_k", "dim", "dropped", "height"), [(2, 72, True, 128), (1, 8, False, 16), (3, 4200, False, 32)]
)
def test_gather_copies_and_pads_with_zeros(dtype, top_k, dim, dropped, height, monkeypatch):
    rows = case(5, top_k, 4, dropped, height)
    x_TD = torch.randn(5, dim, device=DEVICE).to(dtype)
    fill = {True: torch.nan, False: 7}
    monkeypatch.setattr(
        Tensor, "new_empty", lambda t, *shape, **kw: t.new_full(shape, fill[t.is_floating_point()], **kw)
    )
    used = int(rows.starts_E1[-1])
    picked_PD = x_TD[(rows.order_P // top_k).clamp(min=0).long()]
    expected_PD = picked_PD.masked_fill((rows.order_P < 0)[:, None], 0)
    assert torch.equal(combine.gather(x_TD, rows)[:used], expected_PD[:used])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [72, 4200])
def test_gather_from_takes_rows_by_number(dtype, dim):
    x_TD = torch.randn(4, dim, device=DEVICE).to(dtype)
    source_P = torch.tensor([3, -1, 0, 3, 2], device=DEVICE)
    expected_PD = x_TD[source_P].masked_fill((source_P < 0)[:, None], 0)
    assert torch.equal(combine.gather_from(x_TD, source_P), expected_PD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("top_k", "dim", "dropped"), [(2, 72, True), (16, 24, False), (3, 1100, False)])
def test_combine_is_as_exact_as_its_dtype_allows(dtype, gated, top_k, dim, dropped):
    rows = case(5, top_k, 16, dropped)
    rows_PD = torch.randn(rows.order_P.numel(), dim, device=DEVICE).to(dtype)
    rows_PD[(rows.order_P < 0).long().argmax()] = torch.nan  # padding is never read
    gates_TK = torch.rand(5, top_k, device=DEVICE) if gated else None
    kept_R = rows.order_P[rows.order_P >= 0]
    exact_TD = combine_gather(
        rows_PD.double(), None if gates_TK is None else gates_TK.double(), kept_R, rows.position_TK.long()
    )
    error = relative_error(combine.combine(rows_PD, gates_TK, rows), exact_TD)
    assert error <= 2 * max(relative_error(exact_TD.to(dtype), exact_TD), 1e-7)


def test_a_dropped_slot_adds_nothing_not_even_a_nan():
    rows = case(3, 1, 2, dropped=True)
    rows_PD = torch.full((rows.order_P.numel(), 8), torch.nan, device=DEVICE)
    rows_PD[rows.order_P >= 0] = 1.0
    out_TD = combine.combine(rows_PD, torch.ones(3, 1, device=DEVICE), rows)
    assert torch.equal(out_TD.cpu(), torch.tensor([[0.0], [1.0], [1.0]]).expand(3, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "hidden_dim", "dropped"), [(2, 40, True), (1, 600, False)])
def test_swiglu_backward_equals_autograd(dtype, top_k, hidden_dim, dropped):
    rows = case(5, top_k, 3, dropped)
    num_rows, kept_P = rows.order_P.numel(), (rows.order_P >= 0).cpu()
    gates_TK = torch.rand(5, top_k)
    grad_PF, gate_PF, up_PF = (torch.randn(num_rows, hidden_dim).to(dtype) * kept_P[:, None] for _ in range(3))

    def by_autograd(wide):
        gate, up, gates = (t.to(wide).requires_grad_() for t in (gate_PF, up_PF, gates_TK))
        hidden = F.silu(gate) * up
        gated = gates.reshape(-1)[rows.order_P.cpu().clamp(min=0).long()][:, None] * kept_P[:, None] * hidden
        gated.backward(grad_PF.to(wide))
        return gate.grad, up.grad, gates.grad, gated.detach()

    products = (t.clone().to(DEVICE) for t in (grad_PF, gate_PF, up_PF))
    got = swiglu.swiglu_backward(*products, gates_TK.to(DEVICE), rows)
    used = int(rows.expert_M1[-1]) * rows.height
    got = [got.gate_PF[:used], got.up_PF[:used], got.gates_TK, got.gated_PF[:used]]
    exact, low = by_autograd(torch.float64), by_autograd(dtype)
    for mine, right, theirs in zip(got, exact, low):
        right, theirs = (t if t.shape == mine.shape else t[:used] for t in (right, theirs))
        assert relative_error(mine.cpu(), right) <= 2 * max(relative_error(theirs, right), 1e-7)
