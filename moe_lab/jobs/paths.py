"""One whole layer, router and shared experts included, by every path that it can take: for a breakdown by phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.jobs.bench_inputs import layer_config
from moe_lab.layer.moe import MoE

PATHS: dict[str, dict[str, Any]] = {
    "loop": {"backend": "loop"},
    "padded": {"backend": "padded"},
    "grouped": {"backend": "grouped"},
    "buffered": {"backend": "buffered"},
    "loop, scatter_add": {"backend": "loop", "combine": "scatter_add"},
}


def preset_layer(name: str, tokens: int) -> tuple[MoE, Tensor]:
    """A preset's layer ("10B_2B/8" with an eighth of its widths) and tokens (T, D) for it: synthetic, seeded."""
    draw = torch.Generator().manual_seed(0)
    config = layer_config(name)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        moe = MoE(config)
    return moe.eval(), torch.randn(tokens, config.dim, generator=draw)


def path_arms(
    moe: MoE, x_TD: Tensor, paths: Mapping[str, Mapping[str, Any]] = PATHS
) -> dict[str, Callable[[], Tensor]]:
    """Forward of copies of the layer without gradients, by path: a path is what it changes of the config.

    Raises `ValueError` where a copy does not give what the layer itself gives, to 1e-5 of its norm.
    """
    with torch.no_grad():
        expected = moe(x_TD)
    arms: dict[str, Callable[[], Tensor]] = {}
    for name, changes in paths.items():
        copy = MoE(moe.config.replace(**changes)).to(x_TD.dtype).eval()
        copy.load_state_dict(moe.state_dict())
        arms[name] = torch.no_grad()(lambda copy=copy: copy(x_TD))
        error = float((arms[name]() - expected).norm() / expected.norm())
        if not error <= 1e-5:
            raise ValueError(f"path {name!r} differs by {error:.1e} of the output: must be at most 1e-5")
    return arms
