import pytest

from moe_lab.jobs.own_shape import Shape, merged, one_round
from moe_lab.study.measurements import measured

TINY = Shape(tokens=16, dim=32, hidden_dim=16, num_experts=4, top_k=2)


def test_sizes_by_hand():
    assert TINY.flops == 6 * 16 * 2 * 32 * 16
    assert TINY.weight_bytes == 3 * 4 * 32 * 16 * 4
    assert TINY.num_bytes == TINY.weight_bytes + 32 * (2 * 32 + 3 * 16) * 4


def test_counts_are_those_of_the_inputs():
    counts = [0] * 4
    for expert in TINY.inputs().expert_ids_TK.flatten().tolist():
        counts[expert] += 1
    assert TINY.counts() == counts


def test_rounds_come_one_by_one_and_are_merged():
    rounds = [one_round(TINY, block_ms=0.0) for _ in range(3)]
    rows = merged([found for found, _ in rounds])
    assert [row.arm for row in rows][:4] == ["dense", "copy", "loop", "padded"]
    assert rounds[0][1]["batched"].startswith("backend='batched' is not legal, counts differ")
    loop, dense = rows[2], rows[0]
    assert loop.repeats == tuple(found[2].repeats[0] for found, _ in rounds)
    assert loop.median == sorted(loop.repeats)[1]
    assert loop.ratio == sorted(a / b for a, b in zip(loop.repeats, dense.repeats))[1]
    with pytest.raises(ValueError, match="at least one round"):
        merged([])


def test_merged_keeps_what_a_row_says():
    of = {"bench": "layer", "layer": "x", "arm": "loop", "dim": 1, "hidden_dim": 1, "num_experts": 1, "top_k": 1}
    row = measured([[2.0]], keep=True, tokens=1, dtype="float32", device="d", dense_ms=1.0, error=1e-7, **of)
    (found,) = merged([[row], [row]])
    assert (found.error, found.dense_ms, found.arm, found.repeats, found.p90) == (1e-7, 1.0, "loop", (2.0, 2.0), 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be"),
        ({"top_k": 5}, "top_k=5 must be"),
        ({"skew": -1.0}, "skew=-1.0 must be"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"tokens": 2**30, "dim": 8192}, "GiB, more than a quarter of"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Shape(**vars(TINY) | changes)
