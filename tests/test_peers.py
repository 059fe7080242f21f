import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.jobs import peers
from moe_lab.jobs.bench import make_inputs, reference
from reference import relative_error

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(MoEConfig(dim=32, hidden_dim=16, num_experts=4, top_k=2), 12, CPU, torch.float32)


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "fused"])
def test_every_peer_computes_the_same_layer(inputs, name):
    if name == "transformers":
        pytest.importorskip("transformers")
    arm = peers.PEERS[name](inputs)
    x, gates = inputs.x_TD.clone().requires_grad_(), inputs.gates_TK.clone().requires_grad_()
    out = arm.run(x, gates)
    assert relative_error(out, reference(inputs)) <= 1e-6
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in (x, gates, *arm.weights))


def test_what_cannot_run_says_why(inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    able, reasons = peers.arms(inputs, ("fused", "loop"))
    assert list(able) == ["loop"]
    assert reasons == {"fused": "backend='fused' needs CUDA, but x is on cpu: choose 'grouped' or 'loop'"}
