import pytest
import torch

from moe_lab import MoE, phases


def test_a_layer_says_when_each_phase_ran(layer_config):
    ticks = iter(range(100))
    moe = MoE(layer_config(num_shared_experts=1, score_before_experts=True))
    with phases.record(clock=lambda: next(ticks)) as spans:
        moe(torch.randn(4, 16))
    assert [span.name for span in spans] == [
        "router", "plan", "pack", "score", "experts", "shared experts", "combine",
    ]  # fmt: skip
    assert [(span.start, span.end) for span in spans] == [(2 * i, 2 * i + 1) for i in range(7)]


def test_nothing_is_kept_or_read_while_nobody_records(layer_config):
    with phases.record(clock=lambda: pytest.fail("read")) as spans:
        pass
    MoE(layer_config())(torch.randn(4, 16))
    assert spans == []
    assert phases.phase("never checked while off") is not None


def test_records_nest_and_end_apart():
    with phases.record() as outer:
        with phases.record() as inner, phases.phase("plan"):
            pass
        with phases.phase("pack"):
            pass
    assert [span.name for span in inner] == ["plan"]
    assert [span.name for span in outer] == ["plan", "pack"]
    assert all(span.start <= span.end for span in outer)


def test_a_phase_that_raises_ends(layer_config):
    with phases.record() as spans, pytest.raises(KeyError), phases.phase("plan"):
        raise KeyError
    assert [span.name for span in spans] == ["plan"]


def test_unknown_phases_are_named():
    with phases.record(), pytest.raises(ValueError, match="phase 'lunch' is not known: choose one of router, plan"), \
            phases.phase("lunch"):  # fmt: skip
        pass
