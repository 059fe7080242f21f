import json

import pytest
import torch

from moe_lab import GroupedExperts, MoE, fastpaths
from moe_lab.layer import auto
from moe_lab.layer.auto import Case

SMALL = Case("cpu", "float32", False, 4.0, 64, 64, 8)
LARGE = SMALL._replace(rows=400.0)


@pytest.fixture(autouse=True)
def _forget_the_table():
    auto.forget_table()
    yield
    auto.forget_table()


@pytest.fixture
def table(monkeypatch):
    small = {"batched": 4.0, "buffered": 3.0, "padded": 1.0, "loop": 2.0}
    large = {"batched": 0.5, "buffered": 1.0, "padded": 5.0, "loop": 2.0}
    known = [(SMALL, small), (LARGE, large)]
    monkeypatch.setattr(auto, "table", lambda: known)


def test_the_nearest_measured_shapes_decide(table):
    """Half way between 4 and 400 rows: square roots of 4 * 1, 3 * 2, 2 * 4 and 1 * 10 times the fastest."""
    choice = auto.choose(SMALL._replace(rows=40.0), plain=True)
    assert str(choice) == (
        "buffered: times by the nearest measured shapes: batched 2.00, buffered 2.45, loop 2.83, padded 3.16; "
        "not batched: counts are not known on the host"
    )
    assert auto.choose(SMALL._replace(rows=5.0), plain=True).backend == "padded"
    assert auto.choose(SMALL._replace(rows=200.0), plain=True).backend == "buffered"


def test_faster_ones_that_are_not_legal_are_named_with_their_reason(table):
    choice = auto.choose(LARGE, torch.tensor([513, 400, 314]), plain=False)
    assert choice.backend == "loop"
    assert choice.refused == {
        "batched": "counts differ: expert 0 has 513, mean 409",
        "buffered": "it computes plain SwiGLU",
    }
    assert str(choice).endswith(
        "; not batched: counts differ: expert 0 has 513, mean 409; not buffered: it computes plain SwiGLU"
    )
    assert auto.choose(LARGE, torch.tensor([4, 4]), plain=True).backend == "batched"
    assert auto.choose(LARGE, plain=True).refused == {"batched": "counts are not known on the host"}
    assert auto.choose(LARGE, torch.tensor([0, 0]), plain=True).refused["batched"].startswith("expert 0 has 0 rows")


@pytest.mark.parametrize(
    ("case", "backend", "refused"),
    [
        (Case("cuda", "bfloat16", True, 4.0, 64, 64, 8), "fused", []),
        (Case("cuda", "bfloat16", True, 4.0, 64, 60, 8), "loop", ["fused", "grouped"]),
        (Case("cuda", "float32", True, 4.0, 64, 64, 8), "grouped", ["fused"]),
        (Case("cpu", "float64", True, 4.0, 64, 64, 8), "loop", ["fused", "grouped"]),
    ],
)
def test_off_the_table_backends_are_tried_in_order(table, case, backend, refused):
    choice = auto.choose(case, plain=True)
    assert (choice.backend, list(choice.refused)) == (backend, refused)
    assert "not measured for this device and dtype, in order: fused, grouped, loop" in str(choice)


def test_auto_runs_and_says_why_once(table, layer_config):
    moe = MoE(layer_config(backend="auto"))
    with fastpaths.record() as record, torch.no_grad():
        moe(torch.randn(2000, 16))
    (reason,) = record.entries["experts_backend"].reasons
    assert reason.startswith("buffered: times by the nearest measured shapes: batched 1.")
    with fastpaths.record() as record:
        moe(torch.randn(3, 16))  # with a gradient, which the table does not hold
    ((reason, count),) = record.entries["experts_backend"].reasons.items()
    assert count == 1
    assert reason.startswith("grouped: not measured for this device and dtype")


def test_what_was_asked_for_by_name_is_on_the_record(layer_config):
    with fastpaths.record() as record:
        MoE(layer_config(backend="padded"))(torch.randn(3, 16))
    assert record.entries["experts_backend"].reasons == {"padded: asked for by name": 1}


def test_a_gradient_rules_batched_out(monkeypatch):
    case = SMALL._replace(grad=True)
    monkeypatch.setattr(auto, "table", lambda: [(case, {"batched": 1.0, "padded": 2.0})])
    assert auto.choose(case, torch.tensor([4, 4]), plain=True).refused == {"batched": "a gradient flows"}


def test_a_layer_too_big_for_memory_is_refused_with_the_number():
    with pytest.raises(ValueError, match=r"make weights of 12288000\.0 GiB, and cpu has"):
        GroupedExperts(2**16, 2**18, 64000)
    with torch.device("meta"):
        assert GroupedExperts(2**16, 2**18, 64000).w1_EFD.is_meta


def test_another_table_is_read_once_the_first_is_forgotten(monkeypatch, tmp_path):
    def keep(**ms):
        path = tmp_path / "table.json"
        path.write_text(json.dumps([{"case": SMALL._asdict(), "ms": ms}]))
        monkeypatch.setattr(auto, "TABLE", path)

    keep(loop=1.0, padded=2.0)
    auto.forget_table()
    assert auto.choose(SMALL, plain=True).backend == "loop"
    keep(loop=2.0, padded=1.0)
    assert auto.choose(SMALL, plain=True).backend == "loop"
    auto.forget_table()
    assert auto.choose(SMALL, plain=True).backend == "padded"
