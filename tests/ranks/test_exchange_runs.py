import pytest
import rank_jobs  # noqa: F401  (the folder is on the path)
import torch

from moe_lab.jobs.exchange_runs import compare_overlap, exchange_ids, same_bits, timeline
from moe_lab.layer.placement import Placement
from moe_lab.parallel import RankPool
from moe_lab.study.batches import count_matrix
from moe_lab.study.timeline import EXCHANGES, by_exchange


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, backend="gloo") as pool:
        yield pool


def test_a_slowed_rank_is_the_others_wait_and_not_transfer(pool):
    slow = 0.4
    steps = timeline(pool, slow_rank=1, slow_ms=1e3 * slow)
    found = by_exchange(steps)
    assert list(found) == ["count", *EXCHANGES]
    other, slowed = found["combine"]
    assert slowed.wait == 0
    assert other.wait > max(other.transfer, slowed.transfer)
    names = ["router", "plan", "pack", "unpack", "experts", "unpermute", "shared experts", "combine"]
    assert {span.name for span in steps[0].spans} == set(names)


def test_without_overlap_everything_is_exposed_and_a_barrier_takes_the_wait(pool):
    found = by_exchange(timeline(pool, slow_rank=0, slow_ms=300.0, slow_at="router", overlap=False, barrier=True))
    for name in EXCHANGES:
        for part in found[name]:
            assert part.hidden == 0
    assert max(part.wait for part in found["count"]) < 0.3  # what the slowed rank slept: before the barrier


def test_shared_experts_are_inside_the_exchange_with_overlap_only(pool):
    for overlap in (True, False):
        for step in timeline(pool, overlap=overlap):
            (shared,) = (span for span in step.spans if span.name == "shared experts")
            combine = next(flight for flight in step.flights if flight.name == "combine")
            assert (combine.arrival <= shared.start <= shared.end <= combine.asked) is overlap
    forward, backward = compare_overlap(pool, rounds=2)
    assert (forward.exchange, backward.exchange) == ("combine", "combine gradients")


def test_the_shipped_layer_gives_the_same_bits_on_real_and_virtual_ranks(pool):
    assert same_bits(pool, 2) is True


def test_bytes_of_a_micro_batch_are_those_of_its_plan(pool):
    ids = [torch.randint(0, 8, (tokens, 2)) for tokens in (5, 9)]
    placement = Placement.blockwise(8, 2)
    splits_RR = count_matrix(ids, placement).splits_RR
    for rank, run in enumerate(pool.run(exchange_ids, ids, placement, "off", 16)):
        assert run["same"] is True
        assert run["sent"] == [(splits_RR[rank].tolist(), 64), (splits_RR[:, rank].tolist(), 64)]


@pytest.mark.parametrize(
    ("how", "message"), [({"slow_rank": 2}, "slow_rank=2"), ({"slow_at": "lunch"}, "slow_at='lunch' is not known")]
)
def test_bad_settings_are_refused(pool, how, message):
    with pytest.raises(ValueError, match=message):
        timeline(pool, **how)
