import argparse
import hashlib

import pytest
import torch

from moe_lab.jobs.corpus_file import Corpus, Split, save_corpus
from moe_lab.jobs.evaluate import as_tensor
from moe_lab.jobs.record import PAGES, Passage, heldout_passages, main, page_passages, record_passages
from moe_lab.models.lm import MoELM
from moe_lab.study.trace import Document, RoutingTrace
from tests.test_lm import TINY


def make_split(texts_by_domain: dict[str, list[bytes]]) -> Split:
    texts = [(domain, text) for domain, texts in texts_by_domain.items() for text in texts]
    documents = tuple(
        Document(f"stdlib:{domain}/{i}.txt", domain, hashlib.sha256(text).hexdigest(), 0, len(text))
        for i, (domain, text) in enumerate(texts)
    )
    starts = torch.tensor([0, *(len(text) for _, text in texts)]).cumsum(0)
    return Split(as_tensor(b"".join(text for _, text in texts)), starts, documents)


@pytest.fixture
def split():
    return make_split({d: [bytes([65 + i, 97 + j]) * 40 for j in range(6)] for i, d in enumerate(("python", "cpp"))})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoELM(TINY).eval()


def test_passages_are_spans_of_different_files(split):
    passages = heldout_passages(split, per_domain=4, length=16)
    assert len(passages) == 8
    assert len({p.document.sha256 for p in passages}) == 8
    for document, text_B in passages:
        index = next(i for i, d in enumerate(split.documents) if d.sha256 == document.sha256)
        whole = split.text(index)
        assert text_B.numpy().tobytes() == whole[document.offset : document.offset + 16]


def test_the_hash_of_a_file_places_its_passage(split):
    offsets = {p.document.sha256: p.document.offset for p in heldout_passages(split, per_domain=6, length=16)}
    assert offsets == {d.sha256: int(d.sha256[:8], 16) % (80 - 16 + 1) for d in split.documents}
    assert len(set(offsets.values())) > 6


def test_neighbours_mix_domains(split):
    domains = [p.document.domain for p in heldout_passages(split, per_domain=6, length=16)]
    assert domains != sorted(domains)
    assert domains != sorted(domains, reverse=True)


def test_too_few_files_are_refused_by_domain(split):
    with pytest.raises(ValueError, match="cpp: 6 held-out files of >= 16 bytes, 7 are needed"):
        heldout_passages(split, per_domain=7, length=16)


def test_each_passage_is_read_by_itself(model, split):
    passages = heldout_passages(split, per_domain=2, length=16)
    together = record_passages(model, passages, name="tiny", source="test")
    assert (together.num_tokens, together.num_layers) == (64, 2)
    for i, passage in enumerate(passages):
        alone = record_passages(model, [passage], name="tiny", source="test")
        assert torch.equal(alone.expert_ids_LTK, together.select(document=i).expert_ids_LTK)


def test_there_is_a_page_of_every_domain(tmp_path):
    for name in PAGES.values():
        (tmp_path / name).write_text(f"page {name}")
    passages = page_passages(tmp_path)
    assert [p.document.domain for p in passages] == list(PAGES)
    assert all(isinstance(p, Passage) and p.document.name.startswith("pages:") for p in passages)


def test_the_command_writes_three_traces(model, tmp_path, capsys, monkeypatch):
    texts = {d: [f"{d} {i} ".encode() * 80 for i in range(23)] for d in ("python", "data")}
    save_corpus(Corpus(make_split(texts), make_split(texts), {}), tmp_path / "corpus.safetensors")
    model.save(tmp_path / "lm")
    monkeypatch.setattr("moe_lab.jobs.record.LENGTHS", {"narrow": 16, "wide": 32})
    (tmp_path / "pages").mkdir()
    for name in PAGES.values():
        (tmp_path / "pages" / name).write_text("short page")
    monkeypatch.setattr("moe_lab.data.root", lambda: tmp_path)
    arguments = {"corpus": tmp_path / "corpus.safetensors", "lm": tmp_path / "lm", "out": tmp_path, "name": "mine"}
    main(argparse.Namespace(**arguments))
    shown = capsys.readouterr().out
    sizes = {"mine": 2 * 8 * 16, "mine_wide": 2 * 23 * 32, "mine_pages": 50}
    for name, tokens in sizes.items():
        assert RoutingTrace.load(tmp_path / f"{name}.safetensors").num_tokens == tokens
        assert f"{name}: {tokens:,} tokens" in shown
    assert RoutingTrace.load(tmp_path / "mine_wide.safetensors").logits_LTE is None
