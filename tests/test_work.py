import torch

from moe_lab import MoE, MoEConfig
from moe_lab.config import RouterConfig
from moe_lab.study.work import work_of


def test_operations_by_hand():
    router = RouterConfig(force_load_balance="round_robin")
    moe = MoE(MoEConfig(dim=4, hidden_dim=3, num_experts=3, top_k=2, num_shared_experts=2, router=router))
    work = work_of(moe, torch.randn(5, 4))
    assert (work.rows, work.largest) == (10, 4), "ten assignments round three experts: 4, 3, 3"
    assert work.router_flops == 2 * 5 * 4 * 3
    assert work.expert_flops == 10 * 3 * (2 * 4 * 3)
    assert work.padded_flops == 12 * 3 * (2 * 4 * 3)
    assert work.shared_flops == 5 * 3 * (2 * 4 * 6)
    lines = repr(work).splitlines()
    assert lines[0] == "10 rows"
    assert lines[2] == "experts             0.0 MFLOP, 1.2 times as much if all are padded to the largest"
