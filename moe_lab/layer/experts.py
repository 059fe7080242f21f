"""The experts' weights, routed and shared, and which backend multiplies by them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor, nn

from moe_lab.config import Activation, check_choice
from moe_lab.kernels.blocks import fixed_elementwise, fixed_linear
from moe_lab.layer import auto
from moe_lab.layer.activations import ACTIVATIONS, swiglu
from moe_lab.layer.auto import Choice
from moe_lab.layer.backends import BACKENDS, ROUTED
from moe_lab.layer.backends.routed import routed
from moe_lab.layer.backends.weights import Biases, Weights
from moe_lab.layer.router import Routing
from moe_lab.layer.weight_cache import UNDER_FSDP, WeightCache


class GroupedExperts(nn.Module):
    """Weights of E experts, `w1_EFD` (gate), `w3_EFD` (up) and `w2_EDF` (down): torchtitan's layout and names.

    With `mlp_bias` also `b1_EF`, `b3_EF` and `b2_ED`, zeros at first. `fused` and `buffered` have neither biases nor
    any activation but "swiglu". `batched` keeps copies of weights: `cache.num_bytes` says how large, `drop_caches()`
    forgets them, which is needed after writes through `.data`. Raises `ValueError` before allocating where the
    weights are larger than the machine's memory.
    """

    b1_EF: nn.Parameter | None
    b2_ED: nn.Parameter | None
    b3_EF: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        backend: str = "loop",
        activation: Activation = "swiglu",
        mlp_bias: bool = False,
    ) -> None:
        super().__init__()
        check_choice("backend", backend, (*BACKENDS, "auto"))
        check_choice("activation", activation, ACTIVATIONS)
        if backend in ROUTED and (mlp_bias or activation != "swiglu"):
            raise ValueError(f"backend={backend!r} computes plain SwiGLU, not {activation!r} with mlp_bias={mlp_bias}")
        _check_memory(dim, hidden_dim, num_experts)
        self.activation = activation
        self.cache = WeightCache()
        self.w1_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        for name, size in (("b1_EF", hidden_dim), ("b2_ED", dim), ("b3_EF", hidden_dim)):
            bias = nn.Parameter(torch.empty(num_experts, size)) if mlp_bias else None
            self.register_parameter(name, bias)
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation fan_in ** -0.5, so that outputs keep the scale of inputs."""
        for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        for bias in (self.b1_EF, self.b2_ED, self.b3_EF):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"]) -> Float[Tensor, "R D"]:
        """Rows ends[e-1] .. ends[e] go through expert e. Weights are used in the rows' dtype."""
        choice = Choice(self.backend)
        if self.backend == "auto":
            choice = self.choose(x_RD, len(x_RD), ends_E.diff(prepend=ends_E.new_zeros(1)))
        choice.note()
        return BACKENDS[choice.backend](x_RD, ends_E, self._weights(x_RD))

    def routed(self, x_TD: Float[Tensor, "T D"], routing: Routing, choice: Choice) -> Float[Tensor, "T D"]:
        """Dispatch, experts and combine in one, by a backend of `ROUTED`."""
        choice.note()
        return routed(choice.backend, x_TD, routing, self._weights(x_TD))

    def choose(self, x: Tensor, num_rows: int, counts_E: Tensor | None = None) -> Choice:
        """The backend for `num_rows` rows made of x: the one asked for, or what "auto" comes to and why."""
        if self.backend != "auto":
            return Choice(self.backend)
        case = auto.case_of(x, num_rows, (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        return auto.choose(case, counts_E, plain=self.b1_EF is None and self.activation == "swiglu")

    def drop_caches(self) -> None:
        """Forget copies of weights: after writes through `.data`, which nothing can see."""
        self.cache.drop()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedExperts:
        self._let_go()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._let_go()
        super()._load_from_state_dict(*args, **kwargs)

    def _let_go(self) -> None:
        if torch.__future__.get_swap_module_params_on_conversion():  # which is refused for what is weakly held
            self.cache.drop()

    def _weights(self, x: Tensor) -> Weights:
        w1_EFD, w2_EDF, w3_EFD = (w.to(x.dtype) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        present = [b.to(x.dtype) for b in (self.b1_EF, self.b2_ED, self.b3_EF) if b is not None]
        if getattr(self, "_is_fsdp_managed_module", False):  # set by fully_shard on each module below it
            self.cache.refused = UNDER_FSDP
        biases = Biases(*present) if present else None
        return Weights(w1_EFD, w2_EDF, w3_EFD, biases, ACTIVATIONS[self.activation], self.cache)


def _check_memory(dim: int, hidden_dim: int, num_experts: int) -> None:
    """Refuse weights that the default device cannot hold."""
    needed = 3 * num_experts * dim * hidden_dim * torch.get_default_dtype().itemsize
    device = torch.get_default_device()
    if device.type == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        return  # meta: nothing is allocated
    if needed > there:
        raise ValueError(
            f"num_experts={num_experts}, hidden_dim={hidden_dim}, dim={dim} make weights of {needed / 2**30:.1f} GiB, "
            f"and {device} has {there / 2**30:.1f}: choose smaller ones, or build under torch.device('meta')"
        )


class SharedExperts(nn.Module):
    """n experts that every token uses, as one SwiGLU of width n*F: the sum of n SwiGLUs is one wide SwiGLU.

    `gated` multiplies the output by sigmoid(gate(x)), one number a token. `batch_invariant`: as in `MoEConfig`.
    """

    def __init__(
        self, dim: int, hidden_dim: int, num_shared_experts: int, *, gated: bool = False, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        width = hidden_dim * num_shared_experts
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.gate = nn.Linear(dim, 1, bias=False) if gated else None
        self.batch_invariant = batch_invariant

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """(T, D) -> (T, D). Weights are used in the dtype of x, as those of `GroupedExperts` are."""
        w1, w2, w3 = (linear.weight.to(x_TD.dtype) for linear in (self.w1, self.w2, self.w3))
        linear = fixed_linear if self.batch_invariant else F.linear
        elementwise = fixed_elementwise if self.batch_invariant else _apply
        out_TD = linear(elementwise(swiglu, linear(x_TD, w1), linear(x_TD, w3)), w2)
        if self.gate is None:
            return out_TD
        return elementwise(torch.sigmoid, linear(x_TD, self.gate.weight.to(x_TD.dtype))) * out_TD


def _apply(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)
