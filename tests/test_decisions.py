import torch

from moe_lab import fastpaths
from moe_lab.config import MoEConfig
from moe_lab.fastpaths import Record
from moe_lab.jobs.savings import CHANGES, cache_history, savings, time_savings
from moe_lab.view import decisions


def noted(*notes):
    record = Record()
    for name, reason in notes:
        record.note(name, reason)
    return record


def test_taken_branches_are_lit_and_refused_ones_have_their_reason():
    record = noted(
        ("experts_backend", "buffered: near; not batched: counts differ: expert 3 has 5, mean 4"),
        ("scatter_add_autograd_or_alias", "a gradient flows"),
        ("cached_w13_hit", "same weights, same version"),
        ("cached_w13_miss", "first use"),
    )
    found = {(f.question, f.branch): (f.taken, f.reason) for f in decisions.found_in(record)}
    assert found["Experts by", "buffered"] == (1, "near")
    assert found["Experts by", "batched"] == (0, "counts differ: expert 3 has 5, mean 4")
    assert found["Experts by", "loop"] == (0, "")
    assert found["Shared output", "in place"] == (0, "a gradient flows")
    assert found["Shared output", "into a copy"] == (1, "a gradient flows")
    assert found["Stacked w13", "kept: hit"][0] == found["Stacked w13", "made: miss"][0] == 1
    assert {question for question, _ in found} == {"Experts by", "Shared output", "Stacked w13"}


def test_the_text_and_the_picture_hold_what_was_found():
    record = noted(*[("segment_cat_permute", f"segments of 1 to {rows} rows") for rows in (5, 7)])
    text = repr(decisions.DecisionText(record))
    assert "segments       2  segments of 1 to 5 rows (and 1 more)" in text
    assert "transpose      -  segments of 1 to 5 rows (and 1 more)" in text
    drawn = decisions.decision_tree(record, "of two ranks")
    assert {"of two ranks", "2 x", "not taken"} <= {t.get_text() for t in (*drawn.texts, *drawn.axes[0].texts)}


def test_every_branch_is_of_a_name_that_can_be_noted():
    names = [name for d in decisions.DECISIONS for b in d.branches for name in (*b.taken, *b.refused)]
    assert set(names) <= set(fastpaths.NAMES)


def test_only_a_write_through_data_is_missed():
    steps = {step.what: step for step in cache_history()}
    assert list(steps) == list(CHANGES)
    assert [what for what, step in steps.items() if not step.right] == ["w1 written through .data"]
    assert [what for what, step in steps.items() if step.w13 == "hit"] == [
        *("again", "w2 written in place", "again, as it is", "w1 written through .data")
    ]
    assert steps["w2 written in place"].w2_t == "written in place"
    assert steps["w1 swapped"][1:3] == ("another tensor", "hit")
    assert steps["a fused optimizer steps"][1:3] == ("an optimizer has stepped",) * 2
    lines = str(decisions.HistoryText(list(steps.values()))).splitlines()
    assert max(map(len, lines)) <= 138  # what a notebook's column holds without breaking lines
    assert lines[-1].count("  not kept: under FSDP, which refills …") == 2
    strip = decisions.cache_strip(list(steps.values()), "here")
    assert sum(t.get_text() == "hit, stale" for t in strip.axes[0].texts) == 1


def test_both_ways_of_a_saving_give_the_same_and_bytes_are_those_of_the_formula():
    config = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2)
    found = {saving.path: saving for saving in savings(config, tokens=6)}
    assert found["weights kept"].num_bytes == 4 * 3 * 4 * 16 * 8
    assert found["buffered"].num_bytes == 12 * 4 * (16 + 2 * 8)
    for saving in found.values():
        torch.testing.assert_close(saving.fast(), saving.slow())
    ((_, fast, slow),) = time_savings([found["buffered"]], rounds=2)
    assert len(fast) == len(slow) == 2
    assert "buffered" in repr(decisions.SavingText([(found["buffered"], fast, slow)]))
    assert decisions.saving_bars([(found["buffered"], fast, slow)], "here").axes
