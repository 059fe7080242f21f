import dataclasses
import math

import pytest

from moe_lab import MoEConfig, RouterConfig
from moe_lab.config import PRESETS

SIZES = {"dim": 16, "hidden_dim": 24, "num_experts": 12, "top_k": 4}


def router(**fields):
    return {"router": RouterConfig(**fields)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_func": "relu"}, "score_func='relu' is not known: choose one of 'softmax', 'sigmoid', 'sqrt_softplus'"),
        ({"score_func": None}, "score_func=None is not known"),
        ({"group_score": "top3"}, "group_score='top3' is not known: choose one of 'top2', 'max', 'topk_share'"),
        ({"gate_dtype": "bfloat16"}, "gate_dtype='bfloat16' is not known: choose one of 'float32', 'input'"),
        (
            {"force_load_balance": "on"},
            "force_load_balance='on' is not known: choose one of None, 'round_robin', 'random'",
        ),
        ({"route_norm": "false"}, "route_norm='false' must be True or False"),
        ({"route_norm": 1}, "route_norm=1 must be True or False"),
        ({"gate_bias": None}, "gate_bias=None must be True or False"),
        ({"route_scale": math.nan}, "route_scale=nan must be a finite number"),
        ({"route_scale": math.inf}, "route_scale=inf must be a finite number"),
        ({"route_scale": "2.5"}, "route_scale='2.5' must be a finite number"),
        ({"route_scale": True}, "route_scale=True must be a finite number"),
        ({"num_expert_groups": 4}, "num_expert_groups=4 and num_limited_groups=None must be given together"),
        ({"num_limited_groups": 2}, "num_expert_groups=None and num_limited_groups=2 must be given together"),
        (
            {"num_expert_groups": 0, "num_limited_groups": 1},
            "num_expert_groups=0 must be an integer >= 1",
        ),
        (
            {"num_expert_groups": 4, "num_limited_groups": 5},
            "num_limited_groups=5 must be an integer from 1 to 4",
        ),
        (
            {"num_expert_groups": 4, "num_limited_groups": 0},
            "num_limited_groups=0 must be an integer from 1 to 4",
        ),
        (
            {"num_expert_groups": 2.0, "num_limited_groups": 1},
            "num_expert_groups=2.0 must be an integer >= 1",
        ),
    ],
)
def test_a_router_names_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        RouterConfig(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0 must be an integer >= 1"),
        ({"dim": 16.0}, "dim=16.0 must be an integer >= 1"),
        ({"hidden_dim": -3}, "hidden_dim=-3 must be an integer >= 1"),
        ({"num_experts": 0}, "num_experts=0 must be an integer >= 1"),
        ({"num_experts": True}, "num_experts=True must be an integer >= 1"),
        ({"top_k": 0}, "top_k=0 must be an integer from 1 to 12"),
        ({"top_k": 13}, "top_k=13 must be an integer from 1 to 12"),
        ({"top_k": True}, "top_k=True must be an integer from 1 to 12"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be an integer >= 0"),
        ({"backend": "magic"}, "backend='magic' is not known: choose one of 'loop', 'padded', 'grouped'"),
        ({"combine": "sum"}, "combine='sum' is not known: choose one of 'gather', 'scatter_add'"),
        ({"score_before_experts": "no"}, "score_before_experts='no' must be True or False"),
        ({"mlp_bias": 1}, "mlp_bias=1 must be True or False"),
        ({"activation": "gelu"}, "activation='gelu' is not known: choose one of 'swiglu', 'clamped_swiglu'"),
        ({"shared_expert_gate": True}, "shared_expert_gate=True gates nothing: num_shared_experts=0"),
        (
            {"reorder": "sort"},
            "reorder='sort' is not known: choose one of 'auto', 'index', 'equal_count', 'segment_cat'",
        ),
        ({"equal_split": True}, "equal_split=True is not known: choose one of 'off', 'adaptive', 'force'"),
        ({"equal_split_threshold": math.nan}, "equal_split_threshold=nan must be a finite number >= 0"),
        ({"equal_split_threshold": -0.1}, "equal_split_threshold=-0.1 must be a finite number >= 0"),
        ({"equal_split_threshold": "0.1"}, "equal_split_threshold='0.1' must be a finite number >= 0"),
        ({"pad_multiple": 0}, "pad_multiple=0 must be an integer >= 1"),
        ({"pad_multiple": 8.0}, "pad_multiple=8.0 must be an integer >= 1"),
        ({"router": "softmax"}, "router='softmax' must be a RouterConfig"),
        ({"load_balance_coeff": 0}, "load_balance_coeff=0 must be a positive number, or None"),
        ({"load_balance_coeff": -0.1}, "load_balance_coeff=-0.1 must be a positive number"),
        ({"load_balance_coeff": math.nan}, "load_balance_coeff=nan must be a positive number"),
        ({"load_balance_coeff": math.inf}, "load_balance_coeff=inf must be a positive number"),
        ({"load_balance_coeff": True}, "load_balance_coeff=True must be a positive number"),
        (
            router(num_expert_groups=5, num_limited_groups=2),
            "num_expert_groups=5 does not divide num_experts=12: choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"top_k": 7, **router(num_expert_groups=4, num_limited_groups=2)},
            "top_k=7 cannot be chosen from num_limited_groups=2 groups of 3 experts: at most 6",
        ),
        (
            router(num_expert_groups=12, num_limited_groups=6),
            "group_score='top2' needs two experts a group, but 12 experts in 12 groups leave 1",
        ),
        (
            {"top_k": 2, **router(num_expert_groups=4, num_limited_groups=3, group_score="topk_share")},
            "group_score='topk_share' sums the best .* = 2 // 3 = 0 experts: choose num_limited_groups <= 2",
        ),
    ],
)
def test_a_layer_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match="^" + message):
        MoEConfig(**SIZES | changes)
    with pytest.raises(ValueError, match="^" + message):
        MoEConfig(**SIZES).replace(**changes)


@pytest.mark.parametrize(
    ("top_k", "fields"),
    [
        (12, {}),
        (6, {"num_expert_groups": 4, "num_limited_groups": 2}),
        (4, {"num_expert_groups": 12, "num_limited_groups": 4, "group_score": "max"}),
        (3, {"num_expert_groups": 12, "num_limited_groups": 3, "group_score": "topk_share"}),
        (12, {"num_expert_groups": 1, "num_limited_groups": 1, "group_score": "topk_share"}),
    ],
)
def test_settings_at_their_limits_are_taken(top_k, fields):
    assert MoEConfig(**SIZES | {"top_k": top_k}, router=RouterConfig(**fields)).top_k == top_k


def test_configs_are_values():
    assert MoEConfig(**SIZES) == MoEConfig(**SIZES)
    assert hash(MoEConfig(**SIZES)) == hash(MoEConfig(**SIZES))
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(**SIZES).dim = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterConfig().route_norm = True


def test_replace_leaves_the_original_alone():
    config = MoEConfig(**SIZES)
    assert config.replace(top_k=2).top_k == 2
    assert config.top_k == 4


@pytest.mark.parametrize(
    ("name", "sizes", "score_func", "route_norm", "route_scale"),
    [
        ("10B_2B", (36, 3, 2), "softmax", False, 1.0),
        ("mixtral_8x7b", (8, 2, 0), "softmax", True, 1.0),
        ("olmoe_1b_7b", (64, 8, 0), "softmax", False, 1.0),
        ("qwen3_30b_a3b", (128, 8, 0), "softmax", True, 1.0),
        ("deepseek_v3", (256, 8, 1), "sigmoid", True, 2.5),
        ("llama4_scout", (16, 1, 1), "sigmoid", False, 1.0),
        ("gpt_oss_20b", (32, 4, 0), "softmax", True, 1.0),
        ("qwen3_next_80b_a3b", (512, 10, 1), "softmax", True, 1.0),
    ],
)
def test_presets(name, sizes, score_func, route_norm, route_scale):
    config = MoEConfig.preset(name)
    assert (config.num_experts, config.top_k, config.num_shared_experts) == sizes
    assert (config.router.score_func, config.router.route_norm, config.router.route_scale) == (
        score_func,
        route_norm,
        route_scale,
    )


def test_details_of_presets():
    assert set(PRESETS) == {
        "10B_2B", "mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b", "deepseek_v3", "llama4_scout", "gpt_oss_20b",
        "qwen3_next_80b_a3b",
    }  # fmt: skip
    oss = MoEConfig.preset("gpt_oss_20b")
    assert (oss.activation, oss.mlp_bias, oss.router.gate_bias) == ("clamped_swiglu", True, True)
    assert {n for n, p in PRESETS.items() if p.shared_expert_gate} == {"qwen3_next_80b_a3b"}
    base = MoEConfig.preset("10B_2B")
    assert (base.dim, base.hidden_dim, base.score_before_experts) == (2048, 1408, False)
    v3 = MoEConfig.preset("deepseek_v3").router
    assert (v3.num_expert_groups, v3.num_limited_groups, v3.group_score) == (8, 4, "top2")
    assert MoEConfig.preset("deepseek_v3").load_balance_coeff == 0.001
    assert MoEConfig.preset("llama4_scout").score_before_experts
    assert {n for n, p in PRESETS.items() if p.router.gate_dtype == "float32"} == {"10B_2B", "deepseek_v3"}


def test_a_preset_takes_changes_and_checks_them():
    assert MoEConfig.preset("10B_2B", dim=256, backend="grouped").dim == 256
    with pytest.raises(ValueError, match=r"^preset='10B' is not known: choose one of '10B_2B', 'mixtral_8x7b'"):
        MoEConfig.preset("10B")
    with pytest.raises(ValueError, match=r"^top_k=37 must be an integer from 1 to 36"):
        MoEConfig.preset("10B_2B", top_k=37)
