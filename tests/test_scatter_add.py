import pytest
import torch

from moe_lab import MoE, MoEConfig, fastpaths
from moe_lab.kernels.scatter_add import (
    byte_range,
    deterministic_mode,
    deterministic_scatter_add,
    deterministic_scatter_add_,
    may_overlap,
)

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


# in place


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_gives_the_same_bits(dims, dtype):
    out, index, src = draw(dims, dtype, num_rows=400)
    expected = deterministic_scatter_add(out, index, src)
    deterministic_scatter_add_(out, index, src)
    assert torch.equal(out, expected)


@SHAPES
def test_opcheck_in_place(dims):
    torch.library.opcheck(deterministic_scatter_add_, draw(dims))


def test_in_place_restores_the_callers_mode(callers_mode):
    deterministic_scatter_add_(*draw(1))
    assert current_mode() == callers_mode


def test_byte_ranges_by_hand():
    storage = torch.zeros(8, 6)
    start = storage.data_ptr()
    assert byte_range(storage) == (start, start + 192)
    assert byte_range(storage[2:4, 1]) == (start + 4 * 13, start + 4 * 20)
    assert byte_range(storage[:0])[0] == byte_range(storage[:0])[1]


def test_what_may_overlap():
    storage = torch.zeros(8, 6)
    assert may_overlap(storage, storage)
    assert may_overlap(storage, storage[3])
    assert may_overlap(storage.view(torch.int32), storage)
    assert not may_overlap(storage[:4], storage[4:])  # disjoint halves
    assert may_overlap(storage[:, ::2], storage[:, 1::2])  # interleaved: on the safe side
    assert not may_overlap(storage, storage.clone())
    assert not may_overlap(storage[:0], storage)


SHARED = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2, num_shared_experts=1, combine="scatter_add")


def in_place_count(moe, x):
    with fastpaths.record() as record:
        out = moe(x)
    return out, record.count("scatter_add_inplace_no_grad"), record.count("scatter_add_autograd_or_alias")


def test_the_layer_adds_into_the_shared_experts_output_only_without_gradients():
    moe, x = MoE(SHARED), torch.randn(9, 16)
    with_grad, *counts = in_place_count(moe, x)
    assert counts == [0, 1]
    with torch.no_grad():
        without, *counts = in_place_count(moe, x)
    assert counts == [1, 0]
    assert torch.equal(with_grad, without)


def test_shared_experts_that_return_their_input_are_not_written_to():
    moe, x = MoE(SHARED), torch.randn(9, 16)
    moe.shared_experts = torch.nn.Identity()
    before = x.clone()
    with torch.no_grad():
        out, *counts = in_place_count(moe, x)
    assert counts == [0, 1]
    assert torch.equal(x, before)
    moe.shared_experts = Lambda(lambda x: x.clone())
    with torch.no_grad():
        again, *counts = in_place_count(moe, x)
    assert counts == [1, 0]
    assert torch.equal(out, again)


class Lambda(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
