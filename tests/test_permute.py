import pytest
import torch

from moe_lab.kernels.permute import permute_rows
from moe_lab.kernels.strided import strided_rows
from moe_lab.layer.plan import plan_local


@pytest.mark.parametrize(
    ("source", "target"),
    [([2, 0, 1], [1, 2, 0]), ([-1, 1, -1, 0], [3, 1]), ([3, 1], [-1, 1, -1, 0]), ([-1, -1], []), ([], [])],
    ids=["permuted", "padded", "stripped", "only_padding", "empty"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permute_rows(source, target, dtype):
    source_P, target_R = (torch.tensor(ids, dtype=torch.int64) for ids in (source, target))
    rows = torch.randn(len(target), 3, dtype=dtype, requires_grad=True)
    out = permute_rows(rows, source_P, target_R)
    assert torch.equal(out, torch.stack([rows[s] if s >= 0 else torch.zeros(3, dtype=dtype) for s in source])
                       if source else torch.zeros(0, 3, dtype=dtype))  # fmt: skip
    torch.library.opcheck(permute_rows, (rows, source_P, target_R))


@pytest.mark.parametrize(("num_tokens", "top_k", "ep"), [(6, 2, 3), (7, 2, 3), (2, 3, 4), (0, 1, 2), (5, 1, 1)])
def test_strided_rows_are_gathered_rows(num_tokens, top_k, ep):
    num_experts = top_k * ep
    plan = plan_local((torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k), num_experts)
    x_TD = torch.randn(num_tokens, 4, requires_grad=True)
    rows = strided_rows(x_TD, plan.order_R, plan.position_TK, ep)
    assert torch.equal(rows, x_TD[plan.token_R])
    torch.library.opcheck(strided_rows, (x_TD, plan.order_R, plan.position_TK, ep))
