"""The examples of the README run as they stand."""

import re
from pathlib import Path

import torch

import moe_lab

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_example_prints_the_decisions(capsys):
    exec(EXAMPLES[0], {})
    assert "score_after_experts" in capsys.readouterr().out


def test_a_trace_of_ones_own_model_is_saved_and_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = moe_lab.MoE(moe_lab.MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2))
    exec(EXAMPLES[1], {"moe_lab": moe_lab, "model": model, "tokens": torch.randn(32, 16)})
    trace = moe_lab.RoutingTrace.load("mine.safetensors")
    assert (trace.num_tokens, trace.num_layers, trace.num_experts) == (32, 1, 4)


def test_every_folder_in_the_table_is_there():
    root = Path(__file__).parent.parent
    folders = re.findall(r"^\| `([^`]+/)`", README, re.MULTILINE)
    assert len(folders) > 5
    assert [folder for folder in folders if not (root / folder).is_dir()] == []


def test_every_picture_is_there():
    root = Path(__file__).parent.parent
    for page in (root / "README.md", root / "data" / "README.md"):
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())
        assert pictures
        assert [picture for picture in pictures if not (page.parent / picture).is_file()] == []
