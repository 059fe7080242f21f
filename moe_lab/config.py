"""What a layer is made of: two frozen, validated values and the presets people compare against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ScoreFunc = Literal["softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["top2", "max", "topk_share"]
GateDtype = Literal["float32", "input"]
ForcedBalance = Literal["round_robin", "random"]
Backend = Literal["loop", "padded", "grouped", "fused", "buffered", "batched", "blocked", "auto"]
DropPolicy = Literal["probs", "position"]
DropOrder = Literal["token_major", "slot_major"]
ExpertsBy = Literal["top_k", "sinkhorn", "expert_choice"]
Activation = Literal["swiglu", "clamped_swiglu"]
CombineArm = Literal["gather", "scatter_add"]
Reorder = Literal["auto", "index", "equal_count", "segment_cat"]
EqualSplit = Literal["off", "adaptive", "force"]


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise `ValueError` naming the field, its value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(map(repr, allowed))}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise `ValueError` unless `value` is an int (not a bool) in [low, high]."""
    bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not valid or (high is not None and value > high):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be {bounds}")


def check_bool(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is True or False (a string "false" would count as true)."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_threshold(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How logits become a choice of experts and their gates.

    `score_func`: softmax and sigmoid as usual; sqrt_softplus is sqrt(log(1 + e^x)). Experts are chosen by score,
        which rounds: all logits above 17.4 have a sigmoid of 1 in float32, and of equal scores the lowest expert
        wins. Llama 4 chooses by logit, so there it can differ from its preset.
    `route_norm`: divide the K gates of a token by their sum + 1e-20. Softmax over the chosen logits
        (gpt-oss) is softmax with `route_norm`.
    `route_scale`: multiplies the gates last (DeepSeek-V3: 2.5).
    `num_expert_groups`, `num_limited_groups`, `group_score`: group-limited routing. Only experts of the best
        `num_limited_groups` groups can be chosen. A group scores the sum of its best two experts (`top2`,
        DeepSeek-V3), its best expert (`max`, DeepSeek-V2), or the sum of its best K // limited (`topk_share`,
        Megatron-Core).
    `gate_dtype`: the dtype in which logits are computed, float32 (torchtitan, DeepSeek) or that of the
        input (transformers' Mixtral, OLMoE, Qwen, gpt-oss). Scores are float32 either way.
    `gate_bias`: a learned bias in the logits (gpt-oss); not the balancing bias, which moves the choice only.
    `force_load_balance`: ignore the scores when choosing; assignment i goes to expert i mod E
        (`round_robin`), or experts come from random logits (`random`). Gates stay the real scores.
    `choose_by`: a token takes its best experts (`top_k`); in training its best after Sinkhorn's normalisation evened
        the batch, and plain top-k in eval (`sinkhorn`, Megatron-Core); or experts take tokens (`expert_choice`), which
        no causal model can do: for recorded logits only. Neither heeds the balancing bias.
    `jitter`: in training, the router's input is multiplied by uniform noise from 1 - jitter to 1 + jitter (Switch
        Transformer, arXiv:2101.03961); the experts' input is not.
    """

    score_func: ScoreFunc = "softmax"
    route_norm: bool = False
    route_scale: float = 1.0
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    group_score: GroupScore = "top2"
    gate_dtype: GateDtype = "float32"
    gate_bias: bool = False
    force_load_balance: ForcedBalance | None = None
    choose_by: ExpertsBy = "top_k"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_choice("score_func", self.score_func, get_args(ScoreFunc))
        check_choice("group_score", self.group_score, get_args(GroupScore))
        check_choice("gate_dtype", self.gate_dtype, get_args(GateDtype))
        check_choice("force_load_balance", self.force_load_balance, (None, *get_args(ForcedBalance)))
        check_bool("route_norm", self.route_norm)
        check_bool("gate_bias", self.gate_bias)
        if not _is_finite(self.route_scale):
            raise ValueError(f"route_scale={self.route_scale!r} must be a finite number")
        if not (_is_finite(self.jitter) and 0 <= self.jitter < 1):
            raise ValueError(f"jitter={self.jitter!r} must be a number from 0 to below 1")
        check_choice("choose_by", self.choose_by, get_args(ExpertsBy))
        if self.choose_by != "top_k" and (self.num_expert_groups is not None or self.force_load_balance is not None):
            raise ValueError(
                f"choose_by={self.choose_by!r} knows neither num_expert_groups={self.num_expert_groups} nor "
                f"force_load_balance={self.force_load_balance!r}: leave both at None, or choose_by='top_k'"
            )
        if (self.num_expert_groups is None) != (self.num_limited_groups is None):
            raise ValueError(
                f"num_expert_groups={self.num_expert_groups} and num_limited_groups={self.num_limited_groups} "
                "must be given together, or neither"
            )
        if self.num_expert_groups is not None:
            check_int("num_expert_groups", self.num_expert_groups, 1)
            check_int("num_limited_groups", self.num_limited_groups, 1, self.num_expert_groups)

    def check_causal(self) -> None:
        """Raise `ValueError` where a token's experts would depend on tokens after it, in eval too."""
        if self.choose_by == "expert_choice":
            raise ValueError(
                "choose_by='expert_choice' is for recorded logits only: an expert that picks its tokens looks at all "
                "of them, later ones too, so that a causal model would train on what it is to predict and could not "
                "generate; choose 'top_k' or 'sinkhorn'"
            )

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise `ValueError` unless these settings can choose `top_k` of `num_experts` experts."""
        check_int("num_experts", num_experts, 1)
        check_int("top_k", top_k, 1, num_experts)
        if self.num_expert_groups is None or self.num_limited_groups is None:
            return
        groups, limited = self.num_expert_groups, self.num_limited_groups
        if num_experts % groups:
            divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
            raise ValueError(
                f"num_expert_groups={groups} does not divide num_experts={num_experts}: "
                f"choose one of {', '.join(map(str, divisors))}"
            )
        per_group = num_experts // groups
        if top_k > limited * per_group:
            raise ValueError(
                f"top_k={top_k} cannot be chosen from num_limited_groups={limited} groups of {per_group} "
                f"experts: at most {limited * per_group}"
            )
        if self.group_score == "top2" and per_group < 2:
            raise ValueError(
                f"group_score='top2' needs two experts a group, but {num_experts} experts in {groups} groups "
                f"leave {per_group}: use fewer groups, or group_score='max'"
            )
        if self.group_score == "topk_share" and top_k // limited < 1:
            raise ValueError(
                f"group_score='topk_share' sums the best top_k // num_limited_groups = {top_k} // {limited} = 0 "
                f"experts: choose num_limited_groups <= {top_k}"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One Mixture-of-Experts layer.

    `dim` D and `hidden_dim` F are the widths of the model and of one expert (SwiGLU); `num_experts` E routed
    experts of which each token uses `top_k` K; `num_shared_experts` n experts that every token uses, held as
    one SwiGLU of width n*F.
    `score_before_experts`: multiply rows by their gate before the experts instead of at the combine.
    `activation` of the routed experts: silu(gate) * up, or gpt-oss's clamped form; `mlp_bias` gives them biases.
    `shared_expert_gate`: multiply the shared experts' output by sigmoid(x w) (Qwen2-MoE, Qwen3-Next).
    `backend`: how expert products are computed; `combine`: how expert outputs return to their tokens.
    `batch_invariant`: a token's output has the same bits alone and in any batch, on one machine with one number of
        threads. Router and shared experts compute in blocks of a fixed number of rows, as the backend must:
        `blocked`, or `fused` on CUDA.
    `capacity_factor`: an expert takes at most ceil(T * K / E * capacity_factor) assignments of a forward, the rest
        is dropped; None drops nothing. `drop_policy`: keep those of the highest gate (`probs`) or the earliest
        (`position`). `drop_order`: which are early, those of the first tokens, or all first choices before any second.
    `load_balance_coeff`: step of the auxiliary-loss-free balancing bias; None leaves the bias at zero. `bias_centred`:
        take the mean off each step (torchtitan) or not (Megatron-Core).

    Where experts are spread over ranks (on one rank these change nothing):
    `reorder`: how received rows go from rank-major to expert-major; all ways give the same bits.
    `equal_split`: pad every segment of an exchange to the mesh-wide largest: never (`off`), always (`force`), or
        when no rank's padding exceeds `equal_split_threshold` of its rows (`adaptive`).
    `pad_multiple`: rows of each local expert are padded with zeros to a multiple of this.
    """

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    num_shared_experts: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    score_before_experts: bool = False
    activation: Activation = "swiglu"
    mlp_bias: bool = False
    shared_expert_gate: bool = False
    backend: Backend = "loop"
    combine: CombineArm = "gather"
    batch_invariant: bool = False
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probs"
    drop_order: DropOrder = "token_major"
    load_balance_coeff: float | None = None
    bias_centred: bool = True
    reorder: Reorder = "auto"
    equal_split: EqualSplit = "off"
    equal_split_threshold: float = 0.10
    pad_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim"):
            check_int(name, getattr(self, name), 1)
        check_int("num_shared_experts", self.num_shared_experts, 0)
        check_choice("backend", self.backend, get_args(Backend))
        check_choice("combine", self.combine, get_args(CombineArm))
        check_choice("activation", self.activation, get_args(Activation))
        for name in ("score_before_experts", "mlp_bias", "shared_expert_gate", "batch_invariant", "bias_centred"):
            check_bool(name, getattr(self, name))
        if self.shared_expert_gate and not self.num_shared_experts:
            raise ValueError("shared_expert_gate=True gates nothing: num_shared_experts=0 must be at least 1")
        if self.backend in ("fused", "buffered") and (self.mlp_bias or self.activation != "swiglu"):
            raise ValueError(
                f"backend={self.backend!r} computes plain SwiGLU only, not activation={self.activation!r}, "
                f"mlp_bias={self.mlp_bias}: choose backend='grouped', 'padded' or 'loop'"
            )
        check_choice("drop_policy", self.drop_policy, get_args(DropPolicy))
        check_choice("drop_order", self.drop_order, get_args(DropOrder))
        factor = self.capacity_factor
        if factor is not None and not (_is_finite(factor) and factor > 0):
            raise ValueError(f"capacity_factor={factor!r} must be a positive number, or None for no drops")
        if factor is not None and self.backend == "fused":
            raise ValueError("backend='fused' drops nothing: with a capacity_factor choose another backend")
        self._check_batch_invariant()
        check_choice("reorder", self.reorder, get_args(Reorder))
        check_choice("equal_split", self.equal_split, get_args(EqualSplit))
        check_int("pad_multiple", self.pad_multiple, 1)
        if not isinstance(self.router, RouterConfig):
            raise ValueError(f"router={self.router!r} must be a RouterConfig")
        self.router.check(self.num_experts, self.top_k)
        self.router.check_causal()
        coeff = self.load_balance_coeff
        if coeff is not None and not (_is_finite(coeff) and coeff > 0):
            raise ValueError(f"load_balance_coeff={coeff!r} must be a positive number, or None for no balancing")
        if coeff is not None and self.router.choose_by != "top_k":
            raise ValueError(
                f"load_balance_coeff={coeff} moves nothing with choose_by={self.router.choose_by!r}: choose one of them"
            )
        check_threshold("equal_split_threshold", self.equal_split_threshold)

    def _check_batch_invariant(self) -> None:
        if not self.batch_invariant:
            return
        if self.backend not in ("blocked", "fused"):
            raise ValueError(
                f"batch_invariant=True with backend={self.backend!r}: choose 'blocked', or 'fused' on CUDA, whose "
                "sums do not depend on how many rows an expert has"
            )
        if self.capacity_factor is not None:
            raise ValueError(
                f"batch_invariant=True with capacity_factor={self.capacity_factor}: drops depend on the batch"
            )
        if self.router.force_load_balance is not None:
            raise ValueError(
                f"batch_invariant=True with force_load_balance={self.router.force_load_balance!r}: a token's experts "
                "then depend on its place in the batch"
            )
        if self.router.choose_by != "top_k" or self.router.jitter:
            raise ValueError(
                f"batch_invariant=True with choose_by={self.router.choose_by!r}, jitter={self.router.jitter}: both "
                "make a token's experts in training depend on its batch"
            )

    def replace(self, **changes: Any) -> MoEConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoEConfig:
        """The layer of a published model, by name (see `PRESETS`), with `changes` applied."""
        check_choice("preset", name, PRESETS)
        return dataclasses.replace(PRESETS[name], **changes)


def _preset(dim: int, hidden_dim: int, num_experts: int, top_k: int, shared: int = 0, **kwargs: Any) -> MoEConfig:
    router = {key: value for key, value in kwargs.items() if key in RouterConfig.__dataclass_fields__}
    layer = {key: value for key, value in kwargs.items() if key not in router}
    return MoEConfig(
        dim=dim,
        hidden_dim=hidden_dim,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=shared,
        router=RouterConfig(**router),
        **layer,
    )


# Widths and counts from each model's published config.json; 10B_2B is a torchtitan fork's benchmark layer.
PRESETS: dict[str, MoEConfig] = {
    "10B_2B": _preset(2048, 1408, 36, 3, shared=2),
    "mixtral_8x7b": _preset(4096, 14336, 8, 2, route_norm=True, gate_dtype="input"),
    "olmoe_1b_7b": _preset(2048, 1024, 64, 8, gate_dtype="input"),
    "qwen3_30b_a3b": _preset(2048, 768, 128, 8, route_norm=True, gate_dtype="input"),
    "deepseek_v3": _preset(
        7168,
        2048,
        256,
        8,
        shared=1,
        score_func="sigmoid",
        route_norm=True,
        route_scale=2.5,
        num_expert_groups=8,
        num_limited_groups=4,
        load_balance_coeff=1e-3,
    ),
    "gpt_oss_20b": _preset(
        2880,
        2880,
        32,
        4,
        route_norm=True,
        gate_bias=True,
        gate_dtype="input",
        activation="clamped_swiglu",
        mlp_bias=True,
    ),
    "qwen3_next_80b_a3b": _preset(
        2048, 512, 512, 10, shared=1, route_norm=True, gate_dtype="input", shared_expert_gate=True
    ),
    "llama4_scout": _preset(
        5120, 8192, 16, 1, shared=1, score_func="sigmoid", gate_dtype="input", score_before_experts=True
    ),
}
