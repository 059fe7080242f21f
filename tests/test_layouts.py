import dataclasses
from functools import partial

import pytest

from moe_lab.jobs.layouts import IN_ORDER, SHRUNK, InParts, difference, largest_between, on_ranks, one_process
from moe_lab.parallel import RankPool


def test_the_difference_is_that_of_the_worst_step():
    assert difference([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)


def test_the_largest_difference_is_between_any_two():
    assert largest_between([[1.0], [1.1], [0.8]]) == pytest.approx(1.1 / 0.8 - 1)


@pytest.mark.parametrize("together", [False, True])
def test_a_batch_in_parts_is_the_same_run(one_thread, together):
    config = dataclasses.replace(SHRUNK, steps=3)
    whole, parts = one_process(config), one_process(config, make=partial(InParts, parts=4, together=together))
    assert difference(parts.bits_per_byte, whole.bits_per_byte) < 1e-6
    assert parts.bits_per_byte[1:] != whole.bits_per_byte[1:]  # sums are in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ORDER)
@pytest.mark.parametrize("seed", [0, 1])
def test_two_ranks_have_the_bits_of_one_process_that_sums_in_their_order(one_thread, name, seed):
    """Fifty steps, every logged loss: so nothing but the order of sums sets ranks apart from one process."""
    config, (layout, make) = dataclasses.replace(SHRUNK, seed=seed), IN_ORDER[name]
    with RankPool(2, backend="gloo") as pool:
        ranks = on_ranks(pool, config, layout).bits_per_byte
    assert len(ranks) == 50
    assert ranks == one_process(config, make=make).bits_per_byte
    assert ranks != one_process(config).bits_per_byte
