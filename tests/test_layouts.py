import dataclasses

import pytest

from moe_lab.jobs.layouts import SHRUNK, difference, largest_between, one_process


def test_the_difference_is_that_of_the_worst_step():
    assert difference([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)


def test_the_largest_difference_is_between_any_two():
    assert largest_between([[1.0], [1.1], [0.8]]) == pytest.approx(1.1 / 0.8 - 1)


def test_a_batch_in_parts_is_the_same_run(one_thread):
    config = dataclasses.replace(SHRUNK, steps=3)
    whole, parts = one_process(config), one_process(config, parts=4)
    assert difference(parts.bits_per_byte, whole.bits_per_byte) < 1e-6
    assert parts.bits_per_byte[1:] != whole.bits_per_byte[1:]  # sums are in another order
