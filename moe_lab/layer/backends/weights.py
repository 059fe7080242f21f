"""What every backend is given beside its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from moe_lab.layer.activations import swiglu
from moe_lab.layer.weight_cache import WeightCache


class Biases(NamedTuple):
    """Biases of the three products, added where the weights of the same number multiply."""

    b1_EF: Tensor
    b2_ED: Tensor
    b3_EF: Tensor


class Weights(NamedTuple):
    """E experts' weights in the rows' dtype, what they do between products, and where copies may be kept."""

    w1_EFD: Float[Tensor, "E F D"]
    w2_EDF: Float[Tensor, "E D F"]
    w3_EFD: Float[Tensor, "E F D"]
    biases: Biases | None = None
    activation: Callable[[Tensor, Tensor], Tensor] = swiglu
    cache: WeightCache | None = None
