import pytest
import torch

from moe_lab import fastpaths
from moe_lab.jobs.record_cost import lines, measure, nothing, noting
from moe_lab.study.timing import Timing


def test_arms_differ_in_where_decisions_go_and_put_it_back():
    real, seen = fastpaths.note, []

    def run(x_TD):
        fastpaths.note("host_sync", "here")
        seen.append(fastpaths.note)
        return x_TD

    x_TD = torch.ones(2, 3)
    with fastpaths.record() as record:
        assert noting(nothing, run, x_TD)() is x_TD
        assert record.entries == {}
        noting(fastpaths.note, run, x_TD)()
    assert seen == [nothing, real]
    assert record.count("host_sync") == 1
    with pytest.raises(ZeroDivisionError):
        noting(nothing, lambda x_TD: 1 / 0, x_TD)()
    assert fastpaths.note is real


def test_a_whole_layer_is_measured_by_backend_with_its_decisions():
    costs = measure("10B_2B/64", 12, rounds=2, backends=("loop", "batched"))
    # experts_backend, force_load_balance_dispatch, score_after_experts; batched: itself and two hits.
    assert [(cost.backend, cost.decisions) for cost in costs] == [("loop", 3), ("batched", 6)]
    assert all(timing.low > 0 for cost in costs for timing in cost[2:])
    ratio = Timing(1.00123, 0.9, 1.1)
    cost = costs[0]._replace(ms=Timing(1.5, 1, 2), over_nothing=ratio, over_itself=ratio)
    assert lines([cost]).splitlines()[1].split() == ["loop", "3", "1.500", *["1.0012", "[0.9000,", "1.1000]"] * 2]
