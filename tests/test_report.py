import argparse
import json

import pytest
import torch

from moe_lab.jobs.corpus_file import Corpus, save_corpus
from moe_lab.jobs.report import domains_report, main, passages
from moe_lab.models.lm import MoELM
from tests.test_lm import TINY
from tests.test_record import make_split


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.setattr("moe_lab.jobs.report.WINDOW", 16)
    texts = {"python": b"def f(x):\n    return x\n", "data": b'{"a": [1, 2], "b": 3}\n'}
    train, heldout = (
        make_split({d: [text * n + bytes([97 + n]) for n in sizes] for d, text in texts.items()})
        for sizes in (range(4, 8), range(8, 11))
    )
    return Corpus(train, heldout, {})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoELM(TINY).eval()


def test_passages_cover_the_beginning_of_each_file(corpus):
    taken = list(passages(corpus.heldout, files=2, length=32, per_file=3))
    assert len(taken) == 2 * 2 * 3
    for document, text_B in taken:
        index = next(i for i, d in enumerate(corpus.heldout.documents) if d.name == document.name)
        whole = corpus.heldout.text(index)
        assert text_B.numpy().tobytes() == whole[document.offset : document.offset + document.length]
        assert document.offset in (0, 32, 64)


def test_bytes_alone_name_texts_of_different_letters(model, corpus):
    report = domains_report(model, corpus, train_files=4, per_file=2)
    assert report["by_bytes"]["accuracy"] == 1
    assert report["by_experts"]["windows"] == report["by_bytes"]["windows"] == 2 * 3 * 2 * (32 // 16)
    assert len(report["byte_explains_by_layer"]) == 2
    # The first layer's router sees a byte and its neighbours through one attention only.
    assert report["byte_explains_by_layer"][0] > 0.3


def test_the_command_writes_the_report(model, corpus, tmp_path, capsys):
    save_corpus(corpus, tmp_path / "corpus.safetensors")
    model.save(tmp_path / "lm")
    arguments = {"corpus": tmp_path / "corpus.safetensors", "lm": tmp_path / "lm", "out": tmp_path / "report.json"}
    main(argparse.Namespace(**arguments, device="cpu", train_files=4, per_file=1))
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert set(report["bits_per_byte"]) == set(report["gzip_bits_per_byte"]) == {"python", "data", "all"}
    assert 7 < report["bits_per_byte"]["all"] < 9  # not trained
    assert report["corpus"]["heldout_sha256"] == corpus.heldout.sha256
