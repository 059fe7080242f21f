"""Recording models of transformers: what is kept is what their experts were given."""

import pytest
import torch

from moe_lab import RouterConfig, RoutingTrace, record
from moe_lab.models import hf
from peers.tiny_models import MODELS, VOCAB, D, E, K, moe_blocks, tiny_model

CONFIGS = {
    "qwen3_moe": RouterConfig(route_norm=True),
    "mixtral": RouterConfig(route_norm=True),
    "olmoe": RouterConfig(),
    "deepseek_v3": RouterConfig(
        score_func="sigmoid", route_norm=True, route_scale=2.5, num_expert_groups=4, num_limited_groups=2
    ),
    "gpt_oss": RouterConfig(route_norm=True, gate_bias=True),
    "qwen2_moe": RouterConfig(),
}


def executed(model):
    """Collects what the experts of every layer are called with: ids and gates."""
    seen = [[] for _ in moe_blocks(model)]
    for calls, block in zip(seen, moe_blocks(model)):
        block.experts.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[1:3]))
    return seen


def dense(ids_TK, gates_TK):
    """Gates by expert, 0 where not chosen: slots may come in any order."""
    return torch.zeros(len(ids_TK), E).scatter(1, ids_TK, gates_TK.float())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_is_what_ran(name):
    model = tiny_model(name)
    tokens = torch.randint(1, VOCAB, (2, 12))
    plain = model(tokens).logits
    seen = executed(model)
    with record(model) as recorder, torch.no_grad():
        assert torch.equal(model(tokens).logits, plain)
    trace = recorder.trace()

    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (24, 2, E, K)
    assert trace.info.layers == (0, 1)
    assert trace.info.router == CONFIGS[name]
    assert "transformers" in trace.info.versions
    for layer, ((ids_TK, gates_TK),) in enumerate(seen):
        got_ids_TK = trace.expert_ids_LTK[layer].long()
        assert torch.equal(got_ids_TK.sort(dim=1).values, ids_TK.sort(dim=1).values)
        assert torch.equal(dense(got_ids_TK, trace.gates_LTK[layer]), dense(ids_TK, gates_TK.half()))
        # Rerouting the recorded logits by the configuration that was found gives back what ran.
        again = trace.reroute(layer, trace.info.router, K)
        assert torch.equal(again.expert_ids_TK.sort(dim=1).values, ids_TK.sort(dim=1).values)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"])
def test_router_logits_make_the_trace_that_recording_makes(name):
    model = tiny_model(name)
    tokens, mask = torch.randint(1, VOCAB, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    with record(model) as recorder, torch.no_grad():
        logits = model(tokens, attention_mask=mask, output_router_logits=True).router_logits
    recorded = recorder.trace()
    made = RoutingTrace.from_router_logits(
        logits, CONFIGS[name], K, valid=mask, expert_bias_LE=recorded.expert_bias_LE, model="tiny"
    )
    assert [document.length for document in made.info.documents] == [12, 12]
    assert torch.equal(made.logits_LTE, recorded.logits_LTE)
    for layer in range(2):
        ours, theirs = (dense(t.expert_ids_LTK[layer].long(), t.gates_LTK[layer]) for t in (made, recorded))
        torch.testing.assert_close(ours, theirs, rtol=2**-10, atol=0)  # an ulp of float16


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_models_are_known_too(name):
    model = tiny_model(name).bfloat16()
    with record(model) as recorder, torch.no_grad():
        model(torch.randint(1, VOCAB, (4, 50)))
    found, expected = recorder.trace().info.router, CONFIGS[name]
    assert found.gate_dtype == ("float32" if name == "deepseek_v3" else "input")
    for field in ("score_func", "route_norm", "route_scale", "num_expert_groups", "group_score", "gate_bias"):
        assert getattr(found, field) == getattr(expected, field)


def test_generation_is_recorded_token_by_token():
    model = tiny_model("olmoe")
    seen = executed(model)
    with record(model) as recorder:
        model.generate(torch.randint(1, VOCAB, (1, 5)), max_new_tokens=4, do_sample=False, eos_token_id=None)
    trace = recorder.trace()
    assert trace.num_tokens == 5 + 3
    assert [document.length for document in trace.info.documents] == [5, 1, 1, 1]
    assert torch.equal(trace.expert_ids_LTK[1].long(), torch.cat([ids_TK for ids_TK, _ in seen[1]]))


def test_padding_is_not_valid():
    model = tiny_model("qwen3_moe")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with record(model) as recorder, torch.no_grad():
        model(torch.randint(1, VOCAB, (2, 5)), attention_mask=mask)
    trace = recorder.trace()
    assert trace.valid_T.tolist() == mask.bool().flatten().tolist()
    assert trace.counts_LE.sum(dim=1).tolist() == [8 * K] * 2


def test_a_mask_is_found_by_its_place_too():
    model, mask = tiny_model("mixtral"), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with record(model) as recorder, torch.no_grad():
        model(torch.randint(1, VOCAB, (2, 5)), mask)
    assert recorder.trace().valid_T.tolist() == mask.bool().flatten().tolist()


def test_a_mask_that_says_nothing_of_tokens_is_warned_of_or_refused():
    model, tokens = tiny_model("mixtral"), torch.randint(1, VOCAB, (2, 5))
    with record(model) as recorder, torch.no_grad():
        with pytest.warns(UserWarning, match=r"attention_mask is of shape \(2, 1, 5, 5\), not \(B, L\) of 10 tokens"):
            model(tokens, attention_mask=torch.zeros(2, 1, 5, 5))
        with pytest.raises(ValueError, match="attention_mask holds -1: must be True or 1 for tokens"):
            model(tokens, attention_mask=-torch.ones(2, 5, dtype=torch.int64))
    assert recorder.trace().valid_T.tolist() == [True] * 10


def test_checkpointed_layers_are_recorded_once():
    model = tiny_model("mixtral").train()
    model.activation_checkpointing_enable()
    tokens = torch.randint(1, VOCAB, (1, 9))
    with record(model) as recorder:
        model(tokens, labels=tokens).loss.backward()
    assert recorder.trace().num_tokens == 9


def test_a_router_like_no_other_is_recorded_with_a_warning():
    model = tiny_model("mixtral")
    for block in moe_blocks(model):
        plain = block.gate.forward

        def squared(x, plain=plain):
            logits_TE, gates_TK, ids_TK = plain(x)
            return logits_TE, gates_TK**2, (ids_TK + 1) % E

        block.gate.forward = squared
    seen = executed(model)
    with pytest.warns(UserWarning, match="MixtralTopKRouter routes like no RouterConfig"), record(model) as recorder:
        model(torch.randint(1, VOCAB, (1, 30)))
    assert torch.equal(recorder.trace().expert_ids_LTK[0].long(), seen[0][0][0])


def test_a_dense_model_has_nothing_to_record():
    model = tiny_model("mixtral").model.embed_tokens
    with pytest.raises(ValueError, match="Embedding holds nothing to record"):
        record(model)


@pytest.mark.parametrize("kind", ["Gemma4TextRouter", "DbrxRouter", "SwitchTransformersTop1Router", "OddTopKGating"])
def test_a_router_that_does_not_say_how_many_is_refused_by_name(kind):
    router = type(kind, (torch.nn.Linear,), {})(D, E)
    router.num_experts = E  # as Switch and NLLB do, without top_k
    model = torch.nn.Sequential(router)
    with pytest.raises(ValueError, match=rf"holds nothing to record.*; {kind} \('0'\) has not both"):
        record(model)


def test_a_router_that_returns_something_else_is_named():
    router = moe_blocks(tiny_model("mixtral"))[0].gate
    with pytest.raises(ValueError, match=r"MixtralTopKRouter returned \[\(3, 8\)\]: expected logits"):
        hf.decision(router, (torch.zeros(3, E),))
