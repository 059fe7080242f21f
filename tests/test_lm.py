import dataclasses

import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.models.lm import SMALL, LMConfig, MoELM, rotary_table, rotate

TINY = LMConfig(
    num_layers=2,
    num_heads=2,
    max_length=32,
    moe=MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2, num_shared_experts=1, load_balance_coeff=1e-3),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoELM(TINY).eval()


def test_shipped_model_has_the_stated_size():
    with torch.device("meta"):
        model = MoELM(SMALL)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - routed + routed * SMALL.moe.top_k // SMALL.moe.num_experts
    assert (total, active) == (11_488_512, 3_230_976)


def test_no_byte_sees_a_later_one(model):
    text_BL = torch.randint(256, (1, 24))
    changed_BL = text_BL.clone()
    changed_BL[0, 15:] = (changed_BL[0, 15:] + 1) % 256
    with torch.inference_mode():
        before, after = model(text_BL), model(changed_BL)
    # Other rows in an expert's matrix product may change its rounding, not more.
    torch.testing.assert_close(before[0, :15], after[0, :15], rtol=0, atol=1e-6)
    assert (before[0, 15:] - after[0, 15:]).abs().amax(dim=-1).min() > 1e-3


def test_rotary_products_depend_on_distance_only():
    rotary = rotary_table(64, 8, torch.device("cpu")).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    q_L, k_L = (rotate(v.expand(64, 8), rotary) for v in (q, k))
    dot_LL = q_L @ k_L.mT
    for distance in (0, 3, 17):
        along = dot_LL.diagonal(offset=distance)
        # The table is float32: its angles carry that rounding.
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-5)


def test_longer_than_max_length_is_refused(model):
    with pytest.raises(ValueError, match="33 bytes: at most max_length=32"):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_saved_and_loaded_is_the_rounded_model(model, tmp_path):
    for moe in model.moe_layers:
        moe.expert_bias_E.normal_()
    model.save(tmp_path)
    loaded = MoELM.load(tmp_path)
    assert loaded.config == dataclasses.replace(TINY, moe=TINY.moe.replace(backend="loop"))
    for (name, mine), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        expected = mine if name.endswith("expert_bias_E") else mine.bfloat16().float()
        assert torch.equal(theirs, expected), name


def test_large_models_are_saved_in_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_lab.models.lm.SHARD_BYTES", 4096)
    paths = model.save(tmp_path, dtype=torch.float32)
    assert len(paths) > 2
    assert torch.equal(MoELM.load(tmp_path).head.weight, model.head.weight)
    paths[1].unlink()
    with pytest.raises(ValueError, match="lacks or has unknown tensors"):
        MoELM.load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold the shards of one saved MoELM, found \\[\\]"):
        MoELM.load(tmp_path)


def test_config_survives_plain_values():
    assert LMConfig.from_dict(TINY.to_dict()) == TINY


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"num_heads=3 must divide moe\.dim=16"):
        dataclasses.replace(TINY, num_heads=3)
