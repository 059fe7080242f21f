import kineto_jobs
import pytest

from moe_lab.parallel import RankPool
from moe_lab.study.kineto import read
from moe_lab.study.timeline import EXCHANGES, by_exchange


@pytest.mark.slow
def test_a_trace_recorded_from_gloo_ranks(tmp_path):
    with RankPool(2, backend="gloo") as pool:
        steps = read(pool.run(kineto_jobs.profiled, str(tmp_path)))
    assert list(steps) == [0, 1]
    for ranks in steps.values():
        found = by_exchange(ranks)
        assert list(found) == ["count", *EXCHANGES]
        for parts in found.values():
            assert min(part.wait for part in parts) == 0, "the last to arrive waits for nobody"
            for part in parts:
                assert min(part) >= 0
                assert part.wait + part.transfer == pytest.approx(part.exposed + part.hidden)
    last_forward, first_back = (steps[1][0].flights[n] for n in (2, 3))
    assert last_forward.end < first_back.arrival
    assert steps[1][0].flights[4].end < steps[0][0].flights[3].arrival, "layer 1 goes back before layer 0"
