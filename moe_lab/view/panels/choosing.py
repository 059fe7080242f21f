"""Controls for how tokens choose: presets, K, score function, groups, bias, forced balance."""

from __future__ import annotations

import dataclasses

import ipywidgets as widgets

from moe_lab.config import PRESETS, RouterConfig
from moe_lab.study.choice import Choice, has_bias
from moe_lab.study.trace import RoutingTrace
from moe_lab.view.panels.base import control

RECORDED, CUSTOM = "as recorded", "custom"
SCORES = (("softmax", "softmax"), ("sigmoid", "sigmoid"), ("sqrt softplus", "sqrt_softplus"))
OFF = "off"  # a dropdown shows nothing for None
FORCED = ((OFF, OFF), ("round robin", "round_robin"), ("random", "random"))
Groups = tuple[int, int] | str


def group_options(num_experts: int) -> dict[str, Groups]:
    """Ways to limit a choice to some groups of E experts: a power of two of groups, two experts each or more."""
    options: dict[str, Groups] = {OFF: OFF}
    groups = 2
    while num_experts % groups == 0 and num_experts // groups >= 2:
        kept = groups // 2
        while kept >= 1:
            options[f"{groups} keep {kept}"] = (groups, kept)
            kept //= 2
        groups *= 2
    return options


def preset_choice(name: str, trace: RoutingTrace) -> Choice:
    """How a published model chooses, fitted to a trace's experts: K at most E, groups as many as divide E."""
    layer, experts = PRESETS[name], trace.num_experts
    router, own = layer.router, trace.info.router
    groups, kept = router.num_expert_groups, router.num_limited_groups
    while groups and groups > 1 and (experts % groups or experts // groups < 2):
        groups, kept = groups // 2, max(1, (kept or 1) // 2)
    fitted = dataclasses.replace(
        router,
        num_expert_groups=groups if groups and groups > 1 else None,
        num_limited_groups=kept if groups and groups > 1 else None,
        gate_dtype=own.gate_dtype,
        gate_bias=own.gate_bias,
    )
    biased = layer.load_balance_coeff is not None and has_bias(trace)
    return Choice(top_k=min(layer.top_k, experts), router=fitted, use_bias=biased)


class ChoiceControls:
    """Widgets that make a `Choice`, kept within what a trace allows; `preset` says which known choice it is."""

    def __init__(self) -> None:
        self.preset = control(widgets.Dropdown, "choice", "170px", options=[RECORDED])
        self.top_k = control(widgets.IntSlider, "K", "200px", min=1, max=2, value=1)
        self.score = control(widgets.Dropdown, "score", "150px", options=SCORES)
        self.groups = control(widgets.Dropdown, "groups", "140px", options=[OFF])
        self.bias = control(widgets.Checkbox, "bias", "60px", indent=False)
        self.forced = control(widgets.Dropdown, "forced balance", "185px", options=FORCED)
        self._base = RouterConfig()
        self._known: dict[str, Choice] = {}

    @property
    def widgets(self) -> tuple[widgets.Widget, ...]:
        """From left to right."""
        return (self.preset, self.top_k, self.score, self.groups, self.bias, self.forced)

    def fit(self, trace: RoutingTrace) -> None:
        """Offer what this trace allows, set to what was recorded."""
        experts, recorded = trace.num_experts, Choice.recorded(trace)
        known = {RECORDED: recorded, **{name: preset_choice(name, trace) for name in PRESETS}}
        self._known = known if trace.logits_LTE is not None else {RECORDED: recorded}
        for widget in self.widgets:
            widget.disabled = trace.logits_LTE is None
        self.bias.disabled |= not has_bias(trace)
        options = group_options(experts)
        own = (recorded.router.num_expert_groups, recorded.router.num_limited_groups)
        if own[0] and own[1] and own not in options.values():
            options[f"{own[0]} keep {own[1]}"] = own[0], own[1]
        self.preset.options = [*self._known, CUSTOM]
        self.groups.options = list(options.items())
        self.top_k.max = min(experts, max(16, 2 * trace.top_k))
        self.set(recorded)

    def set(self, choice: Choice) -> None:
        """Set every control."""
        router = self._base = choice.router
        self.top_k.value = choice.top_k
        self.score.value = router.score_func
        groups = router.num_expert_groups
        self.groups.value = OFF if groups is None else (groups, router.num_limited_groups)
        self.bias.value = choice.use_bias
        self.forced.value = router.force_load_balance or OFF
        self.name()

    def take_preset(self) -> None:
        """Do what the preset says."""
        if self.preset.value in self._known:
            self.set(self._known[self.preset.value])

    def name(self) -> None:
        """Make the preset say what the other controls are."""
        choice = self._choice()
        self.preset.value = next((name for name, known in self._known.items() if known == choice), CUSTOM)

    def value(self) -> Choice | None:
        """The choice, or None for the recorded one. `ValueError` for one that cannot be."""
        choice = self._choice()
        return None if choice == self._known[RECORDED] else choice

    def _choice(self) -> Choice:
        groups, kept = (None, None) if self.groups.value == OFF else self.groups.value
        router = dataclasses.replace(
            self._base,
            score_func=self.score.value,
            num_expert_groups=groups,
            num_limited_groups=kept,
            force_load_balance=None if self.forced.value == OFF else self.forced.value,
        )
        return Choice(top_k=self.top_k.value, router=router, use_bias=self.bias.value)
