"""The grouped products against float64: natively on a GPU, in the interpreter without one."""

import pytest
import torch
import torch.nn.functional as F

from moe_lab.kernels import combine, grouped_gemm
from moe_lab.kernels.tiles import TileRows, tile_rows_op
from reference import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
SHAPES = [
    (72, 40),
    pytest.param((136, 264), marks=pytest.mark.slow),
]  # D, F: less than a tile, more than one, never a multiple


class Case:
    """Twenty tokens, two experts each; the first expert is never chosen. Inputs in the low dtype."""

    def __init__(self, dim, hidden_dim, height, top_k=2, num_experts=3):
        ids_TK = torch.rand(20, num_experts - 1).topk(top_k).indices + 1
        self.rows = TileRows(*tile_rows_op(ids_TK, num_experts, height))
        self.used = int(self.rows.expert_M1[-1]) * height
        self.x_TD = torch.randn(20, dim).to(DTYPE)
        self.w1, self.w3 = ((torch.randn(num_experts, hidden_dim, dim) / dim**0.5).to(DTYPE) for _ in range(2))
        self.w2 = (torch.randn(num_experts, dim, hidden_dim) / hidden_dim**0.5).to(DTYPE)
        self.expert_P = self.rows.expert_M1[:-1].repeat_interleave(height)[: self.used].long()

    def gathered(self, dtype):
        token_P = (self.rows.order_P[: self.used] // self.rows.position_TK.shape[1]).clamp(min=0).long()
        return self.x_TD.to(dtype)[token_P] * (self.rows.order_P[: self.used] >= 0)[:, None]

    def products(self, rows_P, weight_E, dtype):
        """Each row times its expert's weight (E, O, I)."""
        return torch.stack([weight_E[e].to(dtype) @ row.to(dtype) for row, e in zip(rows_P, self.expert_P)])


def on_device(rows):
    return TileRows(*(part.to(DEVICE) for part in rows))


def assert_close(got, exact):
    assert relative_error(got.cpu(), exact) <= 2 * relative_error(exact.to(DTYPE), exact)


@pytest.mark.parametrize("height", [16, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("swapped", "gather_once"), [(False, 10**9), (True, 10**9), (True, 0)])
def test_up_reads_both_weights_whichever_lies_first(shape, height, swapped, gather_once, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "GATHER_ONCE", gather_once)
    case = Case(*shape, height)
    w1, w3 = (w.to(DEVICE) for w in (case.w1, case.w3))
    if (w3.data_ptr() < w1.data_ptr()) != swapped:
        both = torch.stack((case.w3, case.w1) if swapped else (case.w1, case.w3)).to(DEVICE)
        w1, w3 = (both[1], both[0]) if swapped else (both[0], both[1])
    *gate_up, hidden = grouped_gemm.up(case.x_TD.to(DEVICE), w1, w3, on_device(case.rows), save=True)
    gate, up = (case.products(case.gathered(torch.float64), w, torch.float64) for w in (case.w1, case.w3))
    for got, exact in zip((*gate_up, hidden), (gate, up, F.silu(gate) * up)):
        assert_close(got[: case.used], exact)
    *nothing, same = grouped_gemm.up(case.x_TD.to(DEVICE), w1, w3, on_device(case.rows), save=False)
    assert [n.numel() for n in nothing] == [0, 0]
    assert torch.equal(same[: case.used], hidden[: case.used])


@pytest.mark.parametrize("height", [16, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [True, False])
def test_rows_product_takes_weights_either_way(shape, height, transposed):
    case = Case(*shape, height)
    weight = case.w1 if transposed else case.w2
    x_PD = combine.gather(case.x_TD.to(DEVICE), on_device(case.rows))
    exact = case.products(case.gathered(torch.float64), weight if transposed else weight.mT, torch.float64)
    got = grouped_gemm.rows_product(x_PD, weight.to(DEVICE), on_device(case.rows), transposed=transposed)
    assert_close(got[: case.used], exact)


@pytest.mark.parametrize("height", [16, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("up_first", [False, True])
def test_input_grad_sums_over_both_products_wherever_they_lie(shape, height, up_first):
    case = Case(*shape, height)
    pair = torch.randn(2, case.rows.order_P.numel(), shape[1]).to(DTYPE).to(DEVICE)
    grads = pair.flip(0).contiguous().unbind()[::-1] if up_first else pair.unbind()
    assert (grads[1].data_ptr() < grads[0].data_ptr()) == up_first
    exact = sum(case.products(g[: case.used].cpu(), w.mT, torch.float64) for g, w in zip(grads, (case.w1, case.w3)))
    got = grouped_gemm.input_grad(*grads, case.w1.to(DEVICE), case.w3.to(DEVICE), on_device(case.rows))
    assert_close(got[: case.used], exact)


@pytest.mark.parametrize("height", [16, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_grad_keeps_experts_apart(shape, height):
    case = Case(*shape, height)
    a, b = (torch.randn(case.rows.order_P.numel(), n).to(DTYPE) for n in shape)
    a[: case.used][case.expert_P == 2] = torch.nan  # reaches the gradient of expert 2 alone
    got = grouped_gemm.weight_grad(a.to(DEVICE), b.to(DEVICE), on_device(case.rows)).cpu()
    assert (got[0] == 0).all(), "expert 0 has no rows"
    assert got[2].isnan().all()
    mine = (case.expert_P == 1).nonzero().squeeze(1)
    assert_close(got[1], a[mine].double().T @ b[mine].double())
