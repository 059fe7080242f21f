import dataclasses

import pytest

from moe_lab.jobs.layouts import IN_ORDER, SHRUNK, difference, in_order, largest_between, on_ranks, one_process
from moe_lab.parallel import RankPool


@pytest.fixture(scope="module")
def pools():
    with RankPool(2, backend="gloo") as two, RankPool(4, backend="gloo") as four:
        yield {2: two, 4: four}


def test_the_difference_is_that_of_the_worst_step():
    assert difference([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)


def test_the_largest_difference_is_between_any_two():
    assert largest_between([[1.0], [1.1], [0.8]]) == pytest.approx(1.1 / 0.8 - 1)


@pytest.mark.parametrize("name", ["EP 4", "FSDP 4", "dp 2 x ep 2", "sp 2 x ep 2"])
def test_another_order_of_sums_is_the_same_run(one_thread, name):
    config = dataclasses.replace(SHRUNK, steps=3)
    whole, ordered = one_process(config).bits_per_byte, in_order(config, IN_ORDER[name]).bits_per_byte
    assert difference(ordered, whole) < 1e-6
    assert ordered[1:] != whole[1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ORDER)
def test_ranks_in_a_fixed_order_have_the_bits_of_one_process_that_sums_so(one_thread, pools, name):
    """Every logged loss: nothing but the order of sums sets ranks apart from one process. Fifty steps: the job."""
    config, layout = dataclasses.replace(SHRUNK, steps=8, save_every=8), IN_ORDER[name]
    ranks = on_ranks(pools[layout.ranks], config, layout, fixed_order=True).bits_per_byte
    assert len(ranks) == 8
    assert ranks == in_order(config, layout).bits_per_byte
    assert ranks != one_process(config).bits_per_byte
