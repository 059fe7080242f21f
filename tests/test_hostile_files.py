"""Broken and hostile files: a clear error or a right answer; never a crash, a hang or an executed pickle."""

import base64
import io
import json
import pickle
import random

import numpy as np
import pytest
import torch

from moe_lab import RoutingTrace
from moe_lab.study.counts import CountsTrace
from moe_lab.study.files import read_logits, read_routed_experts
from moe_lab.study.importers import from_routed_experts
from moe_lab.study.megatron import megatron_parts
from test_importers import E, K, sequences_of, write_rank
from test_trace import make_trace, mutated

HOSTILE = ["", "-1", "1e999", "NaN", "null", "true", '"x"', "[]", "{}", "9" * 40, "0.5", "[" * 3000, "\ud7ff", "\x00"]
EXAMPLES = 250  # of each kind; `make soak` runs ten thousand in all


def broken_text(text, rng):
    """JSON or CSV with characters flipped, cut, doubled or replaced by what breaks readers."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([1, 1, 3, 20]))
        kind = rng.choice(["cut", "double", "hostile", "hostile", "digit", "end"])
        if kind == "cut":
            text = text[:start] + text[end:]
        elif kind == "double":
            text = text[:end] + text[start:end] + text[end:]
        elif kind == "hostile":
            text = text[:start] + rng.choice(HOSTILE) + text[end:]
        elif kind == "digit":
            text = text[:start] + rng.choice("0123456789-,[]{}\"'.") + text[end:]
        else:
            text = text[:start]
    return text


def counts_file(folder, rng):
    records = [{"step": s, "layer": 1, "expert": e, "count": 3 * e + s} for s in range(3) for e in range(4)]
    name, text = rng.choice(
        [
            ("a.json", json.dumps(records)),
            ("a.json", json.dumps({"dims": ["layer", "expert"], "counts": [[1, 2, 3], [4, 5, 6]]})),
            ("a.csv", "\n".join(["step,layer,expert,count", *(",".join(map(str, r.values())) for r in records)])),
        ]
    )
    (folder / name).write_text(broken_text(text, rng), encoding="utf-8")
    trace = CountsTrace.load(folder / name)
    assert int(trace.counts_SLRE.min()) >= 0
    assert trace.counts_SLRE.shape[:3] == (len(trace.steps), len(trace.layers), len(trace.ranks))


def answers_file(folder, rng):
    packed = io.BytesIO()
    np.save(packed, sequences_of(3)[0])
    answer = {
        "prompt_routed_experts": sequences_of(2)[0].tolist(),
        "choices": [{"routed_experts": base64.b64encode(packed.getvalue()).decode()}],
    }
    (folder / "a.jsonl").write_text(broken_text(json.dumps(answer), rng), encoding="utf-8")
    trace = from_routed_experts(read_routed_experts(folder / "a.jsonl", num_layers=3, top_k=K), E)
    assert int(trace.expert_ids_LTK.max()) < E


def megatron_folder(folder, rng):
    if not (folder / "logits_rank0.bin").exists():
        write_rank(folder, 0, steps=2, forwards=2, tokens=3)
        (folder / "intact").write_text((folder / "router_trace_rank0.jsonl").read_text())
    text = (folder / "intact").read_text()
    (folder / "router_trace_rank0.jsonl").write_text(broken_text(text, rng), encoding="utf-8")
    for part in megatron_parts(folder):
        assert int(part.expert_ids_LTK.max()) < E
        assert part.logits_LTE is None or part.logits_LTE.isfinite().all()


def trace_file(folder, rng):
    if not (folder / "intact").exists():
        make_trace().save(folder / "intact")
    (folder / "broken").write_bytes(mutated((folder / "intact").read_bytes(), rng))
    trace = RoutingTrace.load(folder / "broken")
    assert (trace.counts_LE.sum(dim=1) + trace.dropped_L == trace.valid_T.sum() * trace.top_k).all()


def tensor_file(folder, rng):
    if not (folder / "intact.pt").exists():
        torch.save({"router_logits": torch.randn(2, 6, E), "attention_mask": torch.ones(2, 3)}, folder / "intact.pt")
        np.save(folder / "intact.npy", sequences_of(4)[0])
    name, read = rng.choice([("intact.pt", read_logits), ("intact.npy", read_routed_experts)])
    path = folder / f"broken{name[-4:]}" if name.endswith("npy") else folder / "broken.pt"
    path.write_bytes(mutated((folder / name).read_bytes(), rng))
    read(path)


KINDS = {kind.__name__: kind for kind in (counts_file, answers_file, megatron_folder, trace_file, tensor_file)}


def fuzz(kind, folder, examples):
    """Every file is read rightly or refused with a `ValueError`; returns how many were refused."""
    rng, refused = random.Random(0), 0
    for _ in range(examples):
        try:
            KINDS[kind](folder, rng)
        except ValueError:
            refused += 1
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused_or_read_rightly(kind, tmp_path):
    assert fuzz(kind, tmp_path, EXAMPLES) > EXAMPLES / 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_broken_files(kind, tmp_path):
    assert fuzz(kind, tmp_path, 2000) > 200


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.npy", "bomb.npz", "bomb.safetensors", "bomb.json", "bomb.bin"])
def test_a_pickle_under_any_name_is_never_executed(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    for read in (read_logits, read_routed_experts, RoutingTrace.load, CountsTrace.load):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "executed").exists()
