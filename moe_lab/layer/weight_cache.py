"""Copies of weights in another layout, kept while the weights stay the same.

A copy is found again by its sources' identity, storage, address, version counter, shape, dtype and device, as long as
no optimizer has stepped: fused ones write without a new version. A write through `.data` or NumPy, or by a collective,
moves none of these: call `drop_caches()` after one. Under debug contracts every hit is compared.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_lab import contracts, fastpaths

UNDER_FSDP = "under FSDP, which refills weights without a new version"
_steps = 0  # of all optimizers in this process


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Kept(NamedTuple):
    sources: tuple[weakref.ref[Tensor], ...]
    key: tuple[Any, ...]
    copy: Tensor


class WeightCache:
    """Copies by name. Never copied or stored with its module: a copy of the module starts empty."""

    def __init__(self, refused: str | None = None) -> None:
        self.refused = refused
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[str | None]]:
        return type(self), (self.refused,)  # for deepcopy and pickle

    def get(self, name: str, sources: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
        """The kept copy if `sources` are still what it was made of, else a new one, kept unless refused.

        Raises `ValueError` under debug contracts where a kept copy differs from what `build` gives.
        """
        reason = self.refused or next(filter(None, map(refuse, sources)), None)
        if reason is not None:
            fastpaths.note(f"cached_{name}_miss", f"not kept: {reason}")
            return build()
        key = (_steps, *(_facts(source) for source in sources))  # before reading: what is written meanwhile is new
        with self._lock:
            kept = self._kept.get(name)
            changed = _changed(kept, sources, key)
            if kept is not None and changed is None:
                if contracts.debug() and not torch.equal(kept.copy, build()):
                    raise ValueError(f"the kept {name} differs from its weights: after a write to .data, drop_caches()")
                fastpaths.note(f"cached_{name}_hit", "same weights, same version")
                return kept.copy
            fastpaths.note(f"cached_{name}_miss", changed or "")
            copy = build()
            self._kept[name] = _Kept(tuple(weakref.ref(s) for s in sources), key, copy)
            return copy

    def drop(self) -> None:
        """Forget every copy."""
        with self._lock:
            self._kept.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies kept."""
        return sum(kept.copy.nbytes for kept in list(self._kept.values()))


def _facts(source: Tensor) -> tuple[Any, ...]:
    # An address may be given to new memory; a storage that is weakly held is told from every later one.
    storage = StorageWeakRef(source.untyped_storage())
    return source._version, storage, source.data_ptr(), source.shape, source.stride(), source.dtype, source.device


def _changed(kept: _Kept | None, sources: Sequence[Tensor], key: tuple[Any, ...]) -> str | None:
    if kept is None:
        return "first use"
    if any(ref() is not source for ref, source in zip(kept.sources, sources)):
        return "another tensor"
    (old_steps, *old), (new_steps, *new) = kept.key, key
    if old_steps != new_steps:
        return "an optimizer has stepped"
    if old != new:
        written = any(was[0] != now[0] for was, now in zip(old, new))
        return "written in place" if written else "storage, shape, dtype or device changed"
    return None


def refuse(source: Tensor) -> str | None:
    """Why no copy of `source` may be kept, or None."""
    if torch.compiler.is_compiling():
        return "compiling: versions are not known"
    if isinstance(source, DTensor):
        return "a DTensor, which unsharding refills without a new version"
    if source.is_inference():
        return "an inference tensor, which has no version"
    if torch.is_grad_enabled() and source.requires_grad:
        return "a gradient flows to the weights"
    if not isinstance(source, torch.nn.Parameter):
        return "not a parameter but made from one, new each time"
    return None
