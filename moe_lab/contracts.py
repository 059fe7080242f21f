"""Checks of values, as opposed to shapes: cheap ones always, costly ones under debug contracts.

`MOE_LAB_DEBUG_CONTRACTS=1` turns on the costly ones.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def debug() -> bool:
    """Whether `MOE_LAB_DEBUG_CONTRACTS` asks for costly checks."""
    return os.environ.get("MOE_LAB_DEBUG_CONTRACTS", "0") not in ("", "0")


def check_finite(name: str, rows: Tensor) -> None:
    """Refuse NaN and infinity in a (T, ...) tensor, naming the first bad row.

    On CPU, and anywhere under debug contracts, a `ValueError`. On CUDA a device-side assertion: it does not
    wait for the device. Nothing while compiling, since an assertion would split the graph.
    """
    if torch.compiler.is_compiling():
        return
    # One pass: the sum is finite unless a value is not (or the sum overflows, which the exact look tells apart).
    if rows.device.type == "cpu" or debug():
        if not rows.detach().sum(dtype=torch.float64).isfinite():
            finite_T = rows.detach().isfinite().flatten(1).all(dim=1)
            if not finite_T.all():
                token = int(finite_T.int().argmin())
                raise ValueError(
                    f"{name} of token {token} are not finite ({int((~finite_T).sum())} of {len(finite_T)} tokens "
                    "have NaN or infinity): routing is undefined for them"
                )
    elif rows.device.type == "cuda":
        torch._assert_async(rows.detach().sum(dtype=torch.float64).isfinite(), f"{name} must be finite")


def check_ids(name: str, ids: Tensor, num_experts: int) -> None:
    """Refuse expert ids outside -1 (dropped) .. E-1, naming the first; on CPU, or under debug contracts."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    if ids.device.type == "cpu" or debug():
        low, high = (int(v) for v in ids.aminmax())
        if low < -1 or high >= num_experts:
            bad = low if low < -1 else high
            raise ValueError(f"{name} holds id {bad}: allowed are 0..{num_experts - 1}, and -1 for dropped")


def check_dropless(name: str, ids: Tensor) -> None:
    """Refuse dropped assignments (-1) where every assignment must get a row; on CPU, or under debug contracts."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    if (ids.device.type == "cpu" or debug()) and int(ids.min()) < 0:
        raise ValueError(f"{name} holds {int((ids < 0).sum())} dropped assignments (-1): plan with dropless=False")


def check_counts(counts_E: Tensor, ends_E: Tensor) -> None:
    """Refuse counts that do not match the sorted ids; under debug contracts only."""
    if debug() and not torch.compiler.is_compiling() and not torch.equal(counts_E.cumsum(0), ends_E.long()):
        raise ValueError(f"counts_E={counts_E.tolist()} do not sum to the ends of the sorted ids {ends_E.tolist()}")


def check_splits(num_rows: int, send: list[int] | None, receive: list[int] | None, size: int) -> None:
    """Refuse splits of an exchange that do not add up; under debug contracts only. None is even splits."""
    if not debug():
        return
    if send is None and num_rows % size:
        raise ValueError(f"even splits of {num_rows} rows over {size} ranks do not exist")
    for name, splits in (("send", send), ("receive", receive)):
        if splits is not None and (len(splits) != size or min(splits) < 0):
            raise ValueError(f"{name} splits {splits} must be {size} numbers >= 0")
    if send is not None and sum(send) != num_rows:
        raise ValueError(f"send splits {send} add up to {sum(send)}, but there are {num_rows} rows")
