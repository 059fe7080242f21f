"""What other programs dump becomes the same trace, whichever way it came."""

import base64
import io
import json
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_lab import RouterConfig, RoutingTrace
from moe_lab.cli import main
from moe_lab.layer.router import route
from moe_lab.study.compare import reproduced
from moe_lab.study.files import read_logits, read_routed_experts
from moe_lab.study.history import step_counts
from moe_lab.study.importers import from_routed_experts
from moe_lab.study.megatron import megatron_parts
from moe_lab.study.writer import write_trace

E, K, T = 8, 2, 12
SIGMOID = RouterConfig(score_func="sigmoid", route_norm=True)


def logits_of(layers=2, tokens=T):
    return [torch.randn(tokens, E) for _ in range(layers)]


# router logits


def test_logits_are_routed_as_configured():
    logits = logits_of()
    bias_LE = torch.randn(2, E)
    trace = RoutingTrace.from_router_logits(logits, SIGMOID, K, expert_bias_LE=bias_LE, layers=(3, 7))
    assert trace.info.layers == (3, 7)
    for i in range(2):
        expected = route(logits[i], SIGMOID, K, expert_bias_E=bias_LE[i])
        assert torch.equal(trace.expert_ids_LTK[i].long(), expected.expert_ids_TK)
        assert torch.equal(trace.gates_LTK[i], expected.gates_TK.half())


def test_an_attention_mask_makes_documents_and_padding():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    trace = RoutingTrace.from_router_logits(logits_of(), RouterConfig(), K, valid=mask)
    assert trace.document_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert trace.position_T.tolist() == [0, 1, 2, 3] * 3
    assert trace.counts_LE.sum(dim=1).tolist() == [10 * K] * 2
    named = RoutingTrace.from_router_logits(logits_of(), RouterConfig(), K, valid=mask, step=7, rank=1, micro_batch=0)
    assert [(d.step, d.rank, d.micro_batch) for d in named.info.documents] == [(7, 1, 0)] * 3
    folded = RoutingTrace.from_router_logits([x.view(3, 4, E) for x in logits_of()], RouterConfig(), K)
    assert folded.document_T.tolist() == trace.document_T.tolist()


def test_layers_stacked_in_one_tensor_are_layers():
    logits = logits_of()
    one, other = (RoutingTrace.from_router_logits(x, RouterConfig(), K) for x in (torch.stack(logits), logits))
    assert torch.equal(one.expert_ids_LTK, other.expert_ids_LTK)


@pytest.mark.parametrize(
    ("logits", "fields", "message"),
    [
        ([], {}, "logits must be a non-empty sequence"),
        ([torch.zeros(3)], {}, "logits must be a non-empty sequence"),
        ([torch.zeros(3, E), torch.zeros(4, E)], {}, "logits of layers differ in shape"),
        ([torch.zeros(3, E), torch.full((3, E), torch.nan)], {}, "layer 1: logits of token 0 are not finite"),
        ([torch.full((3, E), 1e5)], {}, "not finite in float16"),
        ([torch.zeros(3, E)], {"valid": torch.ones(4)}, r"valid \(4,\) does not fit logits \(3, 8\)"),
        ([torch.zeros(3, E)], {"valid": torch.tensor([0.0, 0.0, -1e9])}, r"valid holds -1e\+09: .* take valid == 0"),
        ([torch.zeros(3, E)], {"layers": (1, 2)}, "expert_ids_LTK has shape"),
        ([torch.zeros(3, E)], {"expert_bias_LE": torch.zeros(2, E)}, "expert_bias_LE has 2 layers"),
    ],
)
def test_logits_that_make_no_trace_are_refused(logits, fields, message):
    with pytest.raises(ValueError, match=message):
        RoutingTrace.from_router_logits(logits, RouterConfig(), K, **fields)


def test_logits_are_read_from_files(tmp_path):
    logits, mask = logits_of(), torch.ones(2, T // 2)
    torch.save(tuple(logits), tmp_path / "tuple.pt")
    torch.save({"router_logits": torch.stack(logits), "attention_mask": mask}, tmp_path / "dict.pt")
    save_file({f"model.layers.{10 - i}.logits": x for i, x in enumerate(logits)}, tmp_path / "layers.safetensors")
    assert all(map(torch.equal, read_logits(tmp_path / "tuple.pt")[0], logits))
    got, got_mask = read_logits(tmp_path / "dict.pt")
    assert all(map(torch.equal, got, logits))
    assert torch.equal(got_mask, mask)
    assert all(map(torch.equal, read_logits(tmp_path / "layers.safetensors")[0], logits[::-1]))


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name in ("bomb.pt", "bomb.pth"):
        torch.save([Bomb()], tmp_path / name)
        for read in (read_logits, read_routed_experts):
            with pytest.raises(ValueError, match="cannot be read"):
                read(tmp_path / name)
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_routed_experts(tmp_path / "bomb.npy")
    assert not (tmp_path / "executed").exists()


# ids of servers


def sequences_of(*lengths, layers=3):
    return [torch.rand(n, layers, E).topk(K).indices.numpy().astype(np.int16) for n in lengths]


def test_routed_experts_become_documents():
    sequences = sequences_of(4, 0, 3)
    trace = from_routed_experts(sequences, E, layers=(0, 2))
    assert trace.info.layers == (0, 2)
    assert trace.document_T.tolist() == [0] * 4 + [2] * 3
    assert trace.gates_LTK is None
    assert np.array_equal(trace.expert_ids_LTK[1].numpy(), np.concatenate(sequences)[:, 2])


def test_padding_of_routed_experts_counts_nowhere():
    sequences = sequences_of(3, 2)
    trace = from_routed_experts(sequences, E, valid=[torch.tensor([True, False, True]), np.array([False, True])])
    assert trace.valid_T.tolist() == [True, False, True, False, True]
    assert trace.counts_LE.sum(dim=1).tolist() == [3 * K] * 3


@pytest.mark.parametrize(
    ("sequences", "fields", "message"),
    [
        ([], {}, "sequences must be integer arrays"),
        (
            sequences_of(2),
            {"valid": [np.array([True])]},
            r"valid must be a mask \(tokens,\) for each of the 1 sequences",
        ),
        ([np.zeros((2, 3), int)], {}, "integer arrays"),
        ([np.zeros((2, 3, 2))], {}, "integer arrays"),
        ([*sequences_of(2), *sequences_of(2, layers=2)], {}, "differ in layers or K"),
        ([np.full((1, 1, 2), 8)], {}, "expert id 8 is not from 0 to 7"),
        ([np.full((1, 1, 2), -2)], {}, "expert id -2"),
        ([np.zeros((5, 2, 2), int)], {}, "layer 0 sends every token's 2 choices to expert 0: a dense layer"),
        (sequences_of(2), {"layers": (3,)}, r"layers=\(3,\) must be from 0 to 2"),
    ],
)
def test_ids_that_make_no_trace_are_refused(sequences, fields, message):
    with pytest.raises(ValueError, match=message):
        from_routed_experts(sequences, E, **fields)


def test_routed_experts_are_read_from_files(tmp_path):
    first, second = sequences_of(4, 3)
    np.save(tmp_path / "one.npy", first)
    np.savez(tmp_path / "two.npz", a=first, b=second)
    torch.save([torch.from_numpy(first)], tmp_path / "list.pt")
    packed = io.BytesIO()
    np.save(packed, second)
    vllm = {
        "prompt_routed_experts": first.tolist(),
        "choices": [{"routed_experts": base64.b64encode(packed.getvalue()).decode()}, {"routed_experts": None}],
    }
    sglang = {"choices": [{"sgl_ext": {"routed_experts": base64.b64encode(first.astype("<i4").tobytes()).decode()}}]}
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(vllm)}\n\n{json.dumps(sglang)}\n")
    got = read_routed_experts(tmp_path / "answers.jsonl", num_layers=3, top_k=K)
    for ids, expected in zip(got, [first, second, first], strict=True):
        assert np.array_equal(ids.numpy(), expected)
    assert np.array_equal(read_routed_experts(tmp_path / "one.npy")[0].numpy(), first)
    assert [len(ids) for ids in read_routed_experts(tmp_path / "two.npz")] == [4, 3]
    assert np.array_equal(read_routed_experts(tmp_path / "list.pt")[0].numpy(), first)
    with pytest.raises(ValueError, match="bare int32: num_layers and top_k must be given"):
        read_routed_experts(tmp_path / "answers.jsonl")


# Megatron-Core


def write_rank(folder, rank, *, steps=2, forwards=2, layers=(1, 3), tokens=5, logits=True):
    """A rank's files as the tracer writes them: ids by expert number, a record a step, layer and forward."""
    offset, lines, blob, kept = 0, [], b"", {}
    for step in range(steps):
        for forward in range(forwards):
            for layer in layers:
                logits_TE = torch.randn(tokens, E)
                ids_TK = route(logits_TE, RouterConfig(), K).expert_ids_TK
                kept[step, forward, layer] = ids_TK, logits_TE.bfloat16()
                record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
                record |= {"num_tokens": tokens, "topk": K, "top_indices": ids_TK.sort(dim=1).values.tolist()}
                if logits:
                    content = logits_TE.bfloat16().view(torch.int16).numpy().tobytes()
                    record |= {"logit_offset": offset, "logit_bytes": len(content), "logit_shape": [tokens, E]}
                    blob, offset = blob + content, offset + len(content)
                lines.append(json.dumps(record))
        lines.append(json.dumps({"step": step, "block": "mtp", "layer": 1, "mtp_idx": 0, "rank": rank}))
    (folder / f"router_trace_rank{rank}.jsonl").write_text("\n".join(lines) + "\n")
    if logits:
        (folder / f"logits_rank{rank}.bin").write_bytes(blob)
    return kept


def test_megatron_ids_are_kept_and_what_logits_say_is_reported(tmp_path):
    kept = {rank: write_rank(tmp_path, rank) for rank in (0, 11)}
    trace = RoutingTrace.concatenate(list(megatron_parts(tmp_path)))
    assert trace.info.layers == (1, 3)
    assert trace.domains == ("rank 0", "rank 11")
    assert trace.info.documents[1].name == "rank 0/step 0/forward 1"
    assert [(d.rank, d.step, d.micro_batch) for d in trace.info.documents] == list(product((0, 11), (0, 1), (0, 1)))
    part = trace.select(step=1, rank=11)
    assert part.num_tokens == 10
    assert torch.equal(part.select(micro_batch=1).expert_ids_LTK, trace.select(document=7).expert_ids_LTK)
    counts = step_counts(trace)
    assert (counts.steps, counts.layers, counts.ranks) == ((0, 1), (1, 3), (0, 11))
    assert torch.equal(counts.select(step=1, rank=11).counts_LE, part.counts_LE)
    assert torch.equal(counts.counts_LE, trace.counts_LE)
    assert trace.num_tokens == 2 * 2 * 2 * 5
    again = []
    for document, (rank, step, forward) in enumerate((r, s, f) for r in (0, 11) for s in range(2) for f in range(2)):
        part = trace.select(document=document)
        for i, layer in enumerate((1, 3)):
            ids_TK, logits_TE = kept[rank][step, forward, layer]
            got_TK = part.expert_ids_LTK[i].long()
            assert torch.equal(got_TK.sort(dim=1).values, ids_TK.sort(dim=1).values)
            assert torch.equal(part.logits_LTE[i], logits_TE.half())
            scores_TE = logits_TE.float().softmax(dim=1)
            torch.testing.assert_close(part.gates_LTK[i].float(), scores_TE.gather(1, got_TK), rtol=1e-3, atol=1e-4)
            rerouted_TK = route(logits_TE.float(), RouterConfig(), K).expert_ids_TK
            again.append([len(set(a) & set(b)) for a, b in zip(ids_TK.tolist(), rerouted_TK.tolist())])
    share = torch.tensor(again).view(8, 2, 5).sum(dim=(0, 2)) / (40 * K)
    assert torch.allclose(reproduced(trace), share.double())


def test_ids_that_logits_do_not_explain_are_still_kept(tmp_path):
    write_rank(tmp_path, 0)
    path = tmp_path / "router_trace_rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines:
        if "top_indices" in record:
            record["top_indices"] = [[(a + 1) % E, (b + 1) % E] for a, b in record["top_indices"]]
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    trace = RoutingTrace.concatenate(list(megatron_parts(tmp_path)))
    wanted = {frozenset(ids) for record in lines if record.get("layer") == 3 for ids in record["top_indices"]}
    assert {frozenset(ids) for ids in trace.layer(3).expert_ids_LTK[0].tolist()} == wanted
    assert float(reproduced(trace).max()) < 0.6


def test_megatron_without_logits_needs_to_know_the_experts(tmp_path):
    write_rank(tmp_path, 0, logits=False)
    with pytest.raises(ValueError, match="num_experts must be given"):
        list(megatron_parts(tmp_path))
    trace = RoutingTrace.concatenate(list(megatron_parts(tmp_path, num_experts=E)))
    assert trace.logits_LTE is None
    assert trace.num_tokens == 20


def test_a_dumped_state_gives_the_bias_and_the_score_function(tmp_path):
    write_rank(tmp_path, 0)
    bias_LE = torch.randn(2, E)
    state = {
        layer: {"weight": torch.zeros(E, 4), "expert_bias": bias_E, "score_function": "sigmoid", "topk": K}
        for layer, bias_E in zip((1, 3), bias_LE)
    }
    torch.save(state, tmp_path / "router_state_rank0.pt")
    part = next(megatron_parts(tmp_path))
    assert torch.equal(part.expert_bias_LE, bias_LE)
    assert part.info.router == RouterConfig(score_func="sigmoid")
    assert next(megatron_parts(tmp_path, router=RouterConfig())).info.router == RouterConfig()
    torch.save({1: {"expert_bias": torch.zeros(3)}}, tmp_path / "router_state_rank0.pt")
    with pytest.raises(ValueError, match="router_state: expert_bias of"):
        next(megatron_parts(tmp_path))
    torch.save([1], tmp_path / "router_state_rank0.pt")
    with pytest.raises(ValueError, match=r"router_state_rank0.pt must hold a dict by layer"):
        next(megatron_parts(tmp_path))


def test_forwards_of_one_step_are_alike(tmp_path):
    write_rank(tmp_path, 0, steps=1, forwards=2, logits=False)
    path = tmp_path / "router_trace_rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines[:2]:
        record["topk"], record["top_indices"] = 1, [ids[:1] for ids in record["top_indices"]]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="step 0: forwards differ in topk or logits"):
        list(megatron_parts(tmp_path, num_experts=E))


def test_ranks_of_other_pipeline_stages_are_refused(tmp_path):
    write_rank(tmp_path, 0)
    write_rank(tmp_path, 1, layers=(5, 6))
    with pytest.raises(ValueError, match=r"rank 1 holds layers \(5, 6\).*choose ranks= of one pipeline stage"):
        list(megatron_parts(tmp_path))
    assert next(megatron_parts(tmp_path, ranks=[1])).info.layers == (5, 6)
    with pytest.raises(ValueError, match=r"ranks=\[2\] have no file"):
        list(megatron_parts(tmp_path, ranks=[2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:40], "rank0.jsonl line 1: "),
        (lambda line: "[" * 20_000, "line 1: "),
        (lambda line: "[1]", "line 1: is not a JSON object"),
        (lambda line: line.replace('"step": 0', '"step": -1'), "line 1: step=-1"),
        (lambda line: line.replace('"num_tokens": 5', '"num_tokens": 6'), r"line 1: top_indices .* shape \(6, 2\)"),
        (lambda line: line.replace('"logit_offset": 0', '"logit_offset": 9999999'), "line 1: logits_rank0.bin ends"),
        (lambda line: line.replace('"logit_bytes": 80', '"logit_bytes": 8'), "line 1: logit_bytes=8 must be 80"),
        (lambda line: line.replace("[5, 8]", "[5, 9]"), "line 1: logit_bytes=80 must be 90"),
        (lambda line: line.replace('"top_indices": [[', '"top_indices": [["1", '), "line 1: top_indices must be"),
        (lambda line: line.replace('"top_indices": [[', '"top_indices": [[0.5, '), "line 1: top_indices must be"),
        (lambda line: line.replace('"layer": 1', '"layer": 4'), "a forward is not whole"),
    ],
)
def test_broken_records_are_named(tmp_path, change, message):
    write_rank(tmp_path, 0, steps=1)
    path = tmp_path / "router_trace_rank0.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([change(first), *rest]))
    with pytest.raises(ValueError, match=message):
        list(megatron_parts(tmp_path))


# writing piece by piece


def test_pieces_are_written_as_one_file(tmp_path):
    write_rank(tmp_path, 0)
    parts = list(megatron_parts(tmp_path))
    write_trace(tmp_path / "out.safetensors", parts)
    loaded, expected = RoutingTrace.load(tmp_path / "out.safetensors"), RoutingTrace.concatenate(parts)
    assert loaded.info == expected.info
    for name in ("expert_ids_LTK", "gates_LTK", "logits_LTE", "document_T", "position_T", "valid_T"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["out.safetensors", "router_trace_rank0.jsonl", "logits_rank0.bin"]
    )


def test_dropped_ids_and_a_bias_survive_the_writer(tmp_path):
    bias_LE = torch.randn(2, E)
    trace = RoutingTrace.from_router_logits(logits_of(), SIGMOID, K, expert_bias_LE=bias_LE)
    ids_LTK = trace.expert_ids_LTK.to(torch.int16)
    ids_LTK[1, 4, 1] = -1
    dropped = trace.unchecked(expert_ids_LTK=ids_LTK, gates_LTK=None)
    whole = trace.unchecked(gates_LTK=None)
    write_trace(tmp_path / "out", [whole, dropped])
    loaded = RoutingTrace.load(tmp_path / "out")
    assert torch.equal(loaded.expert_ids_LTK, torch.cat([trace.expert_ids_LTK.to(torch.int16), ids_LTK], dim=1))
    assert torch.equal(loaded.expert_bias_LE, bias_LE)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    trace = RoutingTrace.from_router_logits(logits_of(), RouterConfig(), K)
    for parts, message in [([trace, trace.layer(0)], "layers of traces differ"), ([], "no trace was appended")]:
        with pytest.raises(ValueError, match=message):
            write_trace(tmp_path / "out", parts)
    assert not list(tmp_path.iterdir())


# the command


def test_the_command_imports_each_kind(tmp_path, capsys):
    write_rank(tmp_path, 0)
    torch.save(tuple(logits_of()), tmp_path / "logits.pt")
    np.save(tmp_path / "ids.npy", sequences_of(6)[0])
    (tmp_path / "counts.csv").write_text("step,expert,count\n0,0,5\n1,3,7\n")
    out = str(tmp_path / "out.safetensors")
    for arguments, said in [
        (["megatron", str(tmp_path)], "ids are as recorded; the recorded logits lead to"),
        (["logits", str(tmp_path / "logits.pt"), "--top-k", "2", "--router", '{"score_func": "sigmoid"}'], "12 tokens"),
        (["ids", str(tmp_path / "ids.npy"), "--num-experts", "8", "--layers", "1"], "6 tokens, top 2 of 8 experts"),
        (["counts", str(tmp_path / "counts.csv"), "--num-experts", "8"], "2 steps, 1 layers, 1 ranks, 8 experts, 12"),
    ]:
        assert main(["import", *arguments, "--out", out]) == 0
        assert said in capsys.readouterr().out
    for arguments, said in [
        (["ids", str(tmp_path / "ids.npy")], "--num-experts is needed"),
        (["logits", str(tmp_path / "logits.pt")], "--top-k is needed"),
        (["logits", str(tmp_path / "none.pt"), "--top-k", "2"], "cannot be read"),
        (["logits", str(tmp_path / "logits.pt"), "--top-k", "2", "--router", '{"top": 1}'], "--router field='top'"),
        (["logits", str(tmp_path / "logits.pt"), "--top-k", "2", "--router", "{"], "--router is not JSON"),
    ]:
        assert main(["import", *arguments, "--out", out]) == 2
        assert said in capsys.readouterr().err
