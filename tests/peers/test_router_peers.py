"""Side by side with transformers' own code: the same weights and tokens, theirs and ours."""

from importlib import import_module

import pytest
import torch

from moe_lab import MoE, MoEConfig, RouterConfig, TokenChoiceTopKRouter
from reference import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install moe-lab[peers]")

D, F, E, K, T = 32, 24, 16, 4, 200
SMALL = {"hidden_size": D, "num_experts_per_tok": K, "num_hidden_layers": 1, "num_attention_heads": 2}
V3_GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}


def theirs(model, config_name, class_name, **fields):
    """A module of transformers in a tiny size, its weights drawn at random."""
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    config = getattr(transformers, config_name)(**SMALL | fields)
    torch.manual_seed(0)
    peer = getattr(module, class_name)(config)
    for tensor in (*peer.parameters(), *peer.buffers()):
        torch.nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
    return peer


def mixtral(class_name):
    return theirs("mixtral", "MixtralConfig", class_name, num_local_experts=E, intermediate_size=F)


def olmoe(class_name, norm=False):
    return theirs("olmoe", "OlmoeConfig", class_name, num_experts=E, intermediate_size=F, norm_topk_prob=norm)


def qwen3(class_name):
    fields = {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": True}
    return theirs("qwen3_moe", "Qwen3MoeConfig", class_name, **fields)


def deepseek_v3(class_name):
    fields = {"n_routed_experts": E, "num_local_experts": E, "moe_intermediate_size": F, "n_shared_experts": 2}
    return theirs("deepseek_v3", "DeepseekV3Config", class_name, n_group=4, topk_group=2, **fields)


def gpt_oss(class_name):
    return theirs("gpt_oss", "GptOssConfig", class_name, num_local_experts=E, intermediate_size=F)


def llama4(class_name, top_k=1):
    fields = {"num_local_experts": E, "intermediate_size": F, "num_experts_per_tok": top_k}
    return theirs("llama4", "Llama4TextConfig", class_name, **fields)


ROUTERS = {
    "mixtral": (lambda: mixtral("MixtralTopKRouter"), K, RouterConfig(route_norm=True, gate_dtype="input")),
    "olmoe": (lambda: olmoe("OlmoeTopKRouter"), K, RouterConfig(gate_dtype="input")),
    "olmoe_norm": (lambda: olmoe("OlmoeTopKRouter", True), K, RouterConfig(route_norm=True, gate_dtype="input")),
    "qwen3_moe": (lambda: qwen3("Qwen3MoeTopKRouter"), K, RouterConfig(route_norm=True, gate_dtype="input")),
    "deepseek_v3": (
        lambda: deepseek_v3("DeepseekV3TopkRouter"),
        K,
        RouterConfig(score_func="sigmoid", route_norm=True, route_scale=2.5, **V3_GROUPS),
    ),
    "gpt_oss": (
        lambda: gpt_oss("GptOssTopKRouter"),
        K,
        RouterConfig(route_norm=True, gate_bias=True, gate_dtype="input"),
    ),
    "llama4": (lambda: llama4("Llama4Router"), 1, RouterConfig(score_func="sigmoid", gate_dtype="input")),
    "llama4_top2": (lambda: llama4("Llama4Router", 2), 2, RouterConfig(score_func="sigmoid", gate_dtype="input")),
}


def test_jitter_is_that_of_switch_transformers():
    fields = {"num_experts": E, "router_jitter_noise": 0.3}
    peer = theirs("switch_transformers", "SwitchTransformersConfig", "SwitchTransformersTop1Router", **fields).train()
    ours = TokenChoiceTopKRouter(peer.classifier.in_features, E, 1, RouterConfig(jitter=0.3))
    ours.gate.load_state_dict(peer.classifier.state_dict())
    x_BLD = torch.randn(1, T, peer.classifier.in_features)
    torch.manual_seed(1)
    _, _, logits_BLE = peer(x_BLD.clone())  # theirs writes its noise into what it is given
    torch.manual_seed(1)
    noisy_TE = ours(x_BLD[0]).logits_TE
    assert torch.equal(noisy_TE, logits_BLE[0])
    assert not torch.equal(noisy_TE, ours.eval()(x_BLD[0]).logits_TE)


def dense_gates(num_experts, ids_TK, gates_TK):
    """Gates by expert, (T, E), 0 where not chosen: the order of a token's slots is no part of the answer."""
    return gates_TK.new_zeros(len(gates_TK), num_experts).scatter_add(1, ids_TK, gates_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_choose_and_weigh_alike(name, dtype):
    build, top_k, config = ROUTERS[name]
    peer = build().to(dtype)
    ours = TokenChoiceTopKRouter(D, E, top_k, config).to(dtype)
    state = peer.state_dict()
    correction_E = state.pop("e_score_correction_bias", None)  # our layer keeps it, in float32
    ours.gate.load_state_dict(state)
    x_TD = torch.randn(T, D).to(dtype)

    routing = ours(x_TD, correction_E)
    got_TE = dense_gates(E, routing.expert_ids_TK, routing.gates_TK)
    if name.startswith("llama4"):
        expected_TE, logits_TE = peer(x_TD)
    else:
        logits_TE, gates_TK, ids_TK = peer(x_TD)
        expected_TE = dense_gates(E, ids_TK, gates_TK)
    assert torch.equal(routing.logits_TE, logits_TE)

    # Where two experts tie, topk may take either; there is nothing to agree on.
    choice_TE = routing.scores_TE if correction_E is None else routing.scores_TE + correction_E
    choice_TE = logits_TE.float() if name.startswith("llama4") else choice_TE
    untied_T = choice_TE.sort(dim=1).values.diff(dim=1).ne(0).all(dim=1)
    assert untied_T.float().mean() > (0.5 if dtype == torch.bfloat16 else 0.99)
    got_TE, expected_TE = got_TE[untied_T], expected_TE[untied_T]
    assert torch.equal(got_TE > 0, expected_TE > 0)
    # They give gates in the dtype of their router. Half an ulp of it, and the rounding of a sum of K in float32.
    eps = torch.finfo(expected_TE.dtype).eps
    torch.testing.assert_close(got_TE, expected_TE.float(), rtol=eps / 2 + 4 * torch.finfo(torch.float32).eps, atol=0)


LAYER = MoEConfig(dim=D, hidden_dim=F, num_experts=E, top_k=K)
LAYERS = {
    "mixtral": (lambda: mixtral("MixtralSparseMoeBlock"), LAYER.replace(router=ROUTERS["mixtral"][2])),
    "olmoe": (lambda: olmoe("OlmoeSparseMoeBlock"), LAYER.replace(router=ROUTERS["olmoe"][2])),
    "qwen3_moe": (lambda: qwen3("Qwen3MoeSparseMoeBlock"), LAYER.replace(router=ROUTERS["qwen3_moe"][2])),
    "deepseek_v3": (
        lambda: deepseek_v3("DeepseekV3MoE"),
        LAYER.replace(router=ROUTERS["deepseek_v3"][2], num_shared_experts=2),
    ),
    "llama4": (
        lambda: llama4("Llama4TextMoe"),
        LAYER.replace(top_k=1, router=ROUTERS["llama4"][2], num_shared_experts=1, score_before_experts=True),
    ),
}


def adopt(moe, peer, name):
    """Give `moe` the weights of a peer's layer, which are (E, 2F, D) and (E, D, F), or transposed (Llama 4)."""
    gate_up, down = peer.experts.gate_up_proj.detach(), peer.experts.down_proj.detach()
    if name == "llama4":
        gate_up, down = gate_up.mT, down.mT
    state = {"experts.w2_EDF": down, "experts.w1_EFD": gate_up[:, :F], "experts.w3_EFD": gate_up[:, F:]}
    state["router.gate.weight"] = (peer.router if name == "llama4" else peer.gate).weight
    shared = getattr(peer, "shared_experts", getattr(peer, "shared_expert", None))
    if shared is not None:
        names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        state |= {f"shared_experts.{ours}.weight": getattr(shared, their).weight for ours, their in names.items()}
    state["expert_bias_E"] = getattr(getattr(peer, "gate", None), "e_score_correction_bias", torch.zeros(E))
    moe.load_state_dict(state)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_same_output_and_input_gradient(name, backend):
    build, config = LAYERS[name]
    peer, moe = build(), MoE(config.replace(backend=backend))
    adopt(moe, peer, name)
    x_BLD = torch.randn(2, T // 2, D)
    results = []
    for layer in (peer, moe):
        x = x_BLD.clone().requires_grad_()
        out = layer(x)
        out = (out[0] if isinstance(out, tuple) else out).view(x.shape)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for theirs_, ours in zip(*results):
        # Both are float32: each is within a few roundings of the truth, and so of the other.
        assert relative_error(ours, theirs_) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("preset", "config_name"),
    [
        ("mixtral_8x7b", "MixtralConfig"),
        ("olmoe_1b_7b", "OlmoeConfig"),
        ("qwen3_30b_a3b", "Qwen3MoeConfig"),
        ("deepseek_v3", "DeepseekV3Config"),
        ("llama4_scout", "Llama4TextConfig"),
    ],
)
def test_presets_have_the_sizes_of_their_models(preset, config_name):
    ours, peer = MoEConfig.preset(preset), getattr(transformers, config_name)()
    num_experts = next(v for n in ("num_local_experts", "num_experts") if (v := getattr(peer, n, None)))
    assert (ours.dim, ours.num_experts, ours.top_k) == (peer.hidden_size, num_experts, peer.num_experts_per_tok)
    assert ours.num_shared_experts == getattr(peer, "n_shared_experts", int(preset == "llama4_scout"))
    if preset != "olmoe_1b_7b":  # the default of OlmoeConfig is not that of OLMoE-1B-7B
        assert ours.hidden_dim == getattr(peer, "moe_intermediate_size", peer.intermediate_size)
    if preset == "deepseek_v3":
        router = ours.router
        assert (router.num_expert_groups, router.num_limited_groups) == (peer.n_group, peer.topk_group)
        assert (router.route_norm, router.route_scale) == (peer.norm_topk_prob, peer.routed_scaling_factor)
