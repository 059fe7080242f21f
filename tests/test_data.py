"""What ships is what its README says: sizes, provenance, and a model that still decides as it was recorded."""

import hashlib
import json

import pytest
import torch

from moe_lab import data
from moe_lab.jobs.record import page_passages, record_passages

LM = json.loads((data.root() / "lm" / "training.json").read_text())


@pytest.fixture(scope="module")
def lm():
    return data.load_lm()


def test_sizes_stay_small():
    shards = [path.stat().st_size for path in (data.root() / "lm").glob("*.safetensors")]
    assert max(shards) <= 16e6
    assert sum(shards) <= 24e6
    traces = {name: data.path(name).stat().st_size for name in data.names()}
    assert sum(size for name, size in traces.items() if name.startswith("balanced")) <= 8e6


def test_traces_open_by_name_and_unknown_names_list_the_known():
    assert {"balanced", "balanced_wide", "balanced_pages", "unbalanced"} <= set(data.names())
    for name in data.names():
        trace = data.open(name)
        assert (trace.num_layers, trace.num_experts, trace.top_k) == (6, 32, 4)
        assert set(trace.domains) == {"python", "cpp", "javascript", "prose", "data"}
    with pytest.raises(ValueError, match="'nonsense' is not shipped: choose one of balanced, "):
        data.open("nonsense")


def test_results_are_found_in_a_checkout_and_in_a_package(tmp_path, monkeypatch):
    assert data.result("gloo_exchange.json").is_file()
    with pytest.raises(ValueError, match=r"'nonsense' is not shipped: choose one of .*gloo_exchange\.json"):
        data.result("nonsense")
    (tmp_path / "_data" / "results").mkdir(parents=True)
    (tmp_path / "_data" / "results" / "times.json").write_text("{}")
    monkeypatch.setattr(data, "root", lambda: tmp_path / "_data")
    assert data.result("times.json") == tmp_path / "_data" / "results" / "times.json"


def test_pages_are_the_text_that_was_recorded():
    for document in data.open("balanced_pages").info.documents:
        text = (data.root() / "pages" / document.name.removeprefix("pages:")).read_bytes()
        assert document.sha256 == hashlib.sha256(text).hexdigest(), document.name
        assert document.length == len(text)


def test_recorded_documents_are_held_out():
    corpus = json.loads((data.root() / "corpus.json").read_text())
    hashes = {
        split: {row[0] for rows in corpus[split]["documents"].values() for row in rows}
        for split in ("train", "heldout")
    }
    recorded = {
        d.sha256 for name in ("balanced", "balanced_wide", "unbalanced") for d in data.open(name).info.documents
    }
    assert recorded <= hashes["heldout"]
    assert not recorded & hashes["train"]


@pytest.mark.slow
def test_the_shipped_model_decides_as_it_was_recorded(lm):
    recorded = data.open("balanced_pages")
    again = record_passages(lm, page_passages(data.root() / "pages"), name=recorded.info.model, source="data/pages")
    # Logits were stored as float16, one rounding of 2^-11; float32 sums of another CPU add far less.
    bound = recorded.logits_LTE.float().abs() * 2**-10 + 2e-3
    assert ((again.logits_LTE.float() - recorded.logits_LTE.float()).abs() <= bound).all()
    for layer, bias_E in enumerate(recorded.expert_bias_LE):
        assert torch.equal(bias_E, lm.moe_layers[layer].expert_bias_E)
    same = (again.expert_ids_LTK == recorded.expert_ids_LTK).float().mean()
    assert same >= 0.999  # near ties may fall the other way


def test_training_saw_the_corpus_that_is_listed():
    assert LM["config"]["model"]["moe"]["load_balance_coeff"] == 1e-3
    steps = [json.loads(line) for line in (data.root() / "lm" / "log.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == LM["config"]["steps"]


def test_the_model_beats_gzip_in_every_domain_and_its_experts_name_the_domain():
    report = data.report()
    for domain, bits in report["bits_per_byte"].items():
        assert bits < report["gzip_bits_per_byte"][domain], domain
    corpus = json.loads((data.root() / "corpus.json").read_text())
    for split in ("train", "heldout"):
        assert report["corpus"][f"{split}_sha256"] == corpus[split]["sha256"]
    domains = report["domains"]
    assert domains["by_experts_whitened"]["accuracy"] >= 0.9
    assert domains["by_experts_whitened"]["accuracy"] > domains["by_bytes_whitened"]["accuracy"]
