import pytest

from moe_lab.jobs.exchange_bench import describe, load, paired, rounds, save
from moe_lab.parallel import RankPool


def test_a_round_is_as_slow_as_its_slowest_rank():
    by_rank = [
        {"ours": [0.001, 0.004, 0.003], "theirs": [0.002, 0.002, 0.002], "difference": 0.0},
        {"ours": [0.002, 0.001, 0.001], "theirs": [0.004, 0.004, 0.004], "difference": 0.0},
    ]
    found = paired(by_rank, 16, 8)
    assert (found.tokens, found.dim) == (16, 8)
    assert found.ours.median == pytest.approx(3.0)
    assert found.theirs.median == pytest.approx(4.0)
    assert found.ratio.median == pytest.approx(0.75)
    assert describe(found).startswith("T    16  D    8  ours 3.0 [2.0, 4.0]  torchtitan 4.0 [4.0, 4.0]  ratio 0.750 [")
    assert found.ratio.low <= 0.75 <= found.ratio.high


@pytest.mark.slow
def test_torchtitan_gives_the_same_results():
    pytest.importorskip("torchtitan")
    with RankPool(2, backend="gloo") as pool:
        for rank in pool.run(rounds, 64, 16, 6, 2, 2, warmup=1):
            assert rank["difference"] < 1e-6
            assert len(rank["ours"]) == len(rank["theirs"]) == 2


def test_times_are_kept_with_their_machine(tmp_path):
    by_rank = [{"ours": [0.001, 0.004, 0.003], "theirs": [0.002, 0.002, 0.002]}]
    found = [paired(by_rank, 16, 8)]
    save(tmp_path / "times.json", found, 1, 3)
    environment, kept = load(tmp_path / "times.json")
    assert kept == found
    assert (environment["ranks"], environment["rounds"]) == (1, 3)
    assert environment["device"].endswith("cores")
