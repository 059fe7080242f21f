"""What a benchmark computes: a layer by name and size, seeded inputs with skewed routing, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.config import PRESETS, MoEConfig, check_choice

LAYERS: dict[str, MoEConfig] = PRESETS | {
    "fine": MoEConfig(dim=1536, hidden_dim=256, num_experts=128, top_k=8),
    "fine_64": MoEConfig(dim=2048, hidden_dim=512, num_experts=64, top_k=8),
}
TOKENS = {"mixtral_8x7b": 8192}  # a layer's tokens where they are not DEFAULT_TOKENS
DEFAULT_TOKENS = 16384
SKEW = 0.5


class Inputs(NamedTuple):
    """One routed part to compute: T tokens, their K gates and experts, and the weights of E experts."""

    x_TD: Float[Tensor, "T D"]
    gates_TK: Float[Tensor, "T K"]
    expert_ids_TK: Int[Tensor, "T K"]
    w1_EFD: Float[Tensor, "E F D"]
    w2_EDF: Float[Tensor, "E D F"]
    w3_EFD: Float[Tensor, "E F D"]


def layer_config(name: str) -> MoEConfig:
    """A layer by name, such as "10B_2B"; "10B_2B/8" has an eighth of its widths D and F."""
    layer, slash, divisor = name.partition("/")
    check_choice("preset", layer, LAYERS)
    config = LAYERS[layer]
    by = int(divisor) if divisor.isdecimal() else 0
    if not slash:
        return config
    if by < 1 or config.dim % by or config.hidden_dim % by:
        raise ValueError(
            f"preset={name!r}: {divisor!r} must be an integer >= 1 that divides dim={config.dim} "
            f"and hidden_dim={config.hidden_dim}"
        )
    return config.replace(dim=config.dim // by, hidden_dim=config.hidden_dim // by)


def default_tokens(name: str) -> int:
    """Tokens of a layer where nobody says how many."""
    return TOKENS.get(name.partition("/")[0], DEFAULT_TOKENS)


def make_inputs(
    config: MoEConfig, tokens: int, device: torch.device, dtype: torch.dtype, *, skew: float = SKEW
) -> Inputs:
    """Seeded tokens and weights of fan-in scale, with the routing of `draw_routing`."""
    draw = torch.Generator(device).manual_seed(0)
    gates_TK, ids_TK = draw_routing(config, tokens, draw, skew)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype).mul_(std)

    experts, hidden_dim, dim = config.num_experts, config.hidden_dim, config.dim
    up, down = (experts, hidden_dim, dim), (experts, dim, hidden_dim)
    weights = normal(*up, std=dim**-0.5), normal(*down, std=hidden_dim**-0.5), normal(*up, std=dim**-0.5)
    return Inputs(normal(tokens, dim), gates_TK, ids_TK, *weights)


def draw_routing(
    config: MoEConfig, tokens: int, draw: torch.Generator, skew: float
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """Gates and experts from normal logits with an offset an expert, of standard deviation `skew`.

    Skew 0 is uniform random routing.
    """
    logits_TE = torch.randn(tokens, config.num_experts, generator=draw, device=draw.device)
    logits_TE += skew * torch.randn(config.num_experts, generator=draw, device=draw.device)
    gates_TK, ids_TK = logits_TE.softmax(dim=-1).topk(config.top_k, dim=-1)
    return gates_TK.contiguous(), ids_TK


def imbalance(inputs: Inputs) -> float:
    """The largest expert's assignments over the mean."""
    counts_E = torch.bincount(inputs.expert_ids_TK.flatten(), minlength=len(inputs.w1_EFD)).float()
    return float(counts_E.max() / counts_E.mean())


def dense_bound(inputs: Inputs) -> Callable[[], object]:
    """Two products with as many floating-point operations as all experts together, into buffers of their own."""
    rows, (_, hidden_dim, dim) = inputs.expert_ids_TK.numel(), inputs.w1_EFD.shape
    x, w13 = (torch.randn(*s, device=inputs.x_TD.device).to(inputs.x_TD) for s in ((rows, dim), (dim, 2 * hidden_dim)))
    h, w2 = (torch.randn(*s, device=x.device).to(x) for s in ((rows, hidden_dim), (hidden_dim, dim)))
    up, down = x.new_empty(rows, 2 * hidden_dim), x.new_empty(rows, dim)
    return lambda: (torch.mm(x, w13, out=up), torch.mm(h, w2, out=down))


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a result in `dtype` is compared with: float32 for 16 bits, float64 for float32."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def reference(inputs: Inputs) -> Tensor:
    """(T, D) in `exact_dtype`: every expert on its own tokens."""
    exact = exact_dtype(inputs.x_TD.dtype)
    out_TD = torch.zeros_like(inputs.x_TD, dtype=exact)
    for expert in range(inputs.w1_EFD.shape[0]):
        token, slot = (inputs.expert_ids_TK == expert).nonzero(as_tuple=True)
        w1, w2, w3 = (w[expert].to(exact) for w in inputs[3:])
        x = inputs.x_TD[token].to(exact)
        y = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
        out_TD.index_add_(0, token, y * inputs.gates_TK[token, slot, None])
    return out_TD


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, Frobenius norms; 0 for equal tensors."""
    difference = float((got.to(exact.dtype) - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0
