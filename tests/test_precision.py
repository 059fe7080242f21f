import pytest
import torch

from moe_lab import MoE, MoEConfig, RouterConfig
from moe_lab.layer.router import TokenChoiceTopKRouter
from moe_lab.models.lm import MoELM
from moe_lab.study.precision import gate_dtype_flips
from tests.test_lm import TINY


def test_only_near_ties_flip_by_hand():
    router = TokenChoiceTopKRouter(1, 2, 1, RouterConfig())
    # In bfloat16 1 + 2**-9 is 1: the two logits tie, and the lower index wins. Twice the gap survives at 2**-7.
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[1.0], [1.0 + 2**-9]]))
    x_TD = torch.tensor([[1.0], [2.0], [-1.0], [-4.0]])
    # Positive tokens prefer expert 1 in float32 and tie in bfloat16; negative ones prefer expert 0 in both.
    assert gate_dtype_flips(router, x_TD).tolist() == [0.5]
    with torch.no_grad():
        router.gate.weight[1] = 1.0 + 2**-7
    assert gate_dtype_flips(router, x_TD).tolist() == [0.0]
    assert gate_dtype_flips(router, x_TD, torch.float32).tolist() == [0.0]


def test_every_layer_of_a_model_is_compared_and_left_as_it_was():
    model = MoELM(TINY).eval()
    tokens = torch.arange(64).view(2, 32)
    before = model(tokens)
    share_L = gate_dtype_flips(model, tokens)
    assert share_L.shape == (TINY.num_layers,)
    assert ((share_L >= 0) & (share_L < 0.5)).all()
    assert torch.equal(model(tokens), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="Linear has no TokenChoiceTopKRouter"):
        gate_dtype_flips(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    config = MoEConfig(dim=4, hidden_dim=4, num_experts=2, top_k=1, router=RouterConfig(force_load_balance="random"))
    with pytest.raises(ValueError, match="force_load_balance is on"):
        gate_dtype_flips(MoE(config), torch.zeros(1, 4))
