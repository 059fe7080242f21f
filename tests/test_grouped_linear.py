import pytest
import torch

from moe_lab.kernels.grouped_linear import _laid_out, grouped_linear, grouped_linear_op, grouped_linear_weight_grad
from reference import relative_error

ENDS_E = torch.tensor([0, 5, 5, 6, 30], dtype=torch.int32)  # two experts without rows
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def draw(dtype):
    return torch.randn(30, 16).to(dtype), (torch.randn(5, 24, 16) / 4).to(dtype), torch.randn(30, 24).to(dtype)


def loop(x_RI, weight_EOI):
    rows = x_RI.tensor_split(ENDS_E[:-1].long())
    return torch.cat([x @ weight.T for x, weight in zip(rows, weight_EOI)])


def with_gradients(linear, x_RI, weight_EOI, grad_RO):
    leaves = [t.detach().requires_grad_() for t in (x_RI, weight_EOI)]
    out_RO = linear(*leaves)
    return [out_RO.detach(), *torch.autograd.grad(out_RO, leaves, grad_RO)]


@DTYPES
def test_output_and_gradients_equal_a_loop(dtype):
    x_RI, weight_EOI, grad_RO = draw(dtype)
    got = with_gradients(lambda x, w: grouped_linear(x, w, ENDS_E), x_RI, weight_EOI, grad_RO)
    low = with_gradients(loop, x_RI, weight_EOI, grad_RO)
    exact = with_gradients(loop, x_RI.double(), weight_EOI.double(), grad_RO.double())
    for g, own, e in zip(got, low, exact):
        assert g.dtype == dtype
        assert relative_error(g, e) <= 2 * relative_error(own, e)
    assert got[2][[0, 2]].eq(0).all()


def test_bfloat16_gives_the_bits_of_the_op():
    x_RI, weight_EOI, grad_RO = draw(torch.bfloat16)
    first = with_gradients(lambda x, w: grouped_linear(x, w, ENDS_E), x_RI, weight_EOI, grad_RO)
    second = with_gradients(lambda x, w: grouped_linear_op(x, w, ENDS_E), x_RI, weight_EOI, grad_RO)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_wanted_gradients_are_made():
    x_RI, weight_EOI, _ = draw(torch.float32)
    out_RO = grouped_linear(x_RI.requires_grad_(), weight_EOI, ENDS_E)
    with torch.profiler.profile() as profile:
        out_RO.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "moe_lab::grouped_linear" in names
    assert "moe_lab::grouped_linear_weight_grad" not in names
    assert x_RI.grad.shape == (30, 16)


@DTYPES
def test_rows_may_lie_anyhow(dtype):
    x_RI, weight_EOI, _ = draw(dtype)
    expected = grouped_linear(x_RI, weight_EOI, ENDS_E)
    assert torch.equal(grouped_linear(x_RI.t().contiguous().t(), weight_EOI, ENDS_E), expected)
    wide = torch.stack([x_RI, x_RI], dim=2)
    assert torch.equal(grouped_linear(wide[:, :, 0], weight_EOI, ENDS_E), expected)


@DTYPES
def test_weights_may_lie_anyhow_and_are_copied_only_where_they_must(dtype):
    x_RI, weight_EOI, grad_RO = draw(dtype)
    expected = with_gradients(lambda x, w: grouped_linear(x, w, ENDS_E), x_RI, weight_EOI, grad_RO)
    for weight, copied in (
        (weight_EOI.mT.contiguous().mT, False),
        (torch.cat((weight_EOI, weight_EOI), dim=1)[:, :24], False),
        (torch.stack((weight_EOI, weight_EOI), dim=-1)[..., 0], True),  # neither dimension whole
        (torch.cat((weight_EOI, weight_EOI[..., :1]), dim=-1)[..., :16], True),  # rows off 16 bytes
    ):
        assert (_laid_out(weight.mT).data_ptr() != weight.data_ptr()) == copied
        for got, known in zip(
            with_gradients(lambda x, w: grouped_linear(x, w, ENDS_E), x_RI, weight, grad_RO), expected
        ):
            torch.testing.assert_close(got, known)


@DTYPES
def test_opcheck(dtype):
    x_RI, weight_EOI, grad_RO = draw(dtype)
    torch.library.opcheck(grouped_linear_op, (x_RI, weight_EOI, ENDS_E))
    torch.library.opcheck(grouped_linear_op, (x_RI.requires_grad_(), weight_EOI.requires_grad_(), ENDS_E))
    torch.library.opcheck(grouped_linear_weight_grad, (grad_RO, x_RI.detach(), ENDS_E))
