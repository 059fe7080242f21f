import pytest

from moe_lab.jobs.exchange_runs import timeline
from moe_lab.parallel import RankPool
from moe_lab.study.timeline import by_exchange
from moe_lab.view.overlap import BESIDE_SHARED, overlap


@pytest.mark.slow
def test_shared_experts_hide_a_part_of_combine_on_real_ranks_forward_and_backward():
    with RankPool(2, backend="gloo") as pool:
        off, on = (timeline(pool, layer=0, overlap=overlapped) for overlapped in (False, True))
    for name in BESIDE_SHARED:
        for waited, hidden in zip(by_exchange(off)[name], by_exchange(on)[name], strict=True):
            assert waited.hidden == 0
            assert waited.exposed == pytest.approx(waited.wait + waited.transfer)
            assert hidden.hidden > 0
            assert hidden.exposed + hidden.hidden == pytest.approx(hidden.wait + hidden.transfer)
    forward, backward = overlap(off, on, "two ranks").axes
    for axes, name in ((forward, BESIDE_SHARED[0]), (backward, BESIDE_SHARED[1])):
        widths = [bar.get_width() / 1e3 for bar in axes.patches]
        shown = [(part.hidden, part.exposed) for steps in (off, on) for part in by_exchange(steps)[name]]
        assert widths == pytest.approx([width for pair in shown for width in pair])
