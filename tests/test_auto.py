import pytest
import torch

from moe_lab import GroupedExperts, MoE, fastpaths
from moe_lab.layer import auto
from moe_lab.layer.auto import Case, Choice

SMALL = Case("cpu", "float32", False, 4.0, 64, 64, 8)
LARGE = SMALL._replace(rows=400.0)


@pytest.fixture
def table(monkeypatch):
    known = [(SMALL, {"padded": 1.0, "loop": 2.0}), (LARGE, {"buffered": 1.0, "padded": 3.0, "loop": 2.0})]
    monkeypatch.setattr(auto, "table", lambda: known)


def test_the_nearest_measured_shape_decides(table):
    assert auto.choose(SMALL._replace(rows=9.0), plain=True) == Choice(
        "padded", "fastest legal at the nearest measured shape, ms: padded 1, loop 2"
    )
    assert auto.choose(SMALL._replace(rows=100.0), plain=True).backend == "buffered"
    assert auto.choose(SMALL._replace(rows=100.0), plain=False).backend == "loop"  # biases


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (Case("cuda", "bfloat16", True, 4.0, 64, 64, 8), "fused"),
        (Case("cuda", "bfloat16", True, 4.0, 64, 60, 8), "loop"),
        (Case("cuda", "float32", True, 4.0, 64, 64, 8), "grouped"),
        (Case("cpu", "float64", True, 4.0, 64, 64, 8), "loop"),
    ],
)
def test_off_the_table_a_rule_decides(table, case, backend):
    choice = auto.choose(case, plain=True)
    assert choice.backend == backend
    assert "in the table: first legal of fused, grouped, loop" in choice.reason


def test_auto_runs_and_says_why(table, layer_config):
    moe = MoE(layer_config(backend="auto"))
    with fastpaths.record() as record, torch.no_grad():
        moe(torch.randn(2000, 16))
    (reason,) = record.entries["auto_backend"].reasons
    assert reason.startswith("buffered: fastest legal")


def test_a_choice_is_noted_once(table, layer_config):
    moe = MoE(layer_config(backend="auto"))
    with fastpaths.record() as record:
        moe(torch.randn(3, 16))  # with a gradient, which the table does not hold
    assert record.entries["auto_backend"].reasons == {
        "grouped: no cpu float32 in the table: first legal of fused, grouped, loop": 1
    }


def test_a_layer_too_big_for_memory_is_refused_with_the_number():
    with pytest.raises(ValueError, match=r"make weights of 12288000\.0 GiB, and cpu has"):
        GroupedExperts(2**16, 2**18, 64000)
    with torch.device("meta"):
        assert GroupedExperts(2**16, 2**18, 64000).w1_EFD.is_meta
