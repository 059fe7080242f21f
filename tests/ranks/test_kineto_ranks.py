import kineto_jobs
import pytest

from moe_lab.jobs.overlap import BESIDE_SHARED
from moe_lab.parallel import RankPool
from moe_lab.study.kineto import read
from moe_lab.study.timeline import EXCHANGES, by_exchange


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, backend="gloo") as pool:
        yield pool


@pytest.mark.slow
def test_a_trace_recorded_from_gloo_ranks(pool, tmp_path):
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


@pytest.mark.slow
def test_shared_experts_take_the_wait_for_combine_off_a_sharded_layer_forward_and_backward(
    pool, tmp_path, layer_config
):
    """Shared experts that go on until rows have landed leave nothing to wait for, where they run beside the exchange.

    By the stamps that is exact. The trace also shows what lies between the post and the first operator, far less than
    the 0.3 s that rank 0 waits for rank 1 otherwise; rank 1 comes last, and its rows may be there before it computes.
    """
    stamped, traced = {}, {}
    for overlap in (False, True):
        ranks = pool.run(kineto_jobs.patient, layer_config(num_shared_experts=1), str(tmp_path), overlap, late=0.3)
        stamped[overlap] = by_exchange([steps for steps, _ in ranks])
        (traced[overlap],) = read([path for _, path in ranks]).values()
    assert list(stamped[True]) == [flight.name for flight in traced[True][0].flights] == ["count", *EXCHANGES]
    for name in BESIDE_SHARED:
        for waited, beside in zip(stamped[False][name], stamped[True][name], strict=True):
            assert waited.exposed == pytest.approx(waited.wait + waited.transfer)
            assert (waited.hidden, beside.exposed) == (0, 0)
        waited, beside = (by_exchange(traced[overlap])[name] for overlap in (False, True))
        assert [part.hidden for part in waited] == [0, 0]
        assert beside[0].exposed < waited[0].exposed
        first = traced[True][0]
        flight = next(flight for flight in first.flights if flight.name == name)
        work = [span for span in first.spans if flight.arrival < span.start < flight.end]
        assert max(span.end for span in work) >= flight.end, "shared experts outlast the exchange"
