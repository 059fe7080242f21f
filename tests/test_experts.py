import math

import pytest
import torch
import torch.nn.functional as F

from moe_lab import GroupedExperts, MoEConfig
from moe_lab.config import Backend
from moe_lab.layer.activations import clamped_swiglu, swiglu
from moe_lab.layer.backends import BACKENDS
from moe_lab.layer.backends.weights import Weights
from moe_lab.layer.experts import SharedExperts
from reference import relative_error

DIM, HIDDEN = 16, 24
COUNTS = {
    "uneven": [7, 0, 12, 1],
    "first_and_last_empty": [0, 9, 3, 0],
    "one_takes_all": [0, 0, 20, 0],
    "no_rows": [0, 0, 0, 0],
    "one_expert": [5],
    "one_row": [0, 1],
}
ON_CPU = ["loop", "padded", "grouped", "buffered", "blocked"]


def build(counts, backend, dtype=torch.float32):
    torch.manual_seed(0)
    experts = GroupedExperts(DIM, HIDDEN, len(counts), backend=backend).to(dtype)
    rows_RD = F.rms_norm(torch.randn(sum(counts), DIM), (DIM,)).to(dtype)
    return experts, rows_RD, torch.tensor(counts).cumsum(0).int()


def loop_over_rows(x_RD, w1_EFD, w2_EDF, w3_EFD, counts):
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    outs = [w2_EDF[e] @ (F.silu(w1_EFD[e] @ x_D) * (w3_EFD[e] @ x_D)) for x_D, e in zip(x_RD, experts)]
    return torch.stack(outs) if outs else x_RD[:0]


def with_gradients(function, x_RD, weights, probe_RD):
    leaves = [t.detach().requires_grad_() for t in (x_RD, *weights)]
    out_RD = function(*leaves)
    return [out_RD.detach(), *torch.autograd.grad(out_RD, leaves, probe_RD, materialize_grads=True)]


def test_every_backend_of_the_config_is_here():
    assert {*BACKENDS, "auto"} == set(Backend.__args__)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("loop", torch.float64), *((b, d) for b in ON_CPU for d in (torch.float32, torch.bfloat16, torch.float16))],
    ids=str,
)
def test_output_and_gradients_equal_a_loop_over_rows(backend, dtype, counts):
    experts, x_RD, ends_E = build(counts, backend, dtype)
    weights = (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD)
    probe_RD = torch.randn_like(x_RD)
    got = with_gradients(lambda x, *w: BACKENDS[backend](x, ends_E, Weights(*w)), x_RD, weights, probe_RD)
    low, exact = (
        with_gradients(
            lambda *args: loop_over_rows(*args, counts), x_RD.to(d), [w.to(d) for w in weights], probe_RD.to(d)
        )
        for d in (dtype, torch.float64)
    )
    for g, own, e in zip(got, low, exact):
        assert g.dtype == dtype
        if dtype == torch.float64:
            assert relative_error(g, e) <= 1e-14
        else:
            assert relative_error(g, e) <= 2 * relative_error(own, e)
    for grad in got[2:]:
        assert grad.abs().amax(dim=(1, 2)).gt(0).tolist() == [count > 0 for count in counts]


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_rows_gradients_are_zeros_not_none(backend):
    experts, x_RD, ends_E = build([0, 0, 0], backend)
    experts(x_RD.requires_grad_(), ends_E).sum().backward()
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in experts.parameters())
    assert x_RD.grad.shape == (0, DIM)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_anyhow(backend, dtype):
    experts, x_RD, ends_E = build([7, 0, 12, 1], backend, dtype)
    torch.testing.assert_close(experts(x_RD.t().contiguous().t(), ends_E), experts(x_RD, ends_E))


@pytest.mark.parametrize("backend", ON_CPU)
def test_an_expert_sees_its_own_rows_only(backend):
    experts, x_RD, ends_E = build([7, 0, 12, 1], backend)
    x_RD[7] = torch.nan  # the first row of expert 2
    finite_R = experts(x_RD, ends_E).isfinite().all(dim=1)
    assert finite_R.tolist() == [r != 7 for r in range(20)]


@pytest.mark.parametrize("backend", ON_CPU)
def test_weights_are_used_in_the_dtype_of_the_rows(backend):
    experts, x_RD, ends_E = build([7, 0, 12, 1], backend)
    narrow, _, _ = build([7, 0, 12, 1], backend, torch.bfloat16)
    out_RD = experts(x_RD.bfloat16(), ends_E)
    assert torch.equal(out_RD, narrow(x_RD.bfloat16(), ends_E))
    out_RD.float().square().sum().backward()
    assert experts.w1_EFD.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "dtype", "message"),
    [
        (16, 16, torch.float64, "does not do float64: choose backend='loop'"),
        (12, 16, torch.bfloat16, "multiple of 16 bytes, but dim=12 in torch.bfloat16 makes 24: choose backend='loop'"),
        (16, 6, torch.float32, "multiple of 16 bytes, but hidden_dim=6 in torch.float32 makes 24: choose"),
    ],
)
def test_what_grouped_cannot_do_is_refused(dim, hidden_dim, dtype, message):
    experts = GroupedExperts(dim, hidden_dim, 2, backend="grouped").to(dtype)
    with pytest.raises(ValueError, match=f"^backend='grouped' .*{message}"):
        experts(torch.zeros(4, dim, dtype=dtype), torch.tensor([2, 4], dtype=torch.int32))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"^backend='magic' is not known: choose one of 'loop', 'padded', 'grouped'"):
        GroupedExperts(4, 4, 2, backend="magic")


def test_weights_begin_at_the_scale_that_keeps_the_scale_of_rows():
    torch.manual_seed(0)
    experts = GroupedExperts(64, 256, 8)
    assert {name: tuple(w.shape) for name, w in experts.named_parameters()} == {
        "w1_EFD": (8, 256, 64),
        "w2_EDF": (8, 64, 256),
        "w3_EFD": (8, 256, 64),
    }
    for weight, fan_in in ((experts.w1_EFD, 64), (experts.w2_EDF, 256), (experts.w3_EFD, 64)):
        assert abs(float(weight.detach().std()) * fan_in**0.5 - 1) < 0.02  # 131,072 draws: chance moves it by 0.002


def test_swiglu_by_hand():
    gate, up = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([5.0, 2.0, 3.0])
    sigmoid = [0.5, 0.7310586, 0.1192029]
    torch.testing.assert_close(swiglu(gate, up), torch.tensor([0.0, 2 * sigmoid[1], -6 * sigmoid[2]]))


def test_clamped_swiglu_by_hand():
    gate, up = torch.tensor([1.0, 9.0, -20.0, 0.5]), torch.tensor([2.0, -9.0, 8.0, 0.0])
    cut_gate, cut_up = [1.0, 7.0, -20.0, 0.5], [2.0, -7.0, 7.0, 0.0]
    expected = [(u + 1) * g / (1 + math.exp(-1.702 * g)) for g, u in zip(cut_gate, cut_up)]
    torch.testing.assert_close(clamped_swiglu(gate, up), torch.tensor(expected))


def test_padding_reaches_neither_output_nor_gradient():
    experts, x_RD, ends_E = build([7, 0, 12, 1], "padded")
    biased = GroupedExperts(DIM, HIDDEN, 4, backend="padded", activation="clamped_swiglu", mlp_bias=True)
    biased.load_state_dict(experts.state_dict(), strict=False)
    for bias in (biased.b1_EF, biased.b2_ED, biased.b3_EF):
        torch.nn.init.constant_(bias, 1e30)  # what padding rows would give, many times over
    probe_RD = torch.zeros_like(x_RD)
    biased(x_RD, ends_E).backward(probe_RD)
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in biased.parameters())
    with torch.no_grad():
        biased.b2_ED.zero_()
        assert biased(x_RD, ends_E).isfinite().all()


@pytest.mark.parametrize("fields", [{"mlp_bias": True}, {"activation": "clamped_swiglu"}])
def test_the_fused_backend_computes_plain_swiglu_only(fields):
    with pytest.raises(ValueError, match=r"^backend='fused' computes plain SwiGLU"):
        GroupedExperts(4, 4, 2, backend="fused", **fields)
    with pytest.raises(ValueError, match=r"^backend='fused' computes plain SwiGLU.*choose backend='grouped'"):
        MoEConfig(dim=4, hidden_dim=4, num_experts=2, top_k=1, backend="fused", **fields)


def test_a_shared_gate_weighs_each_token():
    plain, gated = SharedExperts(DIM, HIDDEN, 2), SharedExperts(DIM, HIDDEN, 2, gated=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    x_TD = torch.randn(5, DIM)
    weight_T1 = 1 / (1 + (-(x_TD @ gated.gate.weight.T)).exp())
    torch.testing.assert_close(gated(x_TD), weight_T1 * plain(x_TD))


def test_shared_experts_are_the_sum_of_as_many_swiglus():
    shared, x_TD = SharedExperts(DIM, HIDDEN, 3).double(), torch.randn(5, DIM, dtype=torch.float64)
    w1, w2, w3 = shared.w1.weight, shared.w2.weight, shared.w3.weight
    assert w1.shape == w3.shape == (3 * HIDDEN, DIM)
    parts = [slice(n * HIDDEN, (n + 1) * HIDDEN) for n in range(3)]
    expected_TD = sum((F.silu(x_TD @ w1[p].T) * (x_TD @ w3[p].T)) @ w2[:, p].T for p in parts)
    torch.testing.assert_close(shared(x_TD), expected_TD, rtol=1e-13, atol=1e-15)
