"""A model under another method: the same weights, another choice; what the model was trained with is put aside."""

import pytest
import torch

from moe_lab.jobs.balance_live import AS_TRAINED, live, measure, under
from moe_lab.jobs.evaluate import as_tensor, bits
from moe_lab.models.lm import MoELM
from moe_lab.study.counterfactual import Setup, learn
from moe_lab.study.trace import record
from tests.test_lm import TINY

TEXTS = [as_tensor(b"the quick brown fox jumps over"), as_tensor(b"a lazy dog, and runs")]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MoELM(TINY).eval()
    for moe in model.moe_layers:
        moe.expert_bias_E.copy_(torch.tensor([0.3, 0.0, 0.0, -0.3]))
    return model


@pytest.fixture(scope="module")
def trace(model):
    with record(model) as recorder, torch.no_grad():
        model(torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0)))
    return recorder.trace()


def test_as_trained_is_the_model_itself(model):
    run = measure(model, TEXTS)
    expected = torch.cat([bits(model, [text])[0] for text in TEXTS]).mean()
    assert (run.method, run.bits) == (AS_TRAINED, float(expected))
    assert run.load_L.shape == (2,)


def test_weights_stay_and_the_choice_is_the_methods(model):
    none = under(model, "none")
    for ours, theirs in zip(none.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(not moe.expert_bias_E.any() for moe in none.moe_layers)
    assert model.moe_layers[0].expert_bias_E.any()  # left alone
    state_LE = torch.tensor([[0.1, 0, 0, 0], [0, 0.2, 0, 0]])
    assert [moe.expert_bias_E.tolist() for moe in under(model, "bias", state_LE).moe_layers] == state_LE.tolist()
    offset = under(model, "switch, global", state_LE)
    assert [moe.router.gate.bias.tolist() for moe in offset.moe_layers] == state_LE.tolist()
    assert not any(moe.expert_bias_E.any() for moe in offset.moe_layers)
    assert under(model, "capacity, probs", None, 0.5).moe_layers[0].config.capacity_factor == 0.5
    assert measure(under(model, "capacity, probs", None, 100.0), TEXTS).bits == measure(none, TEXTS).bits
    assert measure(under(model, "capacity, probs", None, 0.5), TEXTS).bits != measure(none, TEXTS).bits
    with pytest.raises(ValueError, match="expert_choice"):
        under(model, "expert choice")


def test_what_acts_in_training_only_acts(model):
    none = measure(under(model, "none"), TEXTS)
    assert measure(under(model, "sinkhorn"), TEXTS).bits != none.bits
    noisy = under(model, "jitter", None, 0.9)
    assert measure(noisy, TEXTS).bits == measure(noisy, TEXTS).bits != none.bits


def test_every_method_learns_first_on_the_trace(model, trace):
    setup = Setup(ep=2, tokens_per_rank=32, steps=3)
    runs = live(model, TEXTS, trace, ["none", "bias", "z-loss"], coefficients={"bias": 0.5}, setup=setup)
    assert [run.method for run in runs] == [AS_TRAINED, "none", "bias", "z-loss"]
    state_LE = learn(trace, "bias", 0.5, setup=setup).state_LE
    assert state_LE.abs().max() > 0.4
    expected = measure(under(model, "bias", state_LE), TEXTS, "bias")
    assert runs[2].bits == expected.bits
