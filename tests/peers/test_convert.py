"""Blocks of transformers as our layer: the same output, the same bits after a round trip."""

import copy

import pytest
import torch

from moe_lab.models.convert import from_transformers, to_transformers
from peers.tiny_models import FIVE, MODELS, D, E, K, moe_blocks, tiny_model
from reference import loop_over_tokens, relative_error

T = 40


def block_of(name):
    return moe_blocks(tiny_model(name))[0]


def run(layer, x_BLD):
    out = layer(x_BLD)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_within_the_budget(name, backend):
    block = block_of(name)
    moe = from_transformers(block, backend=backend)
    x_BLD = torch.randn(2, T // 2, D)
    with torch.no_grad():
        theirs, ours = run(block, x_BLD), moe(x_BLD)
        ids_TK = moe.router(x_BLD.view(T, D), moe.expert_bias_E).expert_ids_TK
    exact = loop_over_tokens(moe, x_BLD, ids_TK, x_BLD, torch.float64)["out"]
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_gives_the_same_bits(name, dtype):
    block = block_of(name).to(dtype)
    moe = from_transformers(block)
    assert all(p.dtype == dtype for p in moe.parameters())
    emptied = copy.deepcopy(block)
    for tensor in emptied.state_dict().values():
        tensor.zero_()
    back = to_transformers(moe, emptied)
    expected = block.state_dict()
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    again = from_transformers(back)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, moe.state_dict()[key]), key


@pytest.mark.parametrize("name", FIVE)
def test_configurations_say_what_the_model_is(name):
    moe = from_transformers(block_of(name))
    config = moe.config
    assert (config.dim, config.hidden_dim, config.num_experts, config.top_k) == (D, 16, E, K)
    assert config.num_shared_experts == (2 if name == "deepseek_v3" else 0)
    assert config.mlp_bias == (name == "gpt_oss")
    assert config.activation == ("clamped_swiglu" if name == "gpt_oss" else "swiglu")
    assert config.router.gate_dtype == ("float32" if name == "deepseek_v3" else "input")
    assert bool(moe.expert_bias_E.any()) == (name == "deepseek_v3")


def test_a_converted_layer_trains_like_the_block():
    block = block_of("qwen2_moe").train()
    moe = from_transformers(block)
    x_BLD = torch.randn(2, 20, D)
    gradients = [
        torch.autograd.grad(run(layer, x).square().sum(), x)[0]
        for layer in (block, moe)
        for x in (x_BLD.clone().requires_grad_(),)
    ]
    assert relative_error(gradients[1], gradients[0]) <= 8 * torch.finfo(torch.float32).eps


def test_what_is_no_block_is_refused():
    with pytest.raises(ValueError, match="Linear has no router and experts"):
        from_transformers(torch.nn.Linear(2, 2))
    block = block_of("mixtral")
    block.experts.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="experts activate by ReLU"):
        from_transformers(block)


def test_a_block_that_computes_something_else_is_refused():
    block = block_of("mixtral")
    plain = block.experts.forward
    block.experts.forward = lambda *args: 2 * plain(*args)
    with pytest.raises(ValueError, match=r"MixtralSparseMoeBlock computes something else .* differ by 50.0%"):
        from_transformers(block)
    block = block_of("mixtral")
    kind = type(block.gate)

    class CubedGates(kind):
        def forward(self, x):
            logits_TE, gates_TK, ids_TK = super().forward(x)
            return logits_TE, gates_TK**3, ids_TK

    block.gate.__class__ = CubedGates
    with pytest.raises(ValueError, match="CubedGates routes like no RouterConfig"):
        from_transformers(block)


def test_weights_of_another_size_do_not_fit():
    moe = from_transformers(block_of("mixtral"))
    with pytest.raises(ValueError, match="does not fit the block's"):
        to_transformers(moe, moe_blocks(tiny_model("mixtral", intermediate_size=24))[0])
    with pytest.raises(ValueError, match=r"Qwen2MoeSparseMoeBlock and the layer differ in \['shared_experts"):
        to_transformers(moe, block_of("qwen2_moe"))
