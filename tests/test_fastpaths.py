import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lab import MoE, MoEConfig, fastpaths

CONFIG = MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=2)


def test_what_ran_and_why():
    x_TD = torch.randn(3, 8)
    with fastpaths.record() as record:
        MoE(CONFIG)(x_TD)
        MoE(CONFIG).bfloat16()(x_TD.bfloat16())
        MoE(CONFIG.replace(score_before_experts=True, combine="scatter_add"))(x_TD)
    assert {name: entry.count for name, entry in record.entries.items()} == {
        "experts_backend": 3,
        "score_after_experts": 1,
        "score_after_experts_bf16": 1,
        "score_before_experts": 1,
        "scatter_add_autograd_or_alias": 1,
    }
    assert record.count("host_sync") == 0  # nothing to wait for on a CPU


def test_reasons_are_counted_apart_and_printed():
    with fastpaths.record() as record:
        for reason in ("counts differ", "counts differ", "grad is on"):
            fastpaths.note("host_sync", reason)
        fastpaths.note("score_before_experts", lambda: "formed while recording")
    assert record.count("host_sync") == 3
    assert record.entries["host_sync"].reasons == {"counts differ": 2, "grad is on": 1}
    assert str(record).splitlines() == [
        "host_sync                  2  counts differ",
        "                           1  grad is on",
        "score_before_experts       1  formed while recording",
    ]


def test_nothing_is_formed_or_kept_while_nobody_records():
    fastpaths.note("host_sync", lambda: pytest.fail("formed a reason for nobody"))
    with fastpaths.record() as record:
        pass
    fastpaths.note("host_sync", "after the block")
    assert record.entries == {}
    assert str(record) == "no decisions recorded"


def test_records_nest_and_end_by_identity():
    with fastpaths.record() as outer:
        fastpaths.note("host_sync", "outside")
        with fastpaths.record() as inner:
            fastpaths.note("host_sync", "inside")
        fastpaths.note("host_sync", "outside")
    assert outer.entries["host_sync"].reasons == {"outside": 2, "inside": 1}
    assert inner.entries["host_sync"].reasons == {"inside": 1}

    first, second = fastpaths.record(), fastpaths.record()
    one, two = first.__enter__(), second.__enter__()
    second.__exit__(None, None, None)  # while both are empty, and so equal
    fastpaths.note("host_sync", "only the first is open")
    first.__exit__(None, None, None)
    assert (one.count("host_sync"), two.count("host_sync")) == (1, 0)


def test_an_error_ends_the_record():
    with pytest.raises(RuntimeError, match="inside"), fastpaths.record() as record:
        raise RuntimeError("inside")
    fastpaths.note("host_sync", "afterwards")
    assert record.entries == {}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"^fast path 'warp_drive' is not known: choose one of .*host_sync"):
        fastpaths.Record().count("warp_drive")
    with fastpaths.record(), pytest.raises(ValueError, match=r"^fast path 'warp_drive' is not known"):
        fastpaths.note("warp_drive", "")


def test_a_record_changes_nothing():
    moe, x_TD = MoE(CONFIG), torch.randn(5, 8)
    without = moe(x_TD)
    with fastpaths.record():
        assert torch.equal(moe(x_TD), without)


ENVIRONMENTS = """
import importlib, os
from moe_lab import fastpaths

fastpaths.note("host_sync", "from the start")
for wish, rank in [("0", "0"), ("", "0"), ("rank0", "1"), ("rank0", "0"), ("all", "1"), ("yes", "0")]:
    os.environ |= {"MOE_LAB_FASTPATHS": wish, "RANK": rank}
    importlib.reload(fastpaths)
    fastpaths.note("host_sync", f"{wish} in rank {rank}")
"""


def test_the_environment_records_the_whole_process():
    env = os.environ | {"MOE_LAB_FASTPATHS": "1", "PYTHONPATH": str(Path(fastpaths.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", ENVIRONMENTS], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [  # at exit, the last first
        "moe_lab fast paths, rank 1",
        "host_sync       1  all in rank 1",
        "moe_lab fast paths, rank 0",
        "host_sync       1  rank0 in rank 0",
        "moe_lab fast paths, rank 0",
        "host_sync       1  from the start",
    ]
    assert "ValueError: MOE_LAB_FASTPATHS='yes' is not known: choose 0, 1, rank0 or all" in done.stderr
    assert done.returncode == 1


def test_values_are_summed_up():
    with fastpaths.record() as record:
        for rows in (5, 2, 9):
            fastpaths.note("padded_rows", "dispatch", rows)
    entry = record.entries["padded_rows"]
    assert (entry.count, entry.total, entry.low, entry.high) == (3, 16, 2, 9)


def test_every_name_that_can_be_noted_is_noted_somewhere():
    """By its own text, or as a part of a longer name that is put together where it is noted."""
    package = Path(fastpaths.__file__).parent
    code = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "fastpaths.py")
    parts = ("_adaptive_", "_dispatch_combine", "cached_", "equal_a2a_padding")
    assert [n for n in fastpaths.NAMES if n not in code and not any(part in n for part in parts)] == []


def test_a_decision_costs_a_check_and_no_more_while_nobody_records():
    """Bytecodes of a call: seven of the code that looks for a recorder, whatever its reason would be."""
    run = []

    def count(frame, event, _):
        frame.f_trace_opcodes = True
        if event == "opcode":
            run.append(frame.f_code.co_name)
        return count

    sys.settrace(count)
    try:
        fastpaths.note("host_sync", lambda: pytest.fail("formed a reason for nobody"))
    finally:
        sys.settrace(None)
    assert set(run) == {"note"}
    assert len(run) <= 12


def test_forced_balance_on_one_rank_is_on_the_record(layer_config):
    from moe_lab import MoE, RouterConfig

    moe = MoE(layer_config(router=RouterConfig(force_load_balance="round_robin")))
    with fastpaths.record() as record:
        moe(torch.randn(3, 16))
        MoE(layer_config())(torch.randn(3, 16))
    assert record.count("force_load_balance_dispatch") == 1
    assert "round robin over 8 experts on one rank" in str(record)


def test_a_plan_with_drops_off_the_cpu_notes_that_it_waits():
    from moe_lab.layer.plan import plan_local

    with fastpaths.record() as record, pytest.raises(RuntimeError, match="meta"):
        plan_local(torch.zeros(2, 2, dtype=torch.int64, device="meta"), 4, dropless=False)
    assert record.count("host_sync") == 1
    with fastpaths.record() as record:
        plan_local(torch.zeros(2, 2, dtype=torch.int64), 4, dropless=False)
    assert record.count("host_sync") == 0


def test_combine_notes_the_padding_that_it_sends_not_that_of_the_dispatch():
    """Rank 0 sends 3 and 1 rows and receives 3 and 2: of 2 x 3 padded rows 2 are zeros out, and 1 back."""
    from moe_lab.layer.exchange_plan import make_plan, note_padding
    from moe_lab.layer.plan import plan_local
    from moe_lab.layer.splits import CountMatrix

    config = MoEConfig(dim=8, hidden_dim=8, num_experts=2, top_k=1, equal_split="force")
    local = plan_local(torch.tensor([[0], [0], [0], [1]]), 2)
    plan = make_plan(
        0, local, CountMatrix(counts_RP=torch.tensor([[3, 1], [2, 3]])), torch.tensor([3, 1]), config=config
    )
    for direction, zeros, overhead in (("dispatch", 2, 5000), ("combine", 1, 2000)):
        with fastpaths.record() as record:
            note_padding(plan, config, analytic=False, direction=direction)
        assert record.entries["padded_rows"].total == zeros
        assert record.entries["padding_overhead_bp"].total == overhead


def test_values_are_printed_with_their_sum_and_ends():
    with fastpaths.record() as record:
        for rows in (5, 1200):
            fastpaths.note("padded_rows", "dispatch", rows)
    assert str(record).splitlines()[1].strip() == "sum 1,205, 5 to 1,200"
