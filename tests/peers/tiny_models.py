"""Tiny models of transformers with weights drawn at random: two blocks, no download."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install moe-lab[peers]")

D, F, E, K, VOCAB = 32, 16, 8, 2, 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": E, "moe_intermediate_size": F}
LOCAL = {"num_local_experts": E, "intermediate_size": F}
MODELS = {
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", LOCAL),
    "olmoe": ("Olmoe", {"num_experts": E, "intermediate_size": F, "norm_topk_prob": False}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": E,
            "moe_intermediate_size": F,
            "intermediate_size": 2 * F,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOss", {**LOCAL, "layer_types": ["full_attention"] * 2}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 3 * F, "norm_topk_prob": False}),
}
FIVE = [name for name in MODELS if name != "qwen2_moe"]


def tiny_model(name: str, **changes) -> torch.nn.Module:
    """A causal language model of transformers, in eval mode, gates and biases drawn wide enough to matter."""
    prefix, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **fields, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "e_score_correction_bias" in key:
                tensor.normal_(std=0.1)
            elif ".experts." in key or key.endswith(("router.bias", "gate.weight", "router.weight")):
                tensor.normal_(std=0.3)
    return model


def moe_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The Mixture-of-Experts of every layer, in order."""
    return [layer.mlp for layer in model.model.layers]
