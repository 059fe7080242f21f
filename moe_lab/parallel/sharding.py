"""Training on many ranks that equals one: experts spread over `ep`, every weight cut over all ranks by FSDP2.

Each rank brings other tokens: other sequences over `dp` and `ep`, other positions of the same ones over `sp`
(`parallel.sequence`). What is trained is the mean of all ranks' losses: of the batch, where each has the mean over an
equal share of it, or of unequal shares where each loss is its sum times the ranks over the batch's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

from moe_lab.config import MoEConfig, check_int
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.moe import MoE
from moe_lab.layer.weight_cache import UNDER_FSDP
from moe_lab.parallel.ordered import OrderedReduceScatter, gather
from moe_lab.parallel.wire import compare_settings, wire, without_weights

MESHES = (("dp", "ep"), ("dp", "sp", "ep"))
_meshes: WeakKeyDictionary[Any, dict[tuple[str, tuple[int, int, int]], DeviceMesh]] = WeakKeyDictionary()


def make_mesh(ep: int, sp: int = 1, *, device: str = "cpu") -> DeviceMesh:
    """All ranks as (dp, sp, ep): neighbours share the experts. `ValueError` unless `ep` and `sp` divide the ranks.

    The same mesh for the same sizes, as long as the ranks are together: a new one would keep groups and their threads.
    """
    ranks = dist.get_world_size()
    check_int("ep", ep, 1)
    check_int("sp", sp, 1)
    if ranks % ep:
        raise ValueError(f"ep={ep} must divide the {ranks} ranks")
    if ranks % (sp * ep):
        raise ValueError(f"sp={sp} must divide the {ranks // ep} ranks beside ep={ep}")
    known, sizes = _meshes.setdefault(dist.group.WORLD, {}), (ranks // (sp * ep), sp, ep)
    if (device, sizes) not in known:
        known[device, sizes] = init_device_mesh(device, sizes, mesh_dim_names=MESHES[1])
    return known[device, sizes]


def replicas(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same experts, over `dp` and `sp`: FSDP cuts those once more."""
    return mesh["dp", "sp"]._flatten("replicas") if "sp" in (mesh.mesh_dim_names or ()) else mesh["dp"]


def expert_dim(config: MoEConfig, name: str, dp: int, ep: int) -> int:
    """The dimension that FSDP cuts an expert weight along: experts, or with more ranks than experts the next one.

    That next one, F for w1 and w3 and D for w2, has to divide; else it is experts after all, and some ranks hold none.
    """
    size = config.dim if name.startswith(("w2", "b2")) else config.hidden_dim
    return 1 if dp * ep > config.num_experts and size % dp == 0 else 0


def check_layout(config: MoEConfig, dp: int, ep: int) -> None:
    """`ValueError` naming what does not divide; `dp` ranks, those of `sp` among them, hold the same experts."""
    if config.num_experts % ep:
        raise ValueError(f"num_experts={config.num_experts} must divide over ep={ep} ranks")
    for name in ("w1_EFD", "w2_EDF"):
        local = config.num_experts // ep
        if ep > 1 and expert_dim(config, name, dp, ep) == 0 and local % dp:
            field, size = ("dim", config.dim) if name == "w2_EDF" else ("hidden_dim", config.hidden_dim)
            raise ValueError(
                f"num_experts={config.num_experts} on {dp * ep} ranks with ep={ep}: the {local} experts of a rank must "
                f"divide over the {dp} ranks of dp x sp that hold them, or with more ranks than experts "
                f"{field}={size} must"
            )


class ShardedExperts(nn.Module):
    """One rank's experts, whose weights are cut along experts over `ep` and keep their names and whole shapes."""

    def __init__(self, experts: GroupedExperts, mesh: DeviceMesh) -> None:
        super().__init__()
        local = len(experts.w1_EFD) // mesh.size()
        self.products = [without_weights(experts, local)]  # in a list it is no child: its weights are ours
        self.products[0].cache.refused = UNDER_FSDP
        for name, weight in experts.named_parameters():
            cut = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(cut, requires_grad=weight.requires_grad))

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """As `GroupedExperts`, of the experts here."""
        weights = {name: weight.to_local() for name, weight in self.named_parameters()}  # type: ignore[attr-defined]
        return functional_call(self.products[0], weights, (x_RD, ends_E))


def shard_moe(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    fixed_order: bool = False,
) -> nn.Module:
    """Spread `model`, built alike on every rank, over a (dp, ep) or (dp, sp, ep) mesh, in place, before an optimizer.

    Each module that holds an `MoE` is gathered and reduced as a unit, and what is left with the model. Dense weights
    are cut over all ranks; expert weights Shard(0) over `ep`, then by `expert_dim` over `dp` and `sp`. Gradients are
    those of the mean loss over all ranks. `dtype`: weights but the gates' are rounded to it in forward and backward;
    gradients are reduced in float32. `checkpointing`: those units keep only their input and run again in backward.
    `fixed_order`: gradients are summed in the order of ranks, which backends choose otherwise.

    Raises the same `ValueError` on every rank for a mesh or a layer that does not fit, or settings that differ.
    """
    if mesh.mesh_dim_names not in MESHES:
        raise ValueError(f"mesh has dimensions {mesh.mesh_dim_names}: must have {' or '.join(map(str, MESHES))}")
    beside, ep, everyone = replicas(mesh), mesh["ep"].size(), mesh._flatten("all")
    dp = beside.size()
    settings = {"dtype": dtype, "checkpointing": checkpointing, "fixed_order": fixed_order}
    compare_settings(settings, everyone.get_group())
    for moe in moe_layers(model):
        check_layout(moe.config, dp, ep)
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    inside = dataclasses.replace(low, cast_forward_inputs=False)  # tables of positions and masks stay as they are
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in list(_units(model)):
        moe = unit if isinstance(unit, MoE) else next(m for m in unit.children() if isinstance(m, MoE))
        if ep > 1:
            experts = ShardedExperts(moe.experts, mesh["ep"])
            wire(moe, mesh["ep"], collectives="c10d")
            moe.experts = experts  # type: ignore[assignment]
        placements = {
            weight: Shard(expert_dim(moe.config, name, dp, ep)) for name, weight in moe.experts.named_parameters()
        }
        fully_shard(moe.experts, mesh=beside, mp_policy=low, shard_placement_fn=placements.get)
        if ep == 1:
            register_fsdp_forward_method(moe.experts, "routed")
        fully_shard(moe.router, mesh=everyone, mp_policy=exact)
        if checkpointing:
            checkpoint(unit)
        if unit is not model:
            unit.register_forward_pre_hook(partial(_round_hidden, dtype))
            fully_shard(unit, mesh=everyone, mp_policy=inside)
    fully_shard(model, mesh=everyone, mp_policy=low)
    experts_of_all: list[nn.Module] = [moe.experts for moe in moe_layers(model)]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            ranks = dp if module in experts_of_all else dp * ep
            module.set_force_sum_reduction_for_comms(ranks > 1)  # gloo has no mean; one rank would divide twice
            # The sum over its replicas of an expert's gradients holds those of all ranks' tokens already.
            module.set_gradient_divide_factor(float(dp * ep))
            if fixed_order:
                module.set_custom_reduce_scatter(OrderedReduceScatter())  # type: ignore[arg-type]
    return model


def _round_hidden(dtype: torch.dtype | None, unit: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(dtype), *args[1:]) if dtype is not None and args else args


def moe_layers(model: nn.Module) -> list[MoE]:
    """The layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold a layer of their own; the model itself if it is one."""
    for module in model.modules():
        if any(isinstance(child, MoE) for child in module.children()):
            yield module
    if isinstance(model, MoE):
        yield model


@torch.no_grad()
def update_biases(model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """One balancing step of every layer from the counts of all ranks, once an optimizer step: those counts (L, E).

    Micro-batches before it add up in each layer's own counts.
    """
    layers = moe_layers(model)
    counts_LE = torch.stack([moe.tokens_per_expert_E for moe in layers])
    dist.all_reduce(counts_LE, group=replicas(mesh).get_group())
    for moe, counts_E in zip(layers, counts_LE):
        moe.tokens_per_expert_E.copy_(counts_E)
        moe.update_expert_bias()  # which sums over ep
    dist.all_reduce(counts_LE, group=mesh.get_group("ep"))
    return counts_LE


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`: the whole norm, over weights here or cut over all ranks without a copy.

    Summed in float64 and rounded once, so that no layout changes it but by chance.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    cut = any(isinstance(grad, DTensor) for grad in grads)
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    total = torch.stack([grad.double().square().sum() for grad in grads]).sum()
    norm = (torch.stack(gather(total)).sum() if cut else total).sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale)
    return norm
