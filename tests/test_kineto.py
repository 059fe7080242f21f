import gzip
import json

import pytest

from moe_lab import cli
from moe_lab.study.kineto import read
from moe_lab.study.timeline import Parts, by_exchange

MS = 1000  # in a trace's microseconds


def event(name, start, end, cat="cpu_op", **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": start * MS, "dur": (end - start) * MS, "args": args}


def gloo(start, end, what="all_to_all"):
    return event(f"gloo:{what}", start, end, "user_annotation")


def layer(number, start, end):
    return event(f"layer {number}", start, end, "user_annotation")


def stored(path, rank, events, size=2, base=7_000_000_000, **changes):
    about = {"distributedInfo": {"rank": rank, "world_size": size}, "baseTimeNanoseconds": base}
    path.write_text(json.dumps(about | {"traceEvents": [{"ph": "M", "name": "process_name"}, *events]} | changes))
    return path


@pytest.fixture
def pair(tmp_path):
    """Two ranks, layer 3: rank 0 arrives at 1 and 10, rank 1 at 4 and 9, and computes during its combine.

    Rank 1's clock starts a second later and its stamps are a second smaller.
    """
    first = [layer(3, 0, 14), gloo(1, 6), event("aten::mm", 6, 9), gloo(10, 13), gloo(20, 22), gloo(24, 26)]
    second = [layer(3, 0, 14), gloo(4, 6), gloo(9, 13), event("aten::mm", 10, 12), event("aten::add", 11, 12.5)]
    second += [event("autograd::engine::evaluate_function", 9, 13), event("c10d::alltoall_base_", 9, 13)]
    second += [gloo(21, 23), gloo(24, 26)]
    for one in second:
        one["ts"] -= 1e6
    return [stored(tmp_path / "b.json", 1, second, base=8_000_000_000), stored(tmp_path / "a.json", 0, first)]


def rounded(parts):
    return [Parts(*(round(1e3 * seconds, 3) for seconds in part)) for part in parts]


def test_a_trace_with_known_values(pair):
    steps = read(pair)
    assert list(steps) == [3]
    found = {name: rounded(parts) for name, parts in by_exchange(steps[3]).items()}
    assert list(found) == ["dispatch", "combine", "combine gradients", "dispatch gradients"]
    assert found["dispatch"] == [Parts(3.0, 2.0, 5.0, 0.0), Parts(0.0, 2.0, 2.0, 0.0)]
    assert found["combine"] == [Parts(0.0, 3.0, 3.0, 0.0), Parts(1.0, 3.0, 1.5, 2.5)]
    assert found["combine gradients"] == [Parts(1.0, 1.0, 2.0, 0.0), Parts(0.0, 2.0, 2.0, 0.0)]
    assert found["dispatch gradients"] == [Parts(0.0, 2.0, 2.0, 0.0)] * 2


def test_backward_undoes_layers_from_the_last(tmp_path):
    events = [layer(0, 0, 3), gloo(0.5, 0.6, "all_gather"), gloo(1, 2), gloo(2, 3)]
    events += [layer(1, 4, 7), gloo(5, 6), gloo(6, 7)]
    events += [gloo(10 + n, 11 + n) for n in range(5)]
    steps = read([stored(tmp_path / "a.json", 0, events, size=1)])
    assert {number: [flight.name for flight in of[0].flights] for number, of in steps.items()} == {
        0: ["count", "dispatch", "combine", "combine gradients", "dispatch gradients"],
        1: ["dispatch", "combine", "combine gradients", "dispatch gradients"],
        None: ["exchange"],
    }
    assert steps[1][0].flights[2].arrival == pytest.approx(7 + 0.010)
    assert steps[0][0].flights[3].arrival == pytest.approx(7 + 0.012)


def fsdp(what, start, end):
    return event(f"FSDP::{what}", start, end, "user_annotation")


def test_an_exchange_lasts_from_its_post_and_gathers_of_weights_are_no_counts(tmp_path):
    """Gloo's thread comes to the dispatch posted at 4 at 5, by when a product runs; what ran then is kept as spans."""
    events = [layer(3, 0, 14), fsdp("all_gather (blocks.3.moe.router)", 0.5, 1), fsdp("all_gather", 16, 18)]
    events += [event("c10d::_allgather_base_", 0.6, 0.7), gloo(0.8, 1.5, "all_gather")]
    events += [fsdp("all_gather_copy_out (blocks.3.moe.router)", 1.8, 2.5)]  # posts nothing
    events += [event("c10d::allgather_into_tensor_coalesced_", 2, 2.1), gloo(2.2, 3, "all_gather")]
    events += [event("c10d::_allgather_base_", 17, 17.1), gloo(17.2, 17.5, "all_gather")]
    events += [event("c10d::alltoall_base_", 4, 4.1), event("aten::mm", 4.5, 5.5), gloo(5, 6)]
    events += [event("aten::mm", 6, 7), event("c10d::alltoall_base_", 7, 7.1), gloo(8, 9), event("aten::mm", 9, 9.5)]
    steps = read([stored(tmp_path / "a.json", 0, events, size=1)])
    assert list(steps) == [3]
    found = by_exchange(steps[3])
    assert {name: rounded(parts) for name, parts in found.items()} == {
        "count": [Parts(0.0, 1.0, 1.0, 0.0)],
        "dispatch": [Parts(0.0, 2.0, 1.0, 1.0)],
        "combine": [Parts(0.0, 2.0, 2.0, 0.0)],
    }
    assert [
        (span.name, round(1e3 * (span.start - 7), 3), round(1e3 * (span.end - 7), 3)) for span in steps[3][0].spans
    ] == [("computing", 4.5, 5.5)]


def test_where_posts_are_missing_an_exchange_lasts_from_when_gloo_began(tmp_path):
    events = [layer(0, 0, 9), event("c10d::alltoall_base_", 1, 1.1), gloo(2, 3), gloo(4, 5)]
    steps = read([stored(tmp_path / "a.json", 0, events, size=1)])
    assert [round(1e3 * (flight.arrival - 7), 3) for flight in steps[0][0].flights] == [2, 4]


def test_every_step_has_names_of_its_own_and_modules_are_marks(tmp_path):
    events = []
    for at in (0, 10):
        events += [event("nn.Module: MoE_5", at, at + 3, "python_function"), gloo(at + 1, at + 2), gloo(at + 2, at + 3)]
        events += [event("nn.Module: MoELayer_6", at, at + 3, "python_function")]
    steps = read([stored(tmp_path / "a.json", 0, events, size=1)])
    assert [flight.name for flight in steps[5][0].flights] == ["dispatch", "combine", "dispatch 2", "combine 2"]


def test_kernels_of_a_gpu(tmp_path):
    """The exchange is launched inside the layer and runs after it; a product on another stream hides 2 of its 4 ms."""
    args = {"Collective name": "all_to_allv", "correlation": 9}
    events = [
        layer(2, 0, 1),
        event("cudaLaunchKernelExC", 0.5, 0.6, "cuda_runtime", correlation=9),
        event("ncclDevKernel_SendRecv(...)", 5, 9, "kernel", **args),
        event("nvjet_gemm", 4, 7, "kernel"),
        event("aten::mm", 0, 20),
    ]
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wt") as file:
        file.write(stored(tmp_path / "plain.json", 0, events, size=1).read_text())
    steps = read([path])
    assert list(steps) == [2]
    assert rounded(by_exchange(steps[2])["dispatch"]) == [Parts(0.0, 4.0, 2.0, 2.0)]


def test_the_command_prints_every_exchange_and_sums(pair, capsys):
    assert cli.main(["timeline", *map(str, pair)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["layer", "exchange", "rank"]
    assert lines[1] == ["3", "dispatch", "0", "3.000", "2.000", "5.000", "0.000"]
    assert lines[-1] == ["all", "1", "1.000", "9.000", "7.500", "2.500"]
    assert len(lines) == 1 + 4 * 2 + 2


def test_ranks_must_be_all_there_and_have_seen_the_same(tmp_path, pair):
    with pytest.raises(ValueError, match=r"ranks \[1\]: must be one of each rank from 0 to 1"):
        read(pair[:1])
    with pytest.raises(ValueError, match=r"ranks \[0, 0\]"):
        read([pair[1], pair[1]])
    with pytest.raises(ValueError, match=r"traces of ranks \[\]"):
        read([])
    fewer = stored(tmp_path / "c.json", 1, [layer(3, 0, 5), gloo(1, 2)])
    with pytest.raises(ValueError, match="layer 3: ranks saw different exchanges"):
        read([pair[1], fewer])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents": []}',
        '{"distributedInfo": {"rank": 2, "world_size": 2}, "traceEvents": []}',
        '{"distributedInfo": {"rank": "0", "world_size": 1}, "traceEvents": []}',
        '{"distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": [{"ph": "X", "name": "x"}]}',
        '{"distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": [{"ph":"X","name":"x","ts":NaN,"dur":1}]}',
        '{"distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": [{"ph":"X","name":"x","ts":1,"dur":-1}]}',
        '{"distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": [3]}',
    ],
)
def test_what_is_no_trace_is_named(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json' is no profiler trace of a rank"):
        read([path])
    with pytest.raises(ValueError, match=r"absent\.json.gz' is no profiler trace"):
        read([tmp_path / "absent.json.gz"])
