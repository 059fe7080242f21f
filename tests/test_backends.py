"""Every backend on what hypothesis draws: shapes, dtypes, layouts, routings, drops; equal within budget, or refused."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab import MoE, MoEConfig
from moe_lab.config import Backend
from moe_lab.layer.router import Routing, count

NAMES = ("out", "x", "gates", "w1", "w2", "w3")
CUDA = torch.cuda.is_available()  # without it `fused` runs in Triton's interpreter, which multiplies no bfloat16
FUSED_DTYPES = [torch.bfloat16 if CUDA else torch.float32, torch.float16, torch.float64]
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack((t, t), dim=-1).flatten(-2)[..., ::2],
    "odd address": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}


class Case(NamedTuple):
    """Tokens, gates, w1, w2 and w3, all leaves; what each assignment chose, -1 if dropped; the output's gradient."""

    leaves: tuple[Tensor, ...]
    ids_TK: Tensor
    probe_TD: Tensor
    before: bool

    def __repr__(self) -> str:
        lying = [(tuple(t.shape), t.stride(), t.dtype, t.data_ptr() % 16) for t in self.leaves]
        return f"Case(leaves={lying}, ids_TK={self.ids_TK.tolist()}, before={self.before})"

    def counts(self) -> list[int]:
        return count(self.ids_TK, len(self.leaves[2])).tolist()

    def run(self, backend: str, *, grad: bool = True, device: str = "cpu") -> dict[str, Tensor]:
        """By a layer that is given this routing instead of its router's."""
        x_TD, gates_TK, *weights = (leaf.detach().to(device).requires_grad_(grad) for leaf in self.leaves)
        num_experts, hidden_dim, dim = weights[0].shape
        drops = bool((self.ids_TK < 0).any())
        config = MoEConfig(
            dim=dim,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            top_k=self.ids_TK.shape[1],
            backend=backend,
            score_before_experts=self.before,
            capacity_factor=1.0 if drops else None,
        )
        with torch.device("meta"):
            moe = MoE(config)
        for name, weight in zip(("w1_EFD", "w2_EDF", "w3_EFD"), weights):
            setattr(moe.experts, name, torch.nn.Parameter(weight.detach(), requires_grad=grad))
        ids_TK = self.ids_TK.to(device)
        nothing_TE = gates_TK.detach().new_zeros(len(x_TD), num_experts)
        out_TD = moe._computed(x_TD, Routing(gates_TK, ids_TK, nothing_TE, nothing_TE, count(ids_TK, num_experts)))
        leaves = (x_TD, gates_TK, *moe.experts.parameters())
        if not grad:
            return {"out": out_TD.cpu()}
        grads = torch.autograd.grad(out_TD, leaves, self.probe_TD.to(device), allow_unused=self.ids_TK.numel() == 0)
        return {name: t.detach().cpu() for name, t in zip(NAMES, (out_TD, *grads))}

    def reference(self, dtype: torch.dtype, *, magnitudes: bool = False) -> dict[str, Tensor]:
        """Assignment by assignment, each with weights of its own; sums over assignments are float32 at least.

        `magnitudes`: the sum of the absolute values of all terms instead, which no term's error is measured against
        more generously than its own size: |silu(h)| <= |h|. A sum that cancels has no error relative to itself.
        """
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [(t.abs() if magnitudes else t).detach().to(wide).requires_grad_() for t in self.leaves]
        x_TD, gates_TK, *weights = leaves
        probe_TD = self.probe_TD.abs() if magnitudes else self.probe_TD
        kept_TK, ids_TK = self.ids_TK >= 0, self.ids_TK.clamp(min=0)
        gates_TK1 = (gates_TK * kept_TK)[..., None]
        w1_TKFD, w2_TKDF, w3_TKFD = (w[ids_TK].to(dtype) for w in weights)
        x_TKD1 = (x_TD[:, None] * (gates_TK1 if self.before else torch.ones_like(gates_TK1))).to(dtype)[..., None]
        gate_TKF1, up_TKF1 = w1_TKFD @ x_TKD1, w3_TKFD @ x_TKD1
        hidden_TKF1 = (gate_TKF1 if magnitudes else F.silu(gate_TKF1)) * up_TKF1
        out_TKD = (w2_TKDF @ hidden_TKF1)[..., 0].to(wide)
        out_TD = (out_TKD * (kept_TK[..., None] if self.before else gates_TK1)).sum(1).to(dtype)
        return dict(zip(NAMES, (out_TD.detach(), *torch.autograd.grad(out_TD, leaves, probe_TD.to(dtype)))))


KINDS = ("any", "one takes all", "first in demand", "every expert", "even", "twice")
DROPS = ("none", "none", "some", "an expert's", "all", "the last token's")


@st.composite
def cases(draw, dtypes=ALL_DTYPES, kinds=KINDS, drops=DROPS, widths=(8, 16, 24, 6), experts=(1, 5), tokens=(0, 12)):
    """Experts without rows, one with all, every token to every expert, equal counts, no tokens, a choice made twice."""
    num_experts = draw(st.integers(*experts))
    kind = draw(st.sampled_from(kinds))
    top_k = {"one takes all": 1, "every expert": num_experts}.get(kind) or draw(st.integers(1, num_experts))
    tokens = draw(st.integers(*tokens))
    if kind == "even":
        tokens = -(-tokens // num_experts) * num_experts
    dim, hidden_dim = (draw(st.sampled_from(widths)) for _ in range(2))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids_TK = torch.rand(tokens, num_experts, generator=g).argsort(dim=1)[:, :top_k]  # not contiguous
    if kind == "one takes all":
        ids_TK = torch.full_like(ids_TK, num_experts - 1)
    elif kind == "first in demand":
        ids_TK = torch.arange(top_k).expand(tokens, top_k)
    elif kind == "even":
        ids_TK = torch.arange(tokens * top_k).view(tokens, top_k) % num_experts
    elif kind == "twice":
        ids_TK = torch.randint(num_experts, (tokens, top_k), generator=g)
    drop_TK = {
        "none": torch.zeros(ids_TK.shape, dtype=torch.bool),
        "some": torch.rand(ids_TK.shape, generator=g) < 0.4,
        "an expert's": ids_TK == 0,
        "all": torch.ones(ids_TK.shape, dtype=torch.bool),
        "the last token's": torch.arange(tokens)[:, None].expand(ids_TK.shape) == tokens - 1,
    }[draw(st.sampled_from(drops))]
    wide = torch.promote_types(dtype, torch.float32)
    gates_TK = torch.rand(ids_TK.shape, generator=g, dtype=wide).masked_fill(drop_TK, 0)
    up, down = (num_experts, hidden_dim, dim), (num_experts, dim, hidden_dim)
    x_TD = torch.randn(tokens, dim, generator=g).to(dtype)
    weights = [(torch.randn(s, generator=g) * s[-1] ** -0.5).to(dtype) for s in (up, down, up)]
    layout = st.sampled_from(list(LAYOUTS))
    leaves = [LAYOUTS[draw(layout)](t) for t in (x_TD, gates_TK, *weights)]
    probe_TD = torch.randn(tokens, dim, generator=g).to(dtype)
    probe_TD = torch.ones((), dtype=dtype).expand(tokens, dim) if draw(st.booleans()) else probe_TD
    return Case(tuple(leaves), ids_TK.masked_fill(drop_TK, -1), probe_TD, draw(st.booleans()))


def refusal(backend: str, case: Case) -> str | None:
    """What the documentation of a backend says that it does not do, as the error says it."""
    x_TD, _, w1_EFD, *_ = case.leaves
    (_, hidden_dim, dim), size, counts = w1_EFD.shape, x_TD.element_size(), case.counts()
    if backend == "fused" and (case.ids_TK < 0).any():
        return "backend='fused' drops nothing: with a capacity_factor choose another backend"
    if backend == "fused" and x_TD.dtype == torch.float64:
        return "backend='fused' computes in bfloat16 or float16, not torch.float64"
    if backend == "grouped" and x_TD.dtype == torch.float64:
        return "backend='grouped' does not do float64: choose backend='loop'"
    if backend in ("grouped", "fused"):
        for name, width in (("dim", dim), ("hidden_dim", hidden_dim)):
            if width * size % 16:
                return f"backend='{backend}' needs rows of a multiple of 16 bytes, but {name}={width} in {x_TD.dtype}"
    if backend == "batched" and len(set(counts)) > 1:
        return "backend='batched' is not legal, counts differ: expert"
    if backend == "batched" and not counts[0]:
        return "backend='batched' is not legal, expert 0 has 0 rows: every expert needs some"
    return None


def check(backend: str, case: Case) -> None:
    grad, device = backend != "batched", "cuda" if CUDA and backend == "fused" else "cpu"
    if not grad:
        with pytest.raises(ValueError, match=r"^backend='batched' is not legal, a gradient flows: use torch\.no_grad"):
            case.run(backend)
    if reason := refusal(backend, case):
        with pytest.raises(ValueError, match=f"^{reason}"):
            case.run(backend, grad=grad, device=device)
        return
    got, dtype = case.run(backend, grad=grad, device=device), case.leaves[0].dtype
    exact, low = case.reference(torch.float64), case.reference(dtype)
    magnitudes = case.reference(torch.float64, magnitudes=True)
    for name, mine in got.items():
        assert mine.dtype == (case.leaves[1] if name == "gates" else case.leaves[0]).dtype
        assert mine.isfinite().all()
        size = float(magnitudes[name].norm())
        error, own = (float((t.double() - exact[name]).norm()) for t in (mine, low[name]))
        limit = 1e-14 * size if dtype == torch.float64 else 2 * max(own, torch.finfo(dtype).eps / 2 * size)
        assert error <= limit, f"{name}: error {error:.2e} where {limit:.2e} is allowed"
        # What nothing flows through is exactly zero: dropped tokens and gates, experts without rows.
        zero = magnitudes[name] == 0
        assert not mine[zero].any(), name


OFTEN_EVEN = {"batched": ("even", "even", "even", *KINDS)}  # what it is for


@pytest.mark.parametrize("backend", [name for name in Backend.__args__ if name != "fused"])
@settings(max_examples=60)
@given(data=st.data())
def test_forward_and_all_gradients_are_within_budget_or_refused(backend, data):
    check(backend, data.draw(cases(kinds=OFTEN_EVEN.get(backend, KINDS))))


@pytest.mark.slow
@settings(max_examples=4)
@given(cases(FUSED_DTYPES[:-1], drops=["none"], widths=[8, 16, 24], experts=(1, 2), tokens=(1, 8)))
def test_the_fused_kernels_too(case):
    check("fused", case)


@settings(max_examples=40)
@given(cases(FUSED_DTYPES))
def test_what_the_fused_kernels_refuse_they_name(case):
    assume(refusal("fused", case))
    check("fused", case)
