"""Real ranks have the bits of virtual ones."""

from moe_lab.jobs.determinism import real_ranks
from moe_lab.parallel.ranks import RankPool


def test_two_gloo_ranks_have_the_bits_of_two_virtual_ones():
    arms = ("loop", "loop, scatter_add", "blocked, batch_invariant")
    with RankPool(2, backend="gloo") as pool:
        assert real_ranks(pool, 3, arms, 128) == dict.fromkeys(arms, True)
