import pytest
import torch

from moe_lab.kernels.scatter_add import deterministic_mode, deterministic_scatter_add

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = pytest.mark.parametrize("dims", [1, 2])


def draw(dims, dtype=torch.float32, num_tokens=4, num_rows=9, dim=5):
    out = torch.randn(num_tokens, dim).to(dtype)
    src = torch.randn(num_rows, dim).to(dtype)
    index = torch.randint(0, num_tokens, (num_rows, dim) if dims == 2 else (num_rows,))
    return out, index, src


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 9, 400])
def test_rows_are_added_in_order_and_rounded_once(dims, dtype, num_rows):
    out, index, src = draw(dims, dtype, num_rows=num_rows)
    before = out.clone()
    expected = out.clone().to(torch.promote_types(dtype, torch.float32))
    for i, row in enumerate(src):
        for d, value in enumerate(row):
            expected[index[i] if dims == 1 else index[i, d], d] += value
    assert torch.equal(deterministic_scatter_add(out, index, src), expected.to(dtype))
    assert torch.equal(out, before)  # functional


@SHAPES
def test_gradients(dims):
    out, index, src = draw(dims, torch.float64)
    out.requires_grad_()
    src.requires_grad_()
    assert torch.autograd.gradcheck(lambda o, s: deterministic_scatter_add(o, index, s), (out, src))


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dims, dtype):
    out, index, src = draw(dims, dtype)
    torch.library.opcheck(deterministic_scatter_add, (out, index, src))
    torch.library.opcheck(deterministic_scatter_add, (out.requires_grad_(), index, src.requires_grad_()))
    torch.library.opcheck(deterministic_scatter_add, (out.detach().t().contiguous().t(), index, src))


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=["off", "on", "warn_only"])
def callers_mode(request):
    enabled, warn_only = request.param
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    yield request.param
    torch.use_deterministic_algorithms(False)


def current_mode():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_mode_is_on_inside_and_the_callers_afterwards(callers_mode):
    with deterministic_mode():
        assert current_mode() == (True, False)
    assert current_mode() == callers_mode


@SHAPES
def test_the_op_runs_in_deterministic_mode(monkeypatch, dims):
    modes, use = [], torch.use_deterministic_algorithms
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: (modes.append(a), use(*a, **k)))
    deterministic_scatter_add(*draw(dims))
    assert modes == [(True,), (False,)]


@SHAPES
def test_the_op_restores_the_callers_mode(callers_mode, dims):
    deterministic_scatter_add(*draw(dims))
    assert current_mode() == callers_mode


def test_the_op_restores_the_callers_mode_when_it_raises(callers_mode):
    out, index, src = draw(1)
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        deterministic_scatter_add(out, index.fill_(4), src)
    assert current_mode() == callers_mode


@pytest.mark.parametrize(
    ("out", "index", "src", "message"),
    [
        ((4, 5), (9,), (9, 6), r"out \(4, 5\) torch.float32 and src \(9, 6\) torch.float32"),
        ((4, 5), (9,), (9,), r"src \(9,\)"),
        ((4,), (9,), (9, 5), r"out \(4,\)"),
        ((4, 5), (8,), (9, 5), r"index \(8,\) must be \(R,\) or \(R, D\) for src \(9, 5\)"),
        ((4, 5), (9, 1), (9, 5), r"index \(9, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(out, index, src, message):
    with pytest.raises(ValueError, match=message):
        deterministic_scatter_add(torch.zeros(out), torch.zeros(index, dtype=torch.int64), torch.zeros(src))


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"torch.float32 .* torch.bfloat16 must be"):
        deterministic_scatter_add(torch.zeros(4, 5), torch.zeros(9, dtype=torch.int64), torch.zeros(9, 5).bfloat16())
