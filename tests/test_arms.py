"""Combine arms held against float64, and what adding rows as they arrive would do."""

import pytest
import torch

from moe_lab.study.arms import compare_arms


def test_every_arm_repeats_its_bits_and_arrival_does_not():
    got = compare_arms()
    assert [arm.name for arm in got.arms] == ["gather", "scatter_add"]
    assert all(arm.repeats == arm.runs == 5 for arm in got.arms)
    assert got.arrival_results == 5
    assert 0.5 < got.arrival_tokens <= 1


def test_gather_rounds_once_and_is_the_most_exact():
    got = compare_arms(tokens=2000)
    gather, scatter_add = (arm.error for arm in got.arms)
    # One rounding to 8 bits: between none and half an ulp of each value, evenly: 2 ** -9 / sqrt(3), a bit less in norm.
    assert 0.5 * 2**-9 / 3**0.5 < gather < 2**-9
    assert gather < scatter_add < got.arrival_error


def test_float64_leaves_nothing_but_the_order():
    got = compare_arms(dtype=torch.float64, tokens=50)
    assert all(arm.error < 1e-6 for arm in got.arms)  # gates are float32
    assert got.arrival_error < 1e-15
    with pytest.raises(ValueError, match="runs=1"):
        compare_arms(runs=1)
