"""Other libraries beside ours on the same weights: equal within budget, or refused with the numbers."""

import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.jobs.bench_inputs import make_inputs
from moe_lab.jobs.contests import hold
from moe_lab.jobs.peers import PEERS

CPU = torch.device("cpu")
CONFIG = MoEConfig(dim=64, hidden_dim=32, num_experts=6, top_k=2)
TRANSFORMERS = [name for name in PEERS if name.startswith("transformers")]


def contest(dtype, names):
    return hold("layer", make_inputs(CONFIG, 40, CPU, dtype), ["loop"], names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_the_same_in_all_three_ways(dtype):
    pytest.importorskip("transformers")
    assert len(TRANSFORMERS) == 3
    held = contest(dtype, TRANSFORMERS)
    assert held.missing == {}
    assert all(0 < held.errors[name] <= 2 * held.errors["loop"] for name in TRANSFORMERS)


def test_each_way_of_transformers_runs_its_own_code(monkeypatch):
    pytest.importorskip("transformers")
    from transformers.integrations import moe

    ran = []
    for name in ("grouped_mm", "batched_mm"):
        way = moe.ALL_EXPERTS_FUNCTIONS[name]
        monkeypatch.setitem(
            moe.ALL_EXPERTS_FUNCTIONS._global_mapping, name, lambda *a, n=name, f=way, **k: ran.append(n) or f(*a, **k)
        )
    for name, expected in zip(("eager", "grouped_mm", "batched_mm"), ([], ["grouped_mm"], ["batched_mm"])):
        contest(torch.float32, [f"transformers_{name}"])
        assert ran == expected
        ran.clear()


def test_torchtitan_computes_the_same_in_bfloat16():
    pytest.importorskip("torchtitan")
    held = contest(torch.bfloat16, ["torchtitan", "torchtitan_ops"])
    assert held.missing == {}
    leaves = [leaf.clone().requires_grad_() for leaf in held.leaves]
    arm = held.arms["torchtitan"]
    arm.run(*leaves).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in (*leaves, *arm.weights))


def test_torchtitan_is_refused_in_float32_since_its_experts_round_to_bfloat16():
    pytest.importorskip("torchtitan")
    held = contest(torch.float32, ["torchtitan"])
    assert list(held.arms) == ["loop"]
    assert held.missing["torchtitan"].startswith("not equal: error ")
