"""Recording, cutting, rerouting and keeping of traces."""

import dataclasses
import json
import random
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moe_lab import MoE, MoEConfig, RouterConfig
from moe_lab.layer.router import TokenChoiceTopKRouter, route
from moe_lab.study.trace import METADATA_KEY, Document, RoutingTrace, TraceInfo, record

DOCUMENTS = (
    Document("stdlib:json/decoder.py", "python", "a" * 64, 100, 10),
    Document("notes/prose.md", "prose", "", 0, 6),
    Document("stdlib:csv.py", "python", "b" * 64, 0, 8),
)
OWN = RouterConfig(score_func="sigmoid", route_norm=True)


def make_trace(**changes):
    """24 tokens of three documents, layers 2 and 5, top 2 of 8 experts; the last token is padding."""
    generator = torch.Generator().manual_seed(1)
    logits_LTE = torch.randn(2, 24, 8, generator=generator).half()
    bias_LE = torch.randn(2, 8, generator=generator) / 4
    routings = [route(logits_LTE[i].float(), OWN, 2, expert_bias_E=bias_LE[i]) for i in range(2)]
    fields = {
        "info": TraceInfo("tiny", "made up", "none", {"torch": "2"}, OWN, 8, 2, (2, 5), DOCUMENTS),
        "expert_ids_LTK": torch.stack([r.expert_ids_TK for r in routings]).to(torch.uint8),
        "gates_LTK": torch.stack([r.gates_TK for r in routings]).half(),
        "logits_LTE": logits_LTE,
        "expert_bias_LE": bias_LE,
        "document_T": torch.tensor([0] * 10 + [1] * 6 + [2] * 8, dtype=torch.int32),
        "position_T": torch.cat([torch.arange(n) for n in (10, 6, 8)]).int(),
        "valid_T": torch.arange(24) < 23,
    }
    return RoutingTrace(**(fields | changes))


def equal(a, b):
    fields = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(RoutingTrace)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in fields)


class Stack(nn.Module):
    def __init__(self, layers=3, **router):
        super().__init__()
        config = MoEConfig(dim=16, hidden_dim=8, num_experts=8, top_k=2, router=RouterConfig(**router))
        self.layers = nn.ModuleDict({str(i + 1): MoE(config) for i in range(layers)})

    def forward(self, x):
        for layer in self.layers.values():
            x = x + layer(x)
        return x


# cutting


def test_what_it_holds():
    trace = make_trace()
    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (24, 2, 8, 2)
    assert trace.domains == ("python", "prose")
    assert trace.domain_T.tolist() == [0] * 10 + [1] * 6 + [0] * 8
    assert repr(trace) == (
        "RoutingTrace of tiny: 24 tokens, top 2 of 8 experts, layers 2, 5, domains python, prose "
        "(expert_ids, gates, logits)"
    )


def test_counts_are_of_valid_tokens_and_kept_assignments():
    ids_LTK = make_trace().expert_ids_LTK.to(torch.int16)
    ids_LTK[0, 3, 1] = -1
    ids_LTK[0, 23] = -1  # not valid, so not counted as dropped
    trace = make_trace(expert_ids_LTK=ids_LTK, gates_LTK=None)
    expected_LE = torch.zeros(2, 8, dtype=torch.int64)
    for layer in range(2):
        for token in range(23):
            for expert in ids_LTK[layer, token].tolist():
                expected_LE[layer, expert] += expert >= 0
    assert torch.equal(trace.counts_LE, expected_LE)
    assert trace.dropped_L.tolist() == [1, 0]


def test_counts_by_group():
    trace = make_trace()
    group_T = torch.arange(24) % 3 - 1
    counts_LGE = trace.counts_by(group_T, 2)
    for group in range(2):
        part = trace._tokens(group_T == group)
        assert torch.equal(counts_LGE[:, group], part.counts_LE)


def test_select_by_layer_domain_document_and_window():
    trace = make_trace()
    part = trace.select(layer=5, domain="python", start=8, tokens=5)
    assert part.info.layers == (5,)
    assert part.domains == ("python",)
    assert part.document_T.tolist() == [0, 0, 2, 2, 2]
    assert part.position_T.tolist() == [8, 9, 0, 1, 2]
    index_T = torch.tensor([8, 9, 16, 17, 18])
    assert torch.equal(part.expert_ids_LTK, trace.expert_ids_LTK[1:, index_T])
    assert torch.equal(part.expert_bias_LE, trace.expert_bias_LE[1:])
    assert torch.equal(trace.layer(2).logits_LTE, trace.logits_LTE[:1])
    assert torch.equal(trace.domain("prose").position_T, torch.arange(6).int())
    assert trace.select(document=2).num_tokens == 8


def test_ranges_are_views():
    trace = make_trace()
    for part in (trace.layer(2), trace.domain("prose"), trace.select(start=3, tokens=4), next(trace.windows(5))):
        storages = {getattr(t, n).untyped_storage().data_ptr() for t in (trace, part) for n in ("expert_ids_LTK",)}
        assert len(storages) == 1


def test_windows_leave_the_rest_out():
    windows = list(make_trace().windows(10))
    assert [w.num_tokens for w in windows] == [10, 10]
    assert windows[1].document_T.tolist() == [1] * 6 + [2] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 3}, r"layer=3 was not recorded: choose one of \(2, 5\)"),
        ({"domain": "latin"}, "domain='latin' is not here: choose one of python, prose"),
        ({"document": 7}, "document=7"),
        ({"domain": "prose", "document": 0}, "document=0"),
        ({"start": 24}, "start=24"),
        ({"start": -1}, "start=-1"),
        ({"tokens": 0}, "tokens=0"),
        ({"start": 20, "tokens": 5}, "tokens=5 must be an integer from 1 to 4"),
    ],
)
def test_select_refuses_what_is_not_here(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trace().select(**arguments)


def test_windows_refuse_a_window_past_the_end():
    with pytest.raises(ValueError, match="tokens=25"):
        make_trace().windows(25)


# routing


def test_routing_is_what_was_recorded():
    trace = make_trace()
    routing = trace.routing(5)
    assert torch.equal(routing.expert_ids_TK[:23], trace.expert_ids_LTK[1, :23].long())
    assert torch.equal(routing.gates_TK[:23], trace.gates_LTK[1, :23].float())
    assert torch.equal(routing.scores_TE, trace.logits_LTE[1].float().sigmoid())
    assert torch.equal(routing.counts_E, trace.counts_LE[1])
    assert routing.expert_ids_TK[23].tolist() == [-1, -1]
    assert routing.gates_TK[23].tolist() == [0, 0]


def test_routing_without_logits_has_unknown_scores():
    routing = make_trace(logits_LTE=None).routing(2)
    assert routing.logits_TE.shape == (24, 8)
    assert routing.scores_TE.isnan().all()


def test_rerouting_with_the_recorded_settings_gives_the_recorded_choice():
    trace = make_trace()
    for layer in trace.info.layers:
        again, recorded = trace.reroute(layer, OWN, 2), trace.routing(layer)
        assert torch.equal(again.expert_ids_TK, recorded.expert_ids_TK)
        assert torch.allclose(again.gates_TK, recorded.gates_TK, atol=2**-11)
        assert torch.equal(again.counts_E, recorded.counts_E)


def test_rerouting_under_other_settings():
    trace = make_trace(valid_T=torch.ones(24, dtype=torch.bool))
    config = RouterConfig(num_expert_groups=4, num_limited_groups=2)
    logits_TE = trace.logits_LTE[0].float() / 3
    expected = route(logits_TE, config, 3, expert_bias_E=trace.expert_bias_LE[0])
    got = trace.reroute(2, config, 3, temperature=3.0)
    assert got.requested_E is expected.requested_E is None
    for a, b in zip(got[:5], expected[:5]):
        assert torch.equal(a, b)
    unbiased = trace.reroute(2, config, 3, use_bias=False)
    assert torch.equal(unbiased.expert_ids_TK, route(trace.logits_LTE[0].float(), config, 3).expert_ids_TK)
    random = RouterConfig(force_load_balance="random")
    assert torch.equal(trace.reroute(2, random, 3).expert_ids_TK, trace.reroute(2, random, 3).expert_ids_TK)


def test_routing_needs_what_it_uses():
    with pytest.raises(ValueError, match="no gates_LTK"):
        make_trace(gates_LTK=None).routing(2)
    with pytest.raises(ValueError, match="no logits_LTE"):
        make_trace(logits_LTE=None).reroute(2, OWN, 2)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        make_trace().reroute(2, OWN, 2, temperature=0.0)


# validity


def changed(name, change):
    value = getattr(make_trace(), name).clone()
    change(value)
    return value


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("expert_ids_LTK", lambda ids: ids[1, 3].fill_(8), "holds id 8: allowed are 0..7"),
        ("gates_LTK", lambda gates: gates[0, 0].fill_(torch.nan), "gates_LTK holds NaN"),
        ("logits_LTE", lambda logits: logits[0, 0].fill_(torch.inf), "logits_LTE holds NaN or infinity"),
        ("expert_bias_LE", lambda bias: bias[1].fill_(torch.nan), "expert_bias_LE holds NaN"),
        ("document_T", lambda document: document[4:].fill_(3), "document_T holds 3: info has documents 0..2"),
        ("document_T", lambda document: document[4:].fill_(-1), "document_T holds -1"),
        ("position_T", lambda position: position[12:].fill_(6), "position_T of token 12 is 6, outside document"),
        ("position_T", lambda position: position[:2].fill_(-1), "position_T of token 0 is -1"),
    ],
)
def test_values_that_cannot_be_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_trace(**{name: changed(name, change)})


def test_layouts_that_cannot_be_are_refused():
    trace = make_trace()
    cases = {
        "expert_ids_LTK": (trace.expert_ids_LTK.long(), "is torch.int64: must be torch.uint8 or torch.int16"),
        "gates_LTK": (trace.gates_LTK[:, :, :1], r"has shape \(2, 24, 1\): must be \(2, 24, 2\)"),
        "logits_LTE": (trace.logits_LTE.float(), "must be torch.float16"),
        "document_T": (trace.document_T[:3], r"must be \(24,\)"),
        "valid_T": (trace.valid_T.to("meta"), "dense CPU tensor"),
    }
    for name, (value, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            make_trace(**{name: value})


def test_dropped_assignments_have_no_gate():
    ids_LTK = make_trace().expert_ids_LTK.to(torch.int16)
    ids_LTK[0, 3, 1] = -1
    with pytest.raises(ValueError, match="must be 0 where expert_ids_LTK is -1"):
        make_trace(expert_ids_LTK=ids_LTK)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "/etc/passwd", "relative"),
        ("name", "stdlib:../secret", "relative"),
        ("name", "stdlib:/etc/passwd", "relative"),
        ("name", "a\nb", "printable"),
        ("name", "", "non-empty"),
        ("domain", "\ud800", "printable"),
        ("sha256", "abc", "64 hex digits"),
        ("offset", -1, "offset=-1"),
        ("length", 0, "length=0"),
        ("length", 2**31, "length"),
    ],
)
def test_documents_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DOCUMENTS[0], **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", (), "layers"),
        ("layers", (1, 1), "distinct"),
        ("documents", (), "documents"),
        ("num_experts", 2**15, "num_experts"),
        ("top_k", 9, "top_k=9"),
        ("model", "\x1b[2J", "printable"),
    ],
)
def test_info_is_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_trace().info, **{field: value})


# keeping


def test_file_round_trip(tmp_path):
    path = tmp_path / "a trace.safetensors"
    bare = make_trace(gates_LTK=None, logits_LTE=None, expert_bias_LE=None)
    for trace in (make_trace(), bare, make_trace().select(layer=5, domain="python"), make_trace().select(start=3)):
        trace.save(path)
        assert equal(RoutingTrace.load(path), trace)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "trace"
    make_trace().save(path)
    loaded = RoutingTrace.load(path)
    loaded.save(path)
    assert equal(RoutingTrace.load(path), loaded)


def test_concatenating_windows_gives_the_trace_back():
    trace = make_trace()
    assert equal(RoutingTrace.concatenate(list(trace.windows(8))), trace)


def test_concatenating_renumbers_documents():
    trace = make_trace()
    other = dataclasses.replace(
        trace, info=dataclasses.replace(trace.info, documents=DOCUMENTS[::-1]), document_T=2 - trace.document_T
    )
    both = RoutingTrace.concatenate([trace, other])
    assert both.info.documents == DOCUMENTS
    assert torch.equal(both.document_T, torch.cat([trace.document_T] * 2))
    assert torch.equal(both.counts_LE, 2 * trace.counts_LE)


def test_concatenating_refuses_what_differs():
    trace = make_trace()
    for other, message in [
        (trace.layer(2), "layers of traces differ"),
        (make_trace(gates_LTK=None), "gates_LTK is in one trace but not in another"),
        (make_trace(expert_bias_LE=torch.zeros(2, 8)), "expert_bias_LE of traces differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            RoutingTrace.concatenate([trace, other])
    with pytest.raises(ValueError, match="no trace"):
        RoutingTrace.concatenate([])


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="not a readable routing trace"):
        RoutingTrace.load(path)
    with pytest.raises(ValueError, match="not a readable routing trace"):
        RoutingTrace.load(tmp_path)
    for content in (b"", b"{}", b"\x80\x04K\x01.", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable routing trace"):
            RoutingTrace.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="its header has no 'moe_lab_trace'"):
        RoutingTrace.load(path)
    metadata = {METADATA_KEY: make_trace().info.to_json()}
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"unknown tensors \['weight'\]"):
        RoutingTrace.load(path)
    save_file({"valid_T": torch.zeros(3, dtype=torch.bool)}, path, metadata)
    with pytest.raises(ValueError, match="are missing"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": 1e999}',
        '{"format": NaN}',
        '{"format": ' + "9" * 5000 + "}",
        '{"format": 2}',
        '{"format": 1}',
        " " * (2**24 + 1),
    ],
)
def test_hostile_metadata_is_refused(text):
    with pytest.raises(ValueError, match=r"metadata|JSON|Expecting|digits"):
        TraceInfo.from_json(text)


HOSTILE_VALUES = [None, True, -1, 0, 2**70, 10**400, 1e308, "", "x", [], [1], [[1]], {}, {"x": 1}, "9" * 300]


def test_every_field_of_the_metadata_is_checked():
    text = make_trace().info.to_json()
    assert TraceInfo.from_json(text) == make_trace().info
    places = [("format",), *((name,) for name in json.loads(text))]
    places += [("router", name) for name in json.loads(text)["router"]]
    places += [("documents", 0, name) for name in json.loads(text)["documents"][0]] + [("layers", 0), ("documents", 0)]
    refused = 0
    for place in places:
        for value in HOSTILE_VALUES:
            values = json.loads(text)
            inner = values
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                info = TraceInfo.from_json(json.dumps(values))
                assert TraceInfo.from_json(info.to_json()) == info
            except ValueError:
                refused += 1
    assert refused > len(places) * 8


def mutated(content, rng):
    """A file with bytes flipped, cut out, doubled or zeroed, or a header of another length."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        content = content if len(content) > 8 else bytearray(16)
        inside = rng.randrange(len(content) // 2, len(content))
        start = rng.choice([rng.randrange(8), rng.randrange(len(content)), inside, inside, inside])
        size = rng.choice([1, 1, 2, 8, 100])
        kind = rng.choice(["flip", "flip", "flip", "digit", "cut", "double", "zero", "end"])
        if kind == "flip":
            content[start] ^= 1 << rng.randrange(8)
        elif kind == "digit":
            digits = [i for i, byte in enumerate(content[:2000]) if chr(byte).isdigit()]
            content[rng.choice(digits or [0])] = ord(rng.choice("0123456789-,[]"))
        elif kind == "cut":
            del content[start : start + size]
        elif kind == "double":
            content[start:start] = content[start : start + size]
        elif kind == "zero":
            content[start : start + size] = bytes(len(content[start : start + size]))
        else:
            del content[start:]
    return bytes(content)


def test_a_broken_file_gives_an_error_or_a_valid_trace(tmp_path):
    path, again = tmp_path / "broken", tmp_path / "again"
    make_trace().save(path)
    intact = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        path.write_bytes(mutated(intact, rng))
        try:
            trace = RoutingTrace.load(path)
        except ValueError:
            refused += 1
            continue
        assert (trace.counts_LE.sum(dim=1) + trace.dropped_L == trace.valid_T.sum() * trace.top_k).all()
        trace.save(again)
        assert equal(RoutingTrace.load(again), trace)
    assert refused > 200


def test_a_boolean_that_is_neither_is_refused(tmp_path):
    path = tmp_path / "trace"
    make_trace().save(path)
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    begin, _ = header["valid_T"]["data_offsets"]
    content[8 + struct.unpack("<Q", content[:8])[0] + begin] = 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match="valid_T must hold bytes 0 and 1 only"):
        RoutingTrace.load(path)


# recording


@pytest.mark.parametrize("shape", [(12, 16), (2, 6, 16)])
def test_recording_sees_what_the_routers_decided(shape):
    model, x = Stack(score_func="sigmoid", route_norm=True), torch.randn(shape)
    expected = []
    hooks = [
        layer.router.register_forward_hook(lambda m, a, out: expected.append(out)) for layer in model.layers.values()
    ]
    plain = model(x)
    for hook in hooks:
        hook.remove()
    with record(model) as recorder:
        assert torch.equal(model(x), plain)
    trace = recorder.trace(source="noise")
    assert trace.info.model == "Stack"
    assert trace.info.layers == (1, 2, 3)
    assert trace.info.router == RouterConfig(score_func="sigmoid", route_norm=True)
    assert trace.expert_ids_LTK.dtype == torch.uint8
    assert trace.num_tokens == 12
    for i, routing in enumerate(expected):
        assert torch.equal(trace.expert_ids_LTK[i].long(), routing.expert_ids_TK)
        assert torch.equal(trace.gates_LTK[i], routing.gates_TK.half())
        assert torch.equal(trace.logits_LTE[i], routing.logits_TE.half())
    assert not any(layer.router._forward_hooks for layer in model.layers.values())


def test_recording_follows_documents():
    model = Stack()
    with record(model) as recorder:
        recorder.begin(DOCUMENTS[0])
        model(torch.randn(7, 16))
        model(torch.randn(3, 16))
        recorder.begin(DOCUMENTS[1])
        model(torch.randn(5, 16))  # not to its end
        recorder.begin(DOCUMENTS[2], dataclasses.replace(DOCUMENTS[2], offset=8))
        model(torch.randn(2, 8, 16))
    trace = recorder.trace()
    assert trace.document_T.tolist() == [0] * 10 + [1] * 5 + [2] * 8 + [3] * 8
    assert trace.position_T.tolist() == [*range(10), *range(5), *range(8), *range(8)]
    assert trace.domains == ("python", "prose")


def test_documents_can_be_given_at_once():
    model = Stack()
    with record(model, documents=DOCUMENTS) as recorder:
        for part in torch.randn(24, 16).split(9):
            model(part)
    assert torch.equal(recorder.trace().document_T, make_trace().document_T)


def test_without_documents_every_forward_is_one():
    model = Stack()
    with record(model, gates=False, logits=False) as recorder:
        model(torch.randn(4, 16))
        model(torch.randn(2, 16))
    trace = recorder.trace()
    assert [d.length for d in trace.info.documents] == [4, 2]
    assert trace.gates_LTK is None
    assert trace.logits_LTE is None


def test_recording_keeps_the_balancing_bias():
    model = Stack()
    for layer in model.layers.values():
        layer.expert_bias_E.copy_(torch.randn(8))
    with record(model) as recorder:
        model(torch.randn(64, 16))
    trace = recorder.trace()
    assert torch.equal(trace.expert_bias_LE[1], model.layers["2"].expert_bias_E)
    for i, layer in enumerate(trace.info.layers):
        again = trace.reroute(layer, trace.info.router, 2).expert_ids_TK
        assert (again == trace.expert_ids_LTK[i]).float().mean() > 0.98  # float16 logits can flip near ties


def test_what_runs_outside_a_forward_is_not_recorded():
    model = Stack()
    with record(model) as recorder:
        model.layers["1"](torch.randn(3, 16))
    with pytest.raises(ValueError, match="nothing was recorded"):
        recorder.trace()


def test_recomputing_is_not_recorded_twice():
    class Checkpointed(Stack):
        def forward(self, x):
            for layer in self.layers.values():
                x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    model = Checkpointed()
    with record(model) as recorder:
        model(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert recorder.trace().num_tokens == 5


def test_memory_is_bounded():
    model = Stack()
    with record(model, max_tokens=10) as recorder:
        model(torch.randn(8, 16))
        with pytest.raises(ValueError, match="max_tokens=10 is too few: 8 are recorded and 4 more came"):
            model(torch.randn(4, 16))
    assert recorder.trace().num_tokens == 8


def test_hooks_are_removed_after_an_error():
    model = Stack()
    with pytest.raises(KeyError), record(model):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with record(model) as recorder:
        model(torch.randn(12, 16))
    assert recorder.trace().num_tokens == 12


def test_a_forward_that_fails_leaves_nothing_behind():
    model = Stack()
    with record(model) as recorder:
        with pytest.raises(ValueError, match="x is"):
            model(torch.randn(3, 15))
        broken = model.layers["3"].experts
        model.layers["3"].experts = None
        with pytest.raises(AttributeError, match="NoneType"):
            model(torch.randn(3, 16))
        model.layers["3"].experts = broken
        model(torch.randn(4, 16))
    assert recorder.trace().num_tokens == 4


def test_recording_is_not_nested():
    model = Stack()
    with record(model) as recorder:
        with pytest.raises(ValueError, match="being recorded already"), record(model):
            pass
        with pytest.raises(ValueError, match="runs once"), recorder:
            pass
        model(torch.randn(3, 16))
    assert recorder.trace().num_tokens == 3
    with pytest.raises(ValueError, match="runs once"), recorder:
        pass


def test_recording_refuses_models_it_cannot_describe():
    with pytest.raises(ValueError, match="Linear holds nothing to record"):
        record(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="routers differ"):
        record(nn.Sequential(Stack(), Stack(score_func="sigmoid")))
    with pytest.raises(ValueError, match="max_tokens=0"):
        record(Stack(), max_tokens=0)
    model = Stack()
    model.layers["4"] = model.layers["1"]
    with record(model), pytest.raises(ValueError, match="ran twice in one forward"):
        model(torch.randn(3, 16))


def test_recording_refuses_tokens_no_document_announced():
    model = Stack()
    with record(model) as recorder:
        recorder.begin(DOCUMENTS[1])
        with pytest.raises(ValueError, match=r"7 tokens came where begin\(\) announced 6 more"):
            model(torch.randn(7, 16))
        with pytest.raises(ValueError, match="needs documents"):
            recorder.begin()


def test_recording_refuses_a_bias_that_moves():
    model = Stack()
    with record(model):
        model(torch.randn(3, 16))
        model.layers["1"].expert_bias_E[0] += 1
        with pytest.raises(ValueError, match="changed between forwards"):
            model(torch.randn(3, 16))


def test_recording_refuses_logits_beyond_half_precision():
    model = Stack(score_func="sigmoid")
    with record(model), pytest.raises(ValueError, match="not finite in float16"):
        model(torch.full((3, 16), 1e6))


def test_a_trace_recorded_in_inference_mode_is_like_any_other():
    model = Stack()
    with torch.inference_mode(), record(model) as recorder:
        model(torch.randn(6, 16))
    trace = recorder.trace()
    routing = trace.reroute(1, trace.info.router, 2)
    assert torch.equal(routing.counts_E, trace.routing(1).counts_E)
    assert RoutingTrace.concatenate(list(trace.windows(3))).num_tokens == 6


class Detour(Stack):
    """Runs its layers in the order, over the part of the tokens, and as often as told."""

    def __init__(self):
        super().__init__(layers=2)
        self.todo = [("1", 4), ("2", 4)]

    def forward(self, x):
        for name, tokens in self.todo:
            if name == "self":
                self.todo = self.todo[1:]
                self(x)
            else:
                self.layers[name](x[:tokens])
        return x


@pytest.mark.parametrize(
    ("todo", "message"),
    [
        ([("1", 4)], r"routers \['layers.2.router'\] did not run in this forward"),
        ([("1", 4), ("2", 3)], "routers saw different numbers of tokens"),
        ([("2", 4), ("1", 4)], "routers ran in another order"),
    ],
)
def test_recording_refuses_forwards_that_are_not_alike(todo, message):
    model = Detour()
    with record(model) as recorder:
        model(torch.randn(4, 16))
        model.todo = todo
        with pytest.raises(ValueError, match=message):
            model(torch.randn(4, 16))
    assert recorder.trace().num_tokens == 4


def test_recording_refuses_a_model_that_calls_itself():
    model = Detour()
    model.todo = [("self", 0), ("1", 4), ("2", 4)]
    with record(model), pytest.raises(ValueError, match="called inside its own forward"):
        model(torch.randn(4, 16))


def test_an_empty_forward_adds_nothing():
    model = Stack()
    with record(model) as recorder:
        model(torch.randn(0, 16))
        model(torch.randn(2, 16))
    assert recorder.trace().num_tokens == 2


def test_a_router_alone_can_be_recorded():
    router = TokenChoiceTopKRouter(16, 8, 2, RouterConfig())
    with record(router) as recorder:
        routing = router(torch.randn(5, 16))
    trace = recorder.trace()
    assert torch.equal(trace.expert_ids_LTK[0].long(), routing.expert_ids_TK)
    assert trace.expert_bias_LE is None
    assert trace.info.layers == (0,)


def test_forwards_of_a_run_are_fields_that_are_kept_and_cut(tmp_path):
    info = dataclasses.replace(
        make_trace().info,
        documents=tuple(
            dataclasses.replace(d, step=step, rank=1, micro_batch=i)
            for i, (d, step) in enumerate(zip(make_trace().info.documents, (5, 5, 9)))
        ),
    )
    trace = dataclasses.replace(make_trace(), info=info)
    trace.save(tmp_path / "run.safetensors")
    again = RoutingTrace.load(tmp_path / "run.safetensors")
    assert again.info == info
    step = again.select(step=5, rank=1)
    assert set(step.document_T.tolist()) == {0, 1}
    assert torch.equal(step.select(micro_batch=1).expert_ids_LTK, trace.select(document=1).expert_ids_LTK)
    with pytest.raises(ValueError, match=r"step=6 has no tokens here: \[5, 9\] have"):
        again.select(step=6)
    with pytest.raises(ValueError, match="rank=0 has no tokens here"):
        make_trace().select(rank=0)
    with pytest.raises(ValueError, match="document step=-1"):
        dataclasses.replace(info.documents[0], step=-1)
    assert "step" not in make_trace().info.to_json(), "what is not known takes no room"


def test_long_traces_are_counted_and_checked_in_pieces():
    tokens, bad = 2**17 + 5, 2**17 + 3
    logits_TE = torch.zeros(tokens, 3)
    expert_T = torch.arange(tokens) % 3
    trace = RoutingTrace.from_router_logits([logits_TE.scatter(1, expert_T[:, None], 1.0)], RouterConfig(), 1)
    group_T = (torch.arange(tokens) >= 2**17).long()  # the last five are a group of their own
    last_E = expert_T[-5:].bincount(minlength=3)
    assert trace.counts_by(group_T, 2)[0].tolist() == [(expert_T.bincount() - last_E).tolist(), last_E.tolist()]
    position_T = trace.position_T.clone()
    position_T[bad] = tokens
    with pytest.raises(ValueError, match=f"position_T of token {bad} is {tokens}"):
        dataclasses.replace(trace, position_T=position_T)
