import platform
import re
from types import SimpleNamespace

import pytest
import torch

from moe_lab.study import timing

CPU = torch.device("cpu")


def test_arms_run_in_turn_and_the_first_round_does_not_count():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = timing.interleave(arms, CPU, rounds=2, block_ms=0.0)
    assert {name: [len(runs) for runs in rounds] for name, rounds in times.items()} == {"a": [1, 1], "b": [1, 1]}
    assert "".join(calls) == "aaabbb" + "ab" * 3, "three calls each to choose the block, then rounds of one"


@pytest.fixture
def nap(monkeypatch):
    """Lets a clock go on by so many ms, which nothing else does."""
    seconds = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def go_on(ms):
        seconds[0] += ms / 1e3

    return go_on


def test_a_longer_arm_is_measured_longer(nap):
    times = timing.interleave({"nap": lambda: nap(20), "nothing": lambda: None}, CPU, rounds=1, block_ms=1.0)
    assert times["nap"] == [[pytest.approx(20)]]
    assert times["nothing"] == [[0.0] * 400]


def test_every_run_of_a_block_is_kept(nap):
    times = timing.interleave({"nap": lambda: nap(1)}, CPU, rounds=2, block_ms=5.0)
    assert times["nap"] == [[pytest.approx(1)] * 5] * 2
    assert timing.medians([[1.0, 9.0, 2.0], [4.0]]) == [2.0, 4.0]


def test_the_summary_is_a_median_within_its_interval():
    summary = timing.summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert summary.median == 3.0
    assert summary.low <= 3.0 <= summary.high <= 100.0
    assert timing.summarise([5.0]) == (5.0, 5.0, 5.0)


def test_ratios_are_taken_round_by_round():
    assert timing.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="reads Linux's cpuinfo")
def test_the_environment_names_the_processor_with_family_and_model():
    assert re.fullmatch(r"\S.*, family \d+, model \d+", timing.environment(CPU)["cpu"])


def test_the_environment_names_device_and_versions():
    facts = timing.environment(CPU)
    assert facts["torch"] == torch.__version__
    assert "CPU" in facts["device"]
    assert facts.keys() == {"date", "python", "torch", "device", "cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_counts_what_is_kept_and_the_worst_moment():
    x = torch.zeros(2**20, device="cuda", requires_grad=True)
    memory = timing.measure_memory(lambda: x.exp() * x.sin(), lambda out: out.sum().backward())
    assert memory.saved == 2 * 4 * 2**20
    assert memory.peak > memory.saved
