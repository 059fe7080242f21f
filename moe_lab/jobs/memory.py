"""The bytes that a rank really holds in a training step, counted tensor by tensor, by the planner's terms."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from moe_lab.models.lm import MoELM
from moe_lab.parallel.mesh import MeshExchange
from moe_lab.parallel.sequence import MeshShard
from moe_lab.parallel.sharding import make_mesh, shard_moe

PEAKS = 5  # steps


class Held(NamedTuple):
    """Bytes of one rank by term, the most that was allocated at once, and `rows` of its experts in each layer."""

    terms: dict[str, int]
    peak: int
    rows: tuple[int, ...]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under some tensors, each counted once."""
    storages = {(s := local(t).untyped_storage())._cdata: s for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class Watch:
    """What autograd saves in a forward, and the whole weights that modules see while they run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.saved: list[Tensor] = []
        self.own = {local(p.detach()).untyped_storage()._cdata for p in model.parameters()}
        self.weights: dict[int, torch.UntypedStorage] = {}
        self.gathered = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward."""
        hooks = [module.register_forward_pre_hook(self._see) for module in self.model.modules()]
        random_state = torch.get_rng_state
        torch.get_rng_state = lambda: self._keep(random_state())  # by which a checkpoint keeps it, unseen by autograd
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            torch.get_rng_state = random_state
            for hook in hooks:
                hook.remove()

    def activations(self) -> int:
        """Bytes saved that are no weights; weights gathered for a block are freed by now, and count nothing."""
        weights = self.own | self.weights.keys()
        return distinct_bytes(t for t in self.saved if local(t).untyped_storage()._cdata not in weights)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.saved.append(tensor.detach())
        return tensor

    def _see(self, module: nn.Module, _: Any) -> None:
        for weight in module.parameters():
            storage = local(weight.detach()).untyped_storage()
            if storage._cdata not in self.own:
                self.weights[storage._cdata] = storage
        self.gathered = max(self.gathered, sum(storage.nbytes() for storage in self.weights.values()))


def loss_of(model: nn.Module, bytes_BL: Tensor, part: MeshShard | None = None) -> Tensor:
    """Mean cross-entropy of the next bytes; `part`: this rank's part of it, at its positions."""
    if part is not None:
        return part.cross_entropy(model(part.cut(bytes_BL[:, :-1]), part), bytes_BL[:, 1:])
    return F.cross_entropy(model(bytes_BL[:, :-1]).flatten(0, 1).float(), bytes_BL[:, 1:].flatten())


def measure(model: MoELM, text_BL: Tensor, ep: int | None, sp: int = 1, **options: Any) -> Held:
    """Two steps of this rank on its share of `text_BL` (B, max_length + 1); ep None is one process, without a mesh.

    Over `sp` a share is of some positions only. `options`: `dtype` and `checkpointing` of `shard_moe`. The terms are of
    the second step, at a learning rate of 0, so that it routes as the model given does; the peak is of all that one
    allocates, gradients too, on top of weights and moments: of `PEAKS` steps the least, since gloo's threads now and
    then free a buffer late, which adds to a step up to 15 % that it does not need.
    """
    model, text_BL, part = _spread(model, text_BL, ep, sp, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False)
    loss_of(model, text_BL, part).backward()
    optimizer.step()
    optimizer.zero_grad()
    own = distinct_bytes(model.parameters())
    moments = distinct_bytes(v for state in optimizer.state.values() for v in state.values())
    watch = Watch(model)
    with watch.watching(), _receiving(model) as (rows, received):
        loss = loss_of(model, text_BL, part)
    activations = watch.activations()
    watch.saved.clear()
    loss.backward()
    gradients = distinct_bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    transient = min(_peak(model, text_BL, part) for _ in range(PEAKS))
    terms = {
        "parameters": own,
        "gradients": gradients,
        "optimizer": moments,
        "activations": activations,
        "receive": max(received[::2], default=0),  # a layer dispatches, then combines
        "gathered": watch.gathered,
    }
    return Held(terms, own + moments + transient, tuple(rows))


class Came(NamedTuple):
    """What came to a rank in a step: `rows` for its experts in each layer, and bytes of the largest buffer of them."""

    rows: tuple[int, ...]
    receive: int


def watch_steps(model: MoELM, text_SBL: Tensor, ep: int, sp: int = 1) -> list[Came]:
    """What comes to this rank's share of many steps (S, B, max_length + 1), which run forward only."""
    model, text_SBL, part = _spread(model, text_SBL, ep, sp)
    steps = []
    with torch.no_grad(), _receiving(model) as (rows, received):
        for text_BL in text_SBL:
            loss_of(model, text_BL, part)
            steps.append(Came(tuple(rows), max(received[::2], default=0)))
            rows.clear()
            received.clear()
    return steps


def _spread(
    model: MoELM, text_BL: Tensor, ep: int | None, sp: int, **options: Any
) -> tuple[MoELM, Tensor, MeshShard | None]:
    """A copy of the model on the mesh of all ranks, this rank's sequences, and which positions of them are its own."""
    model, part = copy.deepcopy(model).to(text_BL.device).train(), None
    if ep is not None:
        mesh = make_mesh(ep, sp, device=text_BL.device.type)
        shard_moe(model, mesh, **options)
        share = mesh.get_local_rank("dp") * ep + mesh.get_local_rank("ep")
        text_BL = text_BL.chunk(dist.get_world_size() // sp, dim=-2)[share]
        part = MeshShard.of(mesh["sp"], text_BL.shape[-2], text_BL.shape[-1] - 1) if sp > 1 else None
    return model, text_BL.clone(), part  # a view would keep all of it


@contextmanager
def _receiving(model: MoELM) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of each layer's experts, and bytes of the buffers in which they arrive from other ranks, as they come."""
    rows: list[int] = []
    received: list[int] = []
    hooks = [
        moe.experts.register_forward_pre_hook(lambda experts, args: rows.append(len(args[0])))
        for moe in model.moe_layers
    ]
    all_to_all = MeshExchange.all_to_all

    def counted(self: MeshExchange, rows_SD: Tensor, send: Any, receive: Any, **how: Any) -> Any:
        into = len(rows_SD) if receive is None else sum(receive)
        received.append(into * rows_SD.shape[1] * rows_SD.element_size())
        return all_to_all(self, rows_SD, send, receive, **how)

    MeshExchange.all_to_all = counted  # type: ignore[method-assign]
    try:
        yield rows, received
    finally:
        MeshExchange.all_to_all = all_to_all  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


def _peak(model: MoELM, text_BL: Tensor, part: MeshShard | None) -> int:
    """The most bytes that a forward and backward hold at once, as PyTorch's allocator saw them."""
    if text_BL.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(model, text_BL, part)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _step(model, text_BL, part)
    events = sorted(
        (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    return max(accumulate(event.nbytes() for event in events))


def _step(model: MoELM, text_BL: Tensor, part: MeshShard | None) -> None:
    loss_of(model, text_BL, part).backward()
    model.zero_grad()
