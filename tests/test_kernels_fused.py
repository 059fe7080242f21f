"""The fused layer against a loop in float64: natively on a GPU, in the interpreter without one."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from moe_lab import fastpaths
from moe_lab.config import MoEConfig
from moe_lab.kernels import fused, tiles
from moe_lab.kernels.tiles import tile_rows
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.moe import MoE
from reference import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
NAMES = ("out", "x", "gates", "w1", "w2", "w3")


def leaves(num_tokens, top_k, num_experts, dim, hidden_dim):
    """Inputs in the low dtype (gates float32), ids that leave the last expert out, and an output gradient."""
    ids_TK = torch.rand(num_tokens, max(top_k, num_experts - 1)).topk(top_k).indices
    up, down = (num_experts, hidden_dim, dim), (num_experts, dim, hidden_dim)
    shapes = ((num_tokens, dim), up, down, up)
    x, w1, w2, w3 = ((torch.randn(s) / (s[-1] ** 0.5 if len(s) == 3 else 1)).to(DTYPE) for s in shapes)
    return (x, torch.rand(num_tokens, top_k), w1, w2, w3), ids_TK, torch.randn(num_tokens, dim).to(DTYPE)


def run(function, tensors, grad, dtype=None):
    """Output and gradients of `function`, inputs in `dtype` where one is given."""
    tensors = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*tensors)
    grads = torch.autograd.grad(out, tensors, grad.to(out), materialize_grads=True)
    return dict(zip(NAMES, (out.detach(), *grads)))


def loop(ids_TK):
    """One expert after another over all tokens; sums of a token in float32 at least."""

    def forward(x, gates, w1, w2, w3):
        wide = torch.promote_types(x.dtype, torch.float32)
        out = torch.zeros(x.shape, dtype=wide)
        for expert in range(w1.shape[0]):
            y = F.linear(F.silu(F.linear(x, w1[expert])) * F.linear(x, w3[expert]), w2[expert])
            out = out + y.to(wide) * (gates.to(wide) * (ids_TK == expert)).sum(1, keepdim=True)
        return out.to(x.dtype)

    return forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "anchored", "height"),
    [
        ((9, 2, 4, 72, 40), 10**9, 16),
        ((9, 2, 4, 72, 40), 10**9, 128),
        ((9, 2, 4, 72, 40), 40, 32),
        ((3, 1, 2, 136, 264), 10**9, 64),
        ((3, 1, 2, 136, 264), 10**9, 128),
        ((0, 1, 3, 64, 64), 10**9, 16),
        ((0, 1, 3, 64, 64), 64, 16),
        ((3, 5, 6, 16, 24), 10**9, 16),
    ],
    ids=str,
)
def test_forward_and_gradients_are_as_exact_as_the_dtype_allows(shape, anchored, height, monkeypatch):
    monkeypatch.setattr(fused, "ANCHORED", anchored)
    monkeypatch.setattr(tiles, "HEIGHTS", (height,))
    tensors, ids_TK, grad = leaves(*shape)

    def forward(x, gates, w1, w2, w3):
        return fused.fused_experts(x, gates, ids_TK.to(DEVICE), w1, w2, w3)

    got = run(forward, [t.to(DEVICE) for t in tensors], grad.to(DEVICE))
    exact = run(loop(ids_TK), tensors, grad, torch.float64)
    low_tensors = [t if t.dtype == torch.float32 else t.to(DTYPE) for t in tensors]
    low = run(loop(ids_TK), low_tensors, grad)
    for name in NAMES:
        error, own = relative_error(got[name].cpu(), exact[name]), relative_error(low[name], exact[name])
        assert error <= 2 * max(own, 1e-7), f"{name}: {error:.1e} where the loop has {own:.1e}"
    with torch.no_grad():
        assert torch.equal(forward(*(t.to(DEVICE) for t in tensors)), got["out"]), "without grad the same bits"


def test_dropped_assignments_and_unused_experts_get_nothing():
    tensors, ids_TK, grad = leaves(5, 2, 3, 16, 16)
    ids_TK[2] = -1

    def forward(x, gates, w1, w2, w3):
        return fused.fused_experts(x, gates, ids_TK.to(DEVICE), w1, w2, w3)

    got = run(forward, [t.to(DEVICE) for t in tensors], grad.to(DEVICE))
    with torch.no_grad():
        assert torch.equal(forward(*(t.to(DEVICE) for t in tensors)), got["out"]), "without grad the same bits"
    for name in ("out", "x", "gates"):
        assert (got[name][2] == 0).all(), name
    for name in ("w1", "w2", "w3"):
        assert (got[name][2] == 0).all(), f"{name} of the expert without rows"
        assert (got[name][0] != 0).any(), name


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.slow
def test_the_gradient_of_the_up_product_is_gone_when_that_of_w1_is_made(monkeypatch):
    monkeypatch.setattr(fused, "ANCHORED", 8)
    (x, gates, w1, w2, w3), ids_TK, grad = leaves(2, 1, 2, 8, 8)
    tensors = [t.to(DEVICE).requires_grad_() for t in (x, gates, w1, w2, w3)]
    storages, freed, real = [], [], fused.fused_weight_grads

    def watched(x_TD, grads_PF, *rows):
        gc.collect()  # the interpreter's launches leave cycles behind
        storages.extend(StorageWeakRef(g.untyped_storage()) for g in grads_PF)
        freed.append(storages[0].expired())
        return real(x_TD, grads_PF, *rows)

    monkeypatch.setattr(fused, "fused_weight_grads", watched)
    x, gates, *weights = tensors
    fused.fused_experts(x, gates, ids_TK.to(DEVICE), *weights).backward(grad.to(DEVICE))
    assert freed == [False, True], "first w3's, then w1's"
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("op", ["fused_forward", "fused_anchor", "fused_up", "fused_down"])
def test_opcheck(op):
    (x, gates, w1, w2, w3), ids_TK, _ = leaves(2, 1, 2, 8, 8)
    x, gates, w1, w2, w3 = (t.to(DEVICE).requires_grad_() for t in (x, gates, w1, w2, w3))
    rows = tile_rows(ids_TK.to(DEVICE), 2)
    if op == "fused_forward":
        torch.library.opcheck(fused.fused_forward, (x, gates, ids_TK.to(DEVICE), w1, w2, w3), test_utils=OPCHECKS)
    elif op == "fused_anchor":
        torch.library.opcheck(fused.fused_anchor, (x, w1, *rows), test_utils=OPCHECKS)
    elif op == "fused_up":
        for anchor in (None, fused.fused_anchor(x, w1, *rows).detach().requires_grad_()):
            torch.library.opcheck(fused.fused_up, (x, w1, w3, anchor, *rows), test_utils=OPCHECKS)
    else:
        *products, hidden = fused.fused_up(x, w1, w3, None, *rows)
        args = (*(p.detach().requires_grad_() for p in products), hidden.detach(), gates, w2, *rows)
        torch.library.opcheck(fused.fused_down, args, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({}, True),
        ({"num_shared_experts": 1}, True),
        ({"score_before_experts": True}, False),
        ({"combine": "scatter_add"}, False),
    ],
    ids=str,
)
def test_the_layer_takes_the_fused_path_where_it_may(changes, noted):
    config = MoEConfig(dim=16, hidden_dim=24, num_experts=4, top_k=2, backend="fused", **changes)
    moe = MoE(config).to(DEVICE, DTYPE)
    low, exact = (MoE(config.replace(backend="loop")).to(DEVICE, dtype) for dtype in (DTYPE, torch.float64))
    x = torch.randn(2, 3, 16, device=DEVICE).to(DTYPE)
    for other in (low, exact):
        other.load_state_dict(moe.state_dict())
    with fastpaths.record() as record:
        out = moe(x)
    assert record.count("fused_dispatch_combine") == noted
    right = exact(x.double())
    assert relative_error(out, right) <= 2 * relative_error(low(x), right)
    assert torch.equal(moe.tokens_per_expert_E, low.tokens_per_expert_E)


def test_sorted_rows_go_through_the_same_kernels():
    experts = GroupedExperts(16, 24, 3, backend="fused").to(DEVICE, DTYPE)
    x_RD, ends_E = torch.randn(5, 16, device=DEVICE).to(DTYPE), torch.tensor([2, 2, 5], dtype=torch.int32)
    out_RD = experts(x_RD, ends_E.to(DEVICE))
    experts.backend = "loop"
    low_RD = experts(x_RD, ends_E.to(DEVICE))
    right_RD = experts.double()(x_RD.double(), ends_E.to(DEVICE))
    assert relative_error(out_RD, right_RD) <= 2 * relative_error(low_RD, right_RD)


def test_what_is_not_legal_says_why(monkeypatch):
    ids, gates = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)

    def attempt(dim, dtype):
        x, w = torch.zeros(2, dim, dtype=dtype), torch.zeros(1, 16, dim, dtype=dtype)
        fused.fused_experts(x, gates, ids, w, w.mT.contiguous(), w)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA, but x is on cpu"):
        attempt(16, torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        attempt(16, torch.float64)
    with pytest.raises(ValueError, match=r"dim=12 in torch.float16 makes 24: choose 'loop'"):
        attempt(12, torch.float16)
