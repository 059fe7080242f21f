import pytest

from moe_lab.jobs.exchange_bench import rounds
from moe_lab.jobs.exchange_table import PHASES, describe, load, paired, phase_table, save
from moe_lab.parallel import RankPool


def seconds_of(ours, theirs, exchange, whole=0.010):
    """A rank's seconds by arm; each phase takes a tenth of the whole."""
    phases = {"all": [whole] * 3, **{name: [whole / 10] * 3 for name in PHASES}}
    return {"ours": ours, "theirs": theirs, "exchange": exchange, "difference": 0.0, "phases": phases}


def test_a_round_is_as_slow_as_its_slowest_rank():
    by_rank = [
        seconds_of([0.001, 0.004, 0.003], [0.002, 0.002, 0.002], [0.001, 0.002, 0.001]),
        seconds_of([0.002, 0.001, 0.001], [0.004, 0.004, 0.004], [0.001, 0.001, 0.002], whole=0.030),
    ]
    found = paired(by_rank, 16, 8)
    assert (found.tokens, found.dim) == (16, 8)
    assert found.ours.median == pytest.approx(3.0)
    assert found.theirs.median == pytest.approx(4.0)
    assert found.ratio.median == pytest.approx(0.75)
    assert describe(found).startswith("T    16  D    8  ours 3.0 [2.0, 4.0]  torchtitan 4.0 [4.0, 4.0]  ratio 0.750 [")
    assert found.ratio.low <= 0.75 <= found.ratio.high
    assert found.exchange.median == pytest.approx(2.0)
    assert found.bound.median == pytest.approx(0.5)
    assert found.phases_ms["all"] == pytest.approx(20.0)
    cells = phase_table([found]).splitlines()[1].split()
    assert cells == ["16", "8", "20.0", "(100", "%)", *["2.0", "(10", "%)"] * 5, "10.0", "(50", "%)", "0.50"]


@pytest.mark.slow
def test_torchtitan_gives_the_same_results():
    pytest.importorskip("torchtitan")
    with RankPool(2, backend="gloo") as pool:
        for rank in pool.run(rounds, 64, 16, 6, 2, 2, warmup=1):
            assert rank["difference"] < 1e-6
            assert len(rank["ours"]) == len(rank["theirs"]) == len(rank["exchange"]) == 2
            assert all(sum(rank["phases"][name]) > 0 for name in PHASES)
            own = [sum(rank["phases"][name][i] for name in PHASES) for i in range(2)]
            assert all(part <= whole for part, whole in zip(own, rank["phases"]["all"]))


def test_times_are_kept_with_their_machine(tmp_path):
    by_rank = [seconds_of([0.001, 0.004, 0.003], [0.002, 0.002, 0.002], [0.001, 0.001, 0.001])]
    found = [paired(by_rank, 16, 8)]
    save(tmp_path / "times.json", found, 1, 3)
    environment, kept = load(tmp_path / "times.json")
    assert kept == found
    assert (environment["ranks"], environment["rounds"]) == (1, 3)
    assert environment["device"].endswith("cores")
