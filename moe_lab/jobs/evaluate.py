"""How well a language model predicts text: bits per byte, every byte scored once with a long context."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from moe_lab.models.lm import VOCAB, MoELM


def as_tensor(text: bytes) -> UInt8[Tensor, " B"]:
    """Bytes as a tensor of their own."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Span(NamedTuple):
    """Bytes `first .. end` of a text, to be scored with the context from `start` on."""

    start: int
    first: int
    end: int


def spans(length: int, max_length: int) -> Iterator[Span]:
    """Cover bytes 1 .. length-1 once each: windows of `max_length` inputs, moved by half, later halves scored."""
    half = max(1, max_length // 2)
    first = 1
    while first < length:
        start = max(0, first - half)
        end = min(length, start + max_length + 1)
        yield Span(start, first, end)
        first = end


@torch.inference_mode()
def bits(
    model: MoELM, texts: Sequence[UInt8[Tensor, " _"]], *, batch: int = 32, progress: bool = True
) -> list[Float[Tensor, " _"]]:
    """Bits that the model needs for each byte of each text, float64; texts do not see each other.

    The first byte, before which there is nothing to read, costs log2(256) = 8. `progress`: a bar on stderr after two
    seconds.
    """
    device = next(model.parameters()).device
    out = [torch.full((len(text_B),), math.log2(VOCAB), dtype=torch.float64) for text_B in texts]
    windows = [(i, span) for i, text_B in enumerate(texts) for span in spans(len(text_B), model.config.max_length)]
    for at in tqdm(
        range(0, len(windows), batch), desc="evaluate", unit="batch", file=sys.stderr, delay=2, disable=not progress
    ):
        chunk = windows[at : at + batch]
        # Padding follows what is scored, so causal attention never sees it, and routing is by token.
        pieces = [texts[i][span.start : span.end].long() for i, span in chunk]
        bytes_BL = nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(device)
        logits_BLV = model(bytes_BL[:, :-1]).float()
        nats_BL = F.cross_entropy(logits_BLV.mT, bytes_BL[:, 1:], reduction="none").double().cpu()
        for (i, (start, first, end)), nats_L in zip(chunk, nats_BL, strict=True):
            out[i][first:end] = nats_L[first - 1 - start : end - 1 - start] / math.log(2)
    return out
