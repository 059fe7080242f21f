import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.jobs.evaluate import as_tensor, bits, spans
from moe_lab.models.lm import MoELM
from tests.test_lm import TINY


@given(length=st.integers(0, 400), max_length=st.integers(1, 64))
def test_every_byte_after_the_first_is_scored_once_within_the_context(length, max_length):
    covered = []
    for start, first, end in spans(length, max_length):
        assert 0 <= start < first < end <= length
        assert end - 1 - start <= max_length
        assert start == 0 or first - start >= max_length // 2  # never with less than half a context
        covered += range(first, end)
    assert covered == list(range(1, length))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoELM(TINY).eval()


def test_bits_are_cross_entropy_with_full_context(model):
    text_B = as_tensor(b"def f(x): return x + 1")
    (bits_B,) = bits(model, [text_B])
    with torch.inference_mode():
        nats_B = F.cross_entropy(model(text_B[None, :-1].long())[0], text_B[1:].long(), reduction="none")
    assert bits_B[0] == 8
    torch.testing.assert_close(bits_B[1:], nats_B.double() / math.log(2), rtol=1e-5, atol=1e-5)


def test_texts_in_one_batch_do_not_change_each_other(model):
    texts = [as_tensor(bytes(range(n))) for n in (1, 90, 7, 33, 200)]
    together = bits(model, texts, batch=3)
    for text_B, bits_B in zip(texts, together, strict=True):
        torch.testing.assert_close(bits(model, [text_B], batch=1)[0], bits_B, rtol=0, atol=1e-5)


def test_a_uniform_model_needs_eight_bits(model):
    torch.nn.init.zeros_(model.head.weight)
    for bits_B in bits(model, [as_tensor(b"abc" * 50), as_tensor(b"z")]):
        torch.testing.assert_close(bits_B, torch.full_like(bits_B, 8))
