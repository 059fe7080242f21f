"""Ways to balance experts as values: what each is, where it is from, and how it is set in a layer and a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_lab.config import MoEConfig, check_choice

Setting = Literal["layer", "router", "loss"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to balance.

    `coefficient` is its usual strength and `sets` what it sets: a field of `MoEConfig` (`where="layer"`), of
    `RouterConfig` (`"router"`), or the weight of a loss in training (`"loss"`); None for methods without one.
    `layer` and `router` are further settings; `acts` says in a word what moves.
    """

    source: str
    acts: str
    sets: str | None = None
    where: Setting = "layer"
    coefficient: float | None = None
    layer: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)

    def config(self, base: MoEConfig, coefficient: float | None = None) -> MoEConfig:
        """`base` with this method in place of its own balancing. `ValueError` for a method that cannot run live."""
        layer = {"load_balance_coeff": None, "capacity_factor": None, **self.layer}
        router = {"choose_by": "top_k", "jitter": 0.0, "force_load_balance": None, **self.router}
        if self.sets is not None and self.where != "loss":
            {"layer": layer, "router": router}[self.where][self.sets] = self.strength(coefficient)
        return base.replace(router=replace(base.router, **router), **layer)

    def losses(self, coefficient: float | None = None) -> dict[str, Any]:
        """Its weights of auxiliary losses, by the fields of a training's config."""
        return {self.sets: self.strength(coefficient)} if self.where == "loss" and self.sets is not None else {}

    def strength(self, coefficient: float | None = None) -> float:
        """The coefficient given, or the usual one."""
        given = self.coefficient if coefficient is None else coefficient
        return 0.0 if given is None else given


SWITCH, GSHARD = "Switch Transformer, arXiv:2101.03961", "GShard, arXiv:2006.16668"
METHODS: Mapping[str, Method] = {
    "none": Method(source="top-k routing", acts="nothing"),
    "bias": Method(
        source="loss-free balancing, arXiv:2408.15664, centred as torchtitan",
        acts="choice",
        sets="load_balance_coeff",
        coefficient=1e-3,
    ),
    "bias, not centred": Method(
        source="loss-free balancing, arXiv:2408.15664, as Megatron-Core",
        acts="choice",
        sets="load_balance_coeff",
        coefficient=1e-3,
        layer={"bias_centred": False},
    ),
    "switch, micro-batch": Method(
        source=f"{SWITCH}, equations 4 to 6", acts="loss", sets="switch_coeff", where="loss", coefficient=1e-2
    ),
    "switch, sequence": Method(
        source="DeepSeek-V3, arXiv:2412.19437, section 2.1.2",
        acts="loss",
        sets="sequence_coeff",
        where="loss",
        coefficient=1e-2,
    ),
    "switch, global": Method(
        source="global-batch loss, arXiv:2501.11873", acts="loss", sets="global_coeff", where="loss", coefficient=1e-2
    ),
    "switch, hf": Method(
        source="transformers, load_balancing_loss_func", acts="loss", sets="hf_coeff", where="loss", coefficient=1e-2
    ),
    "z-loss": Method(
        source="ST-MoE, arXiv:2202.08906, equation 5", acts="loss", sets="z_coeff", where="loss", coefficient=1e-3
    ),
    "sinkhorn": Method(
        source="Megatron-Core; S-BASE, arXiv:2202.01169", acts="choice", router={"choose_by": "sinkhorn"}
    ),
    "expert choice": Method(source="arXiv:2202.09368", acts="choice", router={"choose_by": "expert_choice"}),
    "capacity, probs": Method(
        source="Megatron-Core", acts="drops", sets="capacity_factor", coefficient=1.25, layer={"drop_policy": "probs"}
    ),
    "capacity, token-major": Method(
        source=f"{SWITCH}, section 2.2",
        acts="drops",
        sets="capacity_factor",
        coefficient=1.25,
        layer={"drop_policy": "position"},
    ),
    "capacity, slot-major": Method(
        source=GSHARD,
        acts="drops",
        sets="capacity_factor",
        coefficient=1.25,
        layer={"drop_policy": "position", "drop_order": "slot_major"},
    ),
    "jitter": Method(source=f"{SWITCH}, section 2.4", acts="noise", sets="jitter", where="router", coefficient=1e-2),
}


def method(name: str) -> Method:
    """One of `METHODS`. `ValueError` names the known ones."""
    check_choice("method", name, METHODS)
    return METHODS[name]
