"""Other ways to run the routed part of a layer, on the same inputs: the sequence of ops of known libraries.

A peer takes tokens, gates, expert ids and weights in our layout and returns (T, D); its weights may be its own
tensors. `arms` builds those that can run, and says why the others cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.kernels.scatter_add import deterministic_scatter_add
from moe_lab.layer.auto import Choice
from moe_lab.layer.backends import ROUTED
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.router import Routing, count


class Inputs(NamedTuple):
    """One routed part to compute: T tokens, their K gates and experts, and the weights of E experts."""

    x_TD: Float[Tensor, "T D"]
    gates_TK: Float[Tensor, "T K"]
    expert_ids_TK: Int[Tensor, "T K"]
    w1_EFD: Float[Tensor, "E F D"]
    w2_EDF: Float[Tensor, "E D F"]
    w3_EFD: Float[Tensor, "E F D"]


class Arm(NamedTuple):
    """A way to run it: `run(x, gates)`, and the weights whose gradients it makes."""

    run: Callable[[Tensor, Tensor], Tensor]
    weights: tuple[Tensor, ...]


def ours(inputs: Inputs, backend: str) -> Arm:
    """Our layer without its router, with the backend named."""
    num_experts, hidden_dim, dim = inputs.w1_EFD.shape
    with torch.device("meta"):
        experts = GroupedExperts(dim, hidden_dim, num_experts, backend=backend)
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        setattr(experts, name, torch.nn.Parameter(getattr(inputs, name)))
    dispatcher = LocalTokenDispatcher(num_experts)
    ids_TK = inputs.expert_ids_TK

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        nothing = gates_TK.new_empty(0, num_experts)
        if backend in ROUTED:  # which need no counts
            routing = Routing(gates_TK, ids_TK, nothing, nothing, ids_TK.new_empty(num_experts))
            return experts.routed(x_TD, routing, Choice(backend))
        routing = Routing(gates_TK, ids_TK, nothing, nothing, count(ids_TK, num_experts))
        rows_RD, plan = dispatcher.dispatch(x_TD, routing)
        return dispatcher.combine(experts(rows_RD, plan.ends_E), routing, plan)

    return Arm(run, tuple(experts.parameters()))


def torchtitan(inputs: Inputs) -> Arm:
    """The ops of torchtitan's MoE, scores applied after the experts, its combine a deterministic scatter_add."""
    w1_EFD, w2_EDF, w3_EFD = (torch.nn.Parameter(w) for w in inputs[3:])
    ids_TK = inputs.expert_ids_TK
    num_experts, top_k = w1_EFD.shape[0], ids_TK.shape[1]

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        chosen_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.bool, device=ids_TK.device)
        ends_E = chosen_TE.scatter_(1, ids_TK, True).sum(0).cumsum(0, dtype=torch.int32)
        order_R = torch.argsort(ids_TK.reshape(-1), stable=True)
        token_R = order_R // top_k
        rows_RD = x_TD[token_R]
        hidden_RF = F.silu(F.grouped_mm(rows_RD, w1_EFD.mT, offs=ends_E))
        hidden_RF = hidden_RF * F.grouped_mm(rows_RD, w3_EFD.mT, offs=ends_E)
        rows_RD = F.grouped_mm(hidden_RF, w2_EDF.mT, offs=ends_E)
        rows_RD = (rows_RD.float() * gates_TK.reshape(-1)[order_R][:, None]).to(x_TD.dtype)
        index_RD = token_R[:, None].expand_as(rows_RD)
        return deterministic_scatter_add(torch.zeros_like(x_TD), index_RD, rows_RD)

    return Arm(run, (w1_EFD, w2_EDF, w3_EFD))


def transformers(inputs: Inputs) -> Arm:
    """The experts of transformers' Qwen3-MoE with `grouped_mm`."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    num_experts, hidden_dim, dim = inputs.w1_EFD.shape
    config = Qwen3MoeConfig(hidden_size=dim, moe_intermediate_size=hidden_dim, num_experts=num_experts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(torch.cat((inputs.w1_EFD, inputs.w3_EFD), dim=1))
    experts.down_proj = torch.nn.Parameter(inputs.w2_EDF)

    def run(x_TD: Tensor, gates_TK: Tensor) -> Tensor:
        return experts(x_TD, inputs.expert_ids_TK, gates_TK.to(x_TD.dtype))

    return Arm(run, tuple(experts.parameters()))


PEERS: dict[str, Callable[[Inputs], Arm]] = {
    "transformers": transformers,
    "torchtitan": torchtitan,
    "grouped": lambda inputs: ours(inputs, "grouped"),
    "fused": lambda inputs: ours(inputs, "fused"),
    "buffered": lambda inputs: ours(inputs, "buffered"),
    "loop": lambda inputs: ours(inputs, "loop"),  # waits for the device, so it comes last
}


def arms(inputs: Inputs, names: tuple[str, ...]) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms that run on these inputs, and for the others the reason that they do not."""
    able: dict[str, Arm] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            able[name] = PEERS[name](inputs)
            with torch.no_grad():
                able[name].run(inputs.x_TD, inputs.gates_TK)
        except (ImportError, ValueError, RuntimeError) as error:
            able.pop(name, None)
            reasons[name] = str(error).splitlines()[0]
    return able, reasons
