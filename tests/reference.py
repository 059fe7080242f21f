"""The layer as a loop over tokens, in any dtype, and the error budget that it sets.

A result is a dict: "out", "x" (the input's gradient) and the gradient of every parameter by its name, where the
router's bias is one more column of its weight: six numbers are too few for a ratio of errors. The loop takes the
layer's own expert ids, since choices of two dtypes differ near ties.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.layer.moe import MoE

Result = dict[str, Tensor]

SCORES = {
    "softmax": lambda logits_E: logits_E.softmax(dim=0),
    "sigmoid": lambda logits_E: 1 / (1 + (-logits_E).exp()),
    "sqrt_softplus": lambda logits_E: (1 + logits_E.exp()).log() ** 0.5,
}


def run(moe: MoE, x: Tensor, probe: Tensor) -> tuple[Result, Tensor]:
    """Output and gradients of sum(out * probe) by the layer, and the expert ids it chose."""
    routings = []
    hook = moe.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    x = x.detach().requires_grad_()
    out = moe(x)
    hook.remove()
    names, params = zip(*moe.named_parameters())
    grads = torch.autograd.grad((out * probe).sum(), (x, *params))
    return _result(out, ("x", *names), grads), routings[0].expert_ids_TK


def _result(out: Tensor, names: Iterable[str], grads: Iterable[Tensor]) -> Result:
    result = {"out": out.detach(), **dict(zip(names, grads))}
    if "router.gate.bias" in result:
        columns = [result["router.gate.weight"], result.pop("router.gate.bias")[:, None]]
        result["router.gate.weight"] = torch.cat(columns, dim=1)
    return result


def loop_over_tokens(moe: MoE, x: Tensor, ids_TK: Tensor, probe: Tensor, dtype: torch.dtype) -> Result:
    """The same, one token and one expert at a time, every product in `dtype`.

    Scores, gates, a token's sum over its experts and a weight's gradient over its tokens are float32 at least,
    as in the layer.
    """
    config, router = moe.config, moe.config.router
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: p.detach().to(wide).requires_grad_() for name, p in moe.named_parameters()}
    x_wide = x.detach().to(wide).requires_grad_()

    def weight(name: str, to: torch.dtype = dtype) -> Tensor:
        return leaves[name].to(to)  # cast where it is used, so that its gradients meet in the wide dtype

    def swiglu(x_D: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return w2 @ (F.silu(w1 @ x_D) * (w3 @ x_D))

    def expert(x_D: Tensor, e: int) -> Tensor:
        w1, w2, w3 = (weight(f"experts.{name}")[e] for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
        if config.activation == "swiglu" and not config.mlp_bias:
            return swiglu(x_D, w1, w2, w3)
        gate_F, up_F = w1 @ x_D, w3 @ x_D
        if config.mlp_bias:
            gate_F, up_F = gate_F + weight("experts.b1_EF")[e], up_F + weight("experts.b3_EF")[e]
        gate_F, up_F = gate_F.clamp(max=7), up_F.clamp(min=-7, max=7)
        out_D = w2 @ ((up_F + 1) * (gate_F * (1.702 * gate_F).sigmoid()))
        return out_D + weight("experts.b2_ED")[e] if config.mlp_bias else out_D

    outs = [x_wide.reshape(-1, config.dim)[:0].to(dtype)]
    for x_D, ids_K in zip(x_wide.reshape(-1, config.dim).to(dtype), ids_TK.tolist()):
        gate_dtype = wide if router.gate_dtype == "float32" else dtype
        logits_E = weight("router.gate.weight", gate_dtype) @ x_D.to(gate_dtype)
        if router.gate_bias:
            logits_E = logits_E + weight("router.gate.bias", gate_dtype)
        gates_K = SCORES[router.score_func](logits_E.to(wide))[ids_K]
        gates_K = (gates_K / gates_K.sum() if router.route_norm else gates_K) * router.route_scale
        sum_D = torch.zeros(config.dim, dtype=wide)
        for gate, e in zip(gates_K, ids_K):
            before, after = (gate, 1) if config.score_before_experts else (1, gate)
            sum_D = sum_D + after * expert((before * x_D.to(wide)).to(dtype), e).to(wide)
        out_D = sum_D.to(dtype)
        if config.num_shared_experts:
            shared_D = swiglu(x_D, *(weight(f"shared_experts.w{i}.weight") for i in (1, 2, 3)))
            if config.shared_expert_gate:
                shared_D = (weight("shared_experts.gate.weight") @ x_D).sigmoid() * shared_D
            out_D = out_D + shared_D
        outs.append(out_D[None])
    out = torch.cat(outs).view(x.shape)
    grads = torch.autograd.grad((out * probe.to(dtype)).sum(), (x_wide, *leaves.values()), materialize_grads=True)
    return _result(out, ("x", *leaves), [grad.to(dtype) for grad in grads])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact; of the difference alone where the exact is zero."""
    got, exact = got.detach(), exact.detach()
    norm = exact.double().norm()
    return float((got.double() - exact.double()).norm() / (norm if norm > 0 else 1))


def assert_within_budget(got: Result, low: Result, exact: Result) -> None:
    """Every error is at most twice that of the reference in low precision."""
    assert got.keys() == low.keys() == exact.keys()
    for name in exact:
        error, own = relative_error(got[name], exact[name]), relative_error(low[name], exact[name])
        assert error <= 2 * own, f"{name}: relative error {error:.2e} where the reference has {own:.2e}"


def assert_float64(got: Result, exact: Result) -> None:
    """float64 against float64: only the order of sums may differ."""
    assert got.keys() == exact.keys()
    for name in exact:
        error = relative_error(got[name], exact[name])
        assert error <= 1e-14, f"{name}: relative error {error:.2e}"
