"""Putting a layer on a mesh: its experts on this rank, its dispatcher over the group, its settings compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.moe import MoE
from moe_lab.layer.placement import Placement
from moe_lab.parallel.mesh import MeshExchange


def wire(
    moe: MoE,
    mesh: DeviceMesh | dist.ProcessGroup | None,
    *,
    placement: Placement | None = None,
    tokens_per_rank: int | None = None,
    collectives: str = "functional",
) -> MoE:
    """Spread the experts of `moe` over a one-dimensional mesh, in place; every rank of it calls this.

    Each rank keeps the weights of its own slots, as new parameters: wire before an optimizer is made. None, or a
    mesh of one rank, leaves the layer local. Gradients are those of this rank's loss: router and shared experts
    want summing over ranks, and so do the replicas of an expert.

    Raises the same `ValueError` on every rank when settings differ between ranks, naming the first field that
    does, or when experts cannot be spread.
    """
    if mesh is None:
        return moe
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    if group.size() == 1:
        return moe
    settings = {"placement": placement, "tokens_per_rank": tokens_per_rank, "collectives": collectives}
    compare_settings(settings | _flat(moe.config), group)
    exchange = MeshExchange(group, collectives=collectives)
    dispatcher = AllToAllTokenDispatcher(moe.config, exchange, placement=placement, tokens_per_rank=tokens_per_rank)
    moe.experts = local_experts(moe.experts, dispatcher.placement, exchange.rank)
    moe.dispatcher = dispatcher
    return moe


def compare_settings(settings: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Raise one `ValueError` on every rank unless all ranks pass equal settings."""
    gathered: list[dict[str, str]] = [{} for _ in range(group.size())]
    dist.all_gather_object(gathered, {name: repr(value) for name, value in settings.items()}, group=group)
    differing = [name for name in gathered[0] if len({others.get(name) for others in gathered}) > 1]
    if differing:
        name = differing[0]
        by_value: dict[str, list[int]] = {}
        for rank, others in enumerate(gathered):
            by_value.setdefault(str(others.get(name)), []).append(rank)
        values = ", ".join(f"{value} on ranks {ranks}" for value, ranks in by_value.items())
        raise ValueError(f"{name} differs across the mesh: {values} (differing: {', '.join(differing)})")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of a nested dataclass by dotted name."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        fields |= _flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return fields


def without_weights(experts: GroupedExperts, num_experts: int) -> GroupedExperts:
    """The like of `experts` for another number of them, its weights on the meta device."""
    _, hidden_dim, dim = experts.w1_EFD.shape
    with torch.device("meta"):
        return GroupedExperts(
            dim,
            hidden_dim,
            num_experts,
            backend=experts.backend,
            activation=experts.activation,
            mlp_bias=experts.b1_EF is not None,
        )


def local_experts(experts: GroupedExperts, placement: Placement, rank: int) -> GroupedExperts:
    """A copy of the weights in one rank's slots, as leaves of their own."""
    slots = torch.tensor(placement.experts_of(rank), device=experts.w1_EFD.device)
    local = without_weights(experts, len(slots))
    for name, weight in experts.named_parameters():
        rows = weight.detach().index_select(0, slots)
        setattr(local, name, torch.nn.Parameter(rows, requires_grad=weight.requires_grad))
    return local
