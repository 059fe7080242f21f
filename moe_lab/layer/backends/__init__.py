"""Ways to compute E SwiGLU experts over rows that lie sorted by expert: w2(silu(w1 x) * (w3 x)).

Each takes rows (R, D), the row after each expert's last, and `Weights`. An illegal request is a `ValueError` that
says why. gpt-oss's experts have biases and clamp what they multiply: see `moe_lab.layer.activations`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_lab.layer.backends.batched import batched_experts
from moe_lab.layer.backends.blocked import blocked_experts
from moe_lab.layer.backends.grouped import grouped_experts
from moe_lab.layer.backends.loop import loop_experts
from moe_lab.layer.backends.padded import padded_experts
from moe_lab.layer.backends.routed import buffered_rows, fused_rows
from moe_lab.layer.backends.weights import Weights

BACKENDS: dict[str, Callable[[Tensor, Tensor, Weights], Tensor]] = {
    "loop": loop_experts,
    "padded": padded_experts,
    "grouped": grouped_experts,
    "fused": fused_rows,
    "buffered": buffered_rows,
    "batched": batched_experts,
    "blocked": blocked_experts,
}
ROUTED = ("fused", "buffered")  # these may take tokens and gates instead of sorted rows
