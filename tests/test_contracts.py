import math

import pytest
import torch

from moe_lab import contracts


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_debug_contracts_are_asked_for(monkeypatch, value, expected):
    if value is None:
        monkeypatch.delenv("MOE_LAB_DEBUG_CONTRACTS", raising=False)
    else:
        monkeypatch.setenv("MOE_LAB_DEBUG_CONTRACTS", value)
    assert contracts.debug() is expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_first_row_that_is_not_finite_is_named(bad, dtype):
    rows = torch.ones(7, 3, 2, dtype=dtype)
    contracts.check_finite("rows", rows)
    rows[4, 2, 1] = bad
    with pytest.raises(ValueError, match=r"^rows of token 4 are not finite \(1 of 7 tokens have NaN or infinity\)"):
        contracts.check_finite("rows", rows)
    rows[6] = bad
    rows[1] = -bad
    with pytest.raises(ValueError, match=r"^rows of token 1 are not finite \(3 of 7"):
        contracts.check_finite("rows", rows.requires_grad_())


def test_finite_rows_whose_sum_is_not_pass():
    contracts.check_finite("rows", torch.full((4, 3), 1.5e308, dtype=torch.float64))
    contracts.check_finite("rows", torch.full((4, 3), 3e38))
    contracts.check_finite("rows", torch.empty(0, 3))


def test_ids_outside_are_named_with_what_is_allowed():
    contracts.check_ids("ids", torch.tensor([[0, -1], [3, 2]]), 4)
    contracts.check_ids("ids", torch.empty(0, 2, dtype=torch.int64), 4)
    for bad in (4, -2, 2**40):
        with pytest.raises(ValueError, match=rf"^ids holds id {bad}: allowed are 0\.\.3, and -1 for dropped"):
            contracts.check_ids("ids", torch.tensor([[0, 1], [2, bad]]), 4)


def test_dropped_assignments_are_counted():
    contracts.check_dropless("ids", torch.tensor([[0, 1]]))
    contracts.check_dropless("ids", torch.empty(0, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^ids holds 2 dropped assignments \(-1\): plan with dropless=False"):
        contracts.check_dropless("ids", torch.tensor([[0, -1], [-1, 2]]))


def test_counts_are_checked_under_debug_only(monkeypatch):
    counts_E, ends_E = torch.tensor([2, 0, 1]), torch.tensor([2, 2, 3], dtype=torch.int32)
    monkeypatch.setenv("MOE_LAB_DEBUG_CONTRACTS", "0")
    contracts.check_counts(counts_E.flip(0), ends_E)
    monkeypatch.setenv("MOE_LAB_DEBUG_CONTRACTS", "1")
    contracts.check_counts(counts_E, ends_E)
    with pytest.raises(ValueError, match=r"^counts_E=\[1, 0, 2\] do not sum to .* \[2, 2, 3\]"):
        contracts.check_counts(counts_E.flip(0), ends_E)
