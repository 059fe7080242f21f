from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_lab.jobs import corpus as job
from moe_lab.jobs.corpus import CorpusConfig, choose
from moe_lab.jobs.corpus_file import FORMAT, Split, gzip_bits_per_byte, load_corpus, save_corpus, save_manifest
from moe_lab.jobs.dedup import WINDOW, seen_windows, thin, window_hashes
from moe_lab.jobs.sources import DOMAINS, Roots, find_source, is_text, list_sources, read_source
from moe_lab.study.trace import Document

SMALL = CorpusConfig(
    total_bytes=60_000, heldout_bytes=2_000, heldout_files=3, train_cap=4_000, heldout_cap=1_500, min_length=200
)


def words(seed: int, length: int = 900) -> str:
    """Text of its own: two seeds share no window of WINDOW bytes."""
    rng = random.Random(seed)
    text = " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(length))
    return text[:length]


def put(file: Path, text: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """An environment with 12 files in each domain."""
    roots = Roots(tmp_path / "stdlib", tmp_path / "site", tmp_path / "share")
    for i in range(12):
        put(roots.stdlib / f"package/module{i}.py", f"# {words(i)}\n")
        put(roots.site / f"torch/include/c10/header{i}.h", f"// {words(100 + i)}\n")
        put(roots.share / f"jupyter/lab/static/{i}.js", f"let a = '{words(200 + i)}'\n")
        put(roots.site / f"numpy/linalg/part{i}.py", f'"""{words(300 + i)}"""\n')
        put(roots.site / f"schemas/{i}.json", json.dumps({"title": words(400 + i)}))
    put(roots.site / "numpy-2.4.6.dist-info/METADATA", "Name: numpy\nVersion: 2.4.6\n\nShort.\n")
    return roots


def names(split: Split) -> set[str]:
    return {document.name for document in split.documents}


# Windows and near duplicates


@given(text=st.binary(max_size=80), window=st.integers(1, 60))
def test_windows_have_equal_hashes_exactly_when_they_are_equal(text: bytes, window: int) -> None:
    hashes = window_hashes(text, window).tolist()
    windows = [text[i : i + window] for i in range(len(text) - window + 1)]
    assert len(hashes) == len(windows)
    assert len(set(zip(windows, hashes))) == len(set(windows)) == len(set(hashes))


def test_a_hash_does_not_depend_on_where_its_window_stands() -> None:
    text = words(0).encode()
    assert window_hashes(text)[123] == window_hashes(text[123 : 123 + WINDOW])[0]


def test_a_window_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        window_hashes(b"text", 0)


@given(
    texts=st.lists(st.binary(max_size=160).map(lambda b: bytes(c % 2 for c in b)), max_size=4),
    others=st.lists(st.binary(max_size=160).map(lambda b: bytes(c % 2 for c in b)), max_size=4),
    repeat=st.booleans(),
)
def test_seen_windows_are_those_that_occur_in_the_others(texts, others, repeat) -> None:
    others = others + [b"between" + text[5:] for text in texts] if repeat else others
    for text, found in zip(texts, seen_windows(texts, others), strict=True):
        expected = [any(text[i : i + WINDOW] in o for o in others) for i in range(len(text) - WINDOW + 1)]
        assert found.tolist() == expected


def test_thin_keeps_the_longer_of_two_that_repeat_each_other_whichever_is_first() -> None:
    short, long, other = words(1, 800).encode(), (words(1, 800) + words(2, 800)).encode(), words(3).encode()
    assert thin([short, other, long], 0.5) == [1, 2]
    assert thin([long, other, short], 0.5) == [0, 1]
    assert thin([short, other, long], 1.0) == [0, 1, 2]


def test_thin_keeps_the_first_of_equal_texts() -> None:
    text = words(1).encode()
    assert thin([text, text, words(2).encode(), text], 0.5) == [0, 2]


def test_thin_finds_a_copy_spread_over_several_longer_texts() -> None:
    a, b, both = words(1), words(2), words(1)[:400] + words(2)[:400]
    assert thin([text.encode() for text in (a, b, both)], 0.5) == [0, 1]


# Sources


def test_sources_are_listed_without_tests_licences_and_copies_of_packages(roots: Roots) -> None:
    for path in ("test/test_json.py", "site-packages/numpy/core.py", "LICENSE.py", "odd:name.py", "notes.txt"):
        put(roots.stdlib / path, words(1))
    found = list(list_sources("python", roots))
    assert found == sorted(f"stdlib:package/module{i}.py" for i in range(12))


def test_an_unknown_domain_is_refused(roots: Roots) -> None:
    with pytest.raises(ValueError, match="domain='rust': expected one of python, cpp"):
        list(list_sources("rust", roots))


def test_docstrings_are_the_english_paragraphs_of_a_module_in_order(roots: Roots) -> None:
    sentence = "This paragraph number {} is English, and long enough to be taken for a sentence."
    source = (
        f'"""{sentence.format("one")}\n\n>>> a_doctest_is_not_prose(1, 2, 3) and neither is what it prints\n"""\n'
        f'class A:\n    """Too short."""\n    if True:\n        def f(self):\n'
        f'            """{sentence.format("two")}\n\n            | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 7.0 |'
        f' 8.0 |\n            """\n\n'
        f'def g():\n    """{sentence.format("three")}\n\n    Permission is hereby granted, free of charge, to any'
        f' person who reads this text.\n    """\n'
        f'NOT_A_DOCSTRING = """{sentence.format("four")}"""\n'
    )
    put(roots.site / "numpy/a.py", source)
    expected = "".join(sentence.format(n) + "\n\n" for n in ("one", "two", "three"))
    assert read_source("docstrings:numpy/a.py", roots) == expected.encode()


def test_a_module_that_does_not_parse_has_no_docstrings(roots: Roots) -> None:
    put(roots.site / "numpy/python2.py", 'print "hello"')
    assert read_source("docstrings:numpy/python2.py", roots) == b""


def test_metadata_parts_into_headers_and_readme(roots: Roots) -> None:
    readme = "This package does one thing, says so in its long description, and leaves it at that."
    put(
        roots.site / "a-1.dist-info/METADATA",
        f"Name: a\r\nLicense: MIT\r\n  folded text\r\n\r\n# A\r\n\r\n{readme}\r\n",
    )
    assert read_source("headers:a-1.dist-info/METADATA", roots) == b"Name: a\nLicense: MIT\n"
    assert read_source("readme:a-1.dist-info/METADATA", roots).strip() == readme.encode()


@pytest.mark.parametrize(
    "name", ["stdlib:../secret", "stdlib:/etc/passwd", "stdlib:a/../../b", "stdlib:", "home:a.py", "a.py", "site:a\0b"]
)
def test_a_name_outside_the_roots_is_refused(roots: Roots, name: str) -> None:
    with pytest.raises(ValueError, match="source name"):
        read_source(name, roots)


def test_a_source_is_found_again_only_while_its_bytes_are_the_same(roots: Roots) -> None:
    file = roots.stdlib / "package/module0.py"
    source = file.read_bytes()
    document = Document("stdlib:package/module0.py", "python", hashlib.sha256(source).hexdigest(), 10, 20)
    assert find_source(document, roots) == source[10:30]
    file.write_bytes(source + b"\n")
    assert find_source(document, roots) is None
    file.unlink()
    assert find_source(document, roots) is None
    with pytest.raises(FileNotFoundError, match=r"stdlib:package/module0\.py"):
        read_source(document.name, roots)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (words(1).encode(), True),
        ("Grüße, Привет, 你好".encode(), True),
        (b"latin \xe9", False),
        (b"binary \x00 text", False),
        (words(1).encode() + b"QUJD" * 60, False),
        (rb"'\x41\x42' = '\u0043', what is left is letters", False),
        (b"3.14159, 2.71828, 1.41421 numbers", False),
        (b'{"version": "1.2.3", "a longer key": "and a longer value"}', True),
    ],
)
def test_text_is_told_from_binary_data_in_disguise(source: bytes, expected: bool) -> None:
    assert is_text(source) is expected


# Choosing


def test_every_domain_is_split_by_file(roots: Roots) -> None:
    corpus = choose(SMALL, roots)
    assert corpus.train.domains == corpus.heldout.domains == DOMAINS
    assert not names(corpus.train) & names(corpus.heldout)
    assert len(names(corpus.train) | names(corpus.heldout)) == 12 * len(DOMAINS)
    for domain in DOMAINS:
        assert sum(d.domain == domain for d in corpus.heldout.documents) == SMALL.heldout_files
    assert corpus.about["overlap"] == dict.fromkeys(DOMAINS, 0.0)
    assert corpus.about["versions"]["numpy"] == "2.4.6"


def test_every_document_is_found_again(roots: Roots) -> None:
    corpus = choose(SMALL, roots)
    for split in (corpus.train, corpus.heldout):
        assert len(split.documents) == len(list(split.texts()))
        for document, text in zip(split.documents, split.texts(), strict=True):
            assert find_source(document, roots) == text


def test_the_choice_follows_from_content_and_seed(roots: Roots, tmp_path: Path) -> None:
    corpus = choose(SMALL, roots)
    assert choose(SMALL, roots).about == corpus.about
    assert torch.equal(choose(SMALL, roots).train_U8, corpus.train_U8)
    (roots.stdlib / "package").rename(roots.stdlib / "renamed")
    assert torch.equal(choose(SMALL, roots).train_U8, corpus.train_U8)
    assert not torch.equal(choose(replace(SMALL, seed=1), roots).heldout_U8, corpus.heldout_U8)


def test_equal_files_count_once(roots: Roots) -> None:
    before = choose(SMALL, roots)
    for i in range(12):
        put(roots.stdlib / f"vendored/module{i}.py", (roots.stdlib / f"package/module{i}.py").read_bytes())
    after = choose(SMALL, roots)
    assert names(after.train) == names(before.train)
    assert torch.equal(after.heldout_U8, before.heldout_U8)


def test_near_duplicates_are_on_one_side_only(roots: Roots) -> None:
    for i in range(12):
        text = (roots.stdlib / f"package/module{i}.py").read_text()
        put(roots.stdlib / f"package/near{i}.py", text[:600] + words(500 + i, 200))
    corpus = choose(SMALL, roots)
    python = {n for n in names(corpus.train) | names(corpus.heldout) if n.startswith("stdlib:")}
    assert python == {f"stdlib:package/module{i}.py" for i in range(12)}


def test_heldout_text_that_repeats_another_domain_is_trained_on(roots: Roots) -> None:
    for i in range(12):
        text = (roots.share / f"jupyter/lab/static/{i}.js").read_text()
        put(roots.site / f"torch/include/c10/header{i}.h", text + words(600 + i, 2_000))
    corpus = choose(replace(SMALL, total_bytes=200_000), roots)
    heldout = list(corpus.heldout.texts())
    assert all(found.mean() <= SMALL.max_overlap for found in seen_windows(heldout, corpus.train.texts()))
    javascript = {f"share:jupyter/lab/static/{i}.js" for i in range(12)}
    assert javascript <= names(corpus.train) | names(corpus.heldout)
    assert len(javascript & names(corpus.heldout)) < SMALL.heldout_files


def test_the_overlap_left_is_counted_in_windows(roots: Roots) -> None:
    banner = "/* " + words(700, 150) + " */\n"
    for i in range(12):
        file = roots.site / f"torch/include/c10/header{i}.h"
        put(file, banner + file.read_text())
    corpus = choose(SMALL, roots)
    trained = b"\n".join(corpus.train.texts())
    windows = [t[i : i + WINDOW] for t in corpus.heldout.texts("cpp") for i in range(len(t) - WINDOW + 1)]
    assert corpus.about["overlap"]["cpp"] == pytest.approx(sum(w in trained for w in windows) / len(windows), abs=1e-12)
    assert 0.1 < corpus.about["overlap"]["cpp"] < 0.2


def test_caps_cut_at_whole_characters(roots: Roots) -> None:
    for i in range(12):
        put(roots.stdlib / f"package/module{i}.py", "x" + words(i, 1_000) + "é" * 4_000)
    corpus = choose(replace(SMALL, max_repeated=1.0, max_overlap=1.0), roots)
    for split, cap in ((corpus.train, SMALL.train_cap), (corpus.heldout, SMALL.heldout_cap)):
        texts = list(split.texts("python"))
        assert max(map(len, texts)) == cap - 1
        assert all(text.decode() for text in texts)


def test_what_a_small_domain_cannot_use_goes_to_the_others(roots: Roots) -> None:
    for i in range(4, 12):
        (roots.site / f"schemas/{i}.json").unlink()
    for i in range(12):
        for text, file in ((900, f"torch/include/more{i}.h"), (901, f"torch/include/most{i}.h")):
            put(roots.site / file, words(1_000 * text + i))
    corpus = choose(replace(SMALL, total_bytes=40_000), roots)
    sizes = {domain: len(corpus.train.domain(domain)) for domain in DOMAINS}
    assert sizes["data"] < 2_000
    others = [size for domain, size in sizes.items() if domain != "data"]
    assert max(others) - min(others) < SMALL.min_length
    assert 40_000 - 4 * SMALL.min_length <= len(corpus.train_U8) + len(corpus.heldout_U8) <= 40_000


def test_an_empty_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 files to train on, 0 to hold out"):
        choose(SMALL, Roots(tmp_path, tmp_path, tmp_path))


@pytest.mark.parametrize(("field", "value"), [("total_bytes", 0), ("heldout_cap", -1), ("max_overlap", 1.5)])
def test_a_config_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        replace(SMALL, **{field: value})


# The file


def test_a_corpus_is_loaded_as_it_was_saved(roots: Roots, tmp_path: Path) -> None:
    corpus = choose(SMALL, roots)
    save_corpus(corpus, tmp_path / "a.safetensors")
    save_corpus(corpus, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_corpus(tmp_path / "a.safetensors")
    assert loaded.about == corpus.about
    for before, after in ((corpus.train, loaded.train), (corpus.heldout, loaded.heldout)):
        assert after.documents == before.documents
        assert torch.equal(after.text_B, before.text_B)
        assert torch.equal(after.starts_F1, before.starts_F1)


def test_a_domain_is_its_texts_end_to_end(roots: Roots) -> None:
    train = choose(SMALL, roots).train
    for domain in DOMAINS:
        assert train.domain(domain).numpy().tobytes() == b"".join(train.texts(domain))
    assert len(train.domain("rust")) == 0


def test_a_file_that_is_cut_or_changed_is_refused(roots: Roots, tmp_path: Path) -> None:
    path = tmp_path / "corpus.safetensors"
    save_corpus(choose(SMALL, roots), path)
    whole = path.read_bytes()
    broken = [whole[: len(whole) * i // 20] for i in range(20)] + [whole[:-1], whole + b"x"]
    flipped = bytearray(whole)
    flipped[-5_000] ^= 1
    for content in (*broken, bytes(flipped), b"not a corpus at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole corpus file"):
            load_corpus(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"train": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="its format is None, expected 'moe_lab corpus 1'"):
        load_corpus(tmp_path / "weights.safetensors")
    document = {"name": "site:a", "domain": "cpp", "sha256": "", "offset": 0, "length": 3}
    split = {"sha256": hashlib.sha256(bytes(3)).hexdigest(), "documents": [document]}
    shown = {"format": FORMAT, "about": {}, "train": split, "heldout": split}
    tensors = {f"{key}{end}": torch.zeros(3) for key in ("train", "heldout") for end in ("", "_starts")}
    save_file(tensors, tmp_path / "floats.safetensors", metadata={"corpus": json.dumps(shown)})
    with pytest.raises(ValueError, match=r"its text and starts are torch\.float32"):
        load_corpus(tmp_path / "floats.safetensors")
    with pytest.raises(FileNotFoundError):
        load_corpus(tmp_path / "missing.safetensors")


def test_a_split_that_does_not_fit_together_is_refused() -> None:
    a, b = Document("site:a", "cpp", "", 0, 2), Document("site:b", "data", "", 0, 1)
    text_B = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert Split(text_B, torch.tensor([0, 2, 3]), (a, b)).text(1) == b"\x03"
    with pytest.raises(ValueError, match="starts_F1: 3 starts over 3 bytes do not fit"):
        Split(text_B, torch.tensor([0, 1, 3]), (a, b))
    with pytest.raises(ValueError, match="must be next to each other"):
        Split(torch.zeros(5, dtype=torch.uint8), torch.tensor([0, 2, 3, 5]), (a, b, a))


def test_the_manifest_lists_every_file_by_its_hash(roots: Roots, tmp_path: Path) -> None:
    corpus = choose(SMALL, roots)
    save_manifest(corpus, tmp_path / "manifest.json")
    shown = json.loads((tmp_path / "manifest.json").read_text())
    assert shown["about"] == corpus.about
    for key, split in (("train", corpus.train), ("heldout", corpus.heldout)):
        listed = [(*row, domain) for domain, rows in shown[key]["documents"].items() for row in rows]
        assert listed == [(d.sha256, d.length, d.name, d.domain) for d in split.documents]
        assert shown[key]["sha256"] == hashlib.sha256(b"".join(split.texts())).hexdigest()


def test_gzip_is_counted_file_by_file() -> None:
    texts = [b"a" * 1_000, b"a" * 1_000, bytes(range(256))]
    documents = tuple(
        Document(f"site:{i}", domain, "", 0, len(text))
        for i, (domain, text) in enumerate(zip(("cpp", "cpp", "data"), texts))
    )
    split = Split(
        torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), torch.tensor([0, 1000, 2000, 2256]), documents
    )
    small, large = (8 * len(gzip.compress(text, 9, mtime=0)) for text in (texts[0], texts[2]))
    assert gzip_bits_per_byte(split) == {
        "cpp": 2 * small / 2000,
        "data": large / 256,
        "all": (2 * small + large) / 2256,
    }


def test_the_command_writes_both_files_and_prints_a_row_per_domain(roots, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Roots, "installed", classmethod(lambda cls: roots))
    monkeypatch.setattr(job, "CorpusConfig", lambda seed: replace(SMALL, seed=seed))
    monkeypatch.setattr(job.CorpusConfig, "seed", 0, raising=False)
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    out, manifest = tmp_path / "corpus.safetensors", tmp_path / "manifest.json"
    job.main(parser.parse_args(["--out", str(out), "--manifest", str(manifest), "--seed", "3"]))
    corpus = load_corpus(out)
    assert corpus.about["config"]["seed"] == 3
    assert json.loads(manifest.read_text())["about"] == corpus.about
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:7]] == [*DOMAINS, "all"]
    assert all(row[1] == "9" and row[3] == "3" for row in rows[1:6])
    assert rows[6][1] == "45"


def test_this_environment_has_text_in_every_domain() -> None:
    roots = Roots.installed()
    for domain in DOMAINS:
        name = next(list_sources(domain, roots))
        assert isinstance(read_source(name, roots), bytes)
