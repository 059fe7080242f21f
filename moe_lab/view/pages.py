"""The text behind a trace: traces hold no text, so it is read again where the trace's document says it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from moe_lab import data
from moe_lab.jobs.sources import find_source
from moe_lab.study.choice import Choice
from moe_lab.study.trace import Document, RoutingTrace
from moe_lab.view.tokens import TintedText, byte_pieces

Reader = Callable[[Document], Sequence[bytes] | None]
PAGES = "pages:"


@lru_cache(maxsize=256)
def read_document(document: Document) -> tuple[bytes, ...] | None:
    """A document's tokens, one byte each: a page of ours, or a file of this environment; None when it is neither.

    None too when the file is here in another version.
    """
    if not document.name.startswith(PAGES):
        try:
            text = find_source(document)
        except ValueError:  # a name from elsewhere
            return None
    else:
        page = data.root() / "pages" / document.name.removeprefix(PAGES)
        text = page.read_bytes() if page.is_file() else b""
        text = text if hashlib.sha256(text).hexdigest() == document.sha256 else None
    return None if text is None else byte_pieces(text)


def tint(
    trace: RoutingTrace,
    layer: int,
    *,
    choice: Choice | None = None,
    domain: str | None = None,
    tokens: int = 1000,
    read: Reader = read_document,
) -> TintedText | None:
    """About `tokens` tokens of a domain's first document that can be read, or a part of each domain's.

    None when no document's text is here, or it does not match its tokens. With a `choice`, experts are those that
    it makes of the recorded logits.
    """
    excerpt = _excerpt(trace, domain, tokens, read)
    if excerpt is None:
        return None
    part = excerpt.trace.layer(layer)
    ids_TK, gates_TK = part.expert_ids_LTK[0], None if part.gates_LTK is None else part.gates_LTK[0]
    if choice is not None and choice != Choice.recorded(trace):
        routing = choice.route(part, layer)
        ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
    gates = None if gates_TK is None else gates_TK.numpy()
    return TintedText(trace.info.model, layer, excerpt.pieces, ids_TK.numpy(), gates, excerpt.headings)


class _Excerpt(NamedTuple):
    pieces: tuple[bytes, ...]
    headings: tuple[tuple[int, str], ...]
    trace: RoutingTrace


@lru_cache(maxsize=32)
def _excerpt(trace: RoutingTrace, domain: str | None, tokens: int, read: Reader) -> _Excerpt | None:
    """What is shown, whoever chooses the experts."""
    domains = trace.domains if domain is None else (domain,)
    parts = [part for name in domains if (part := _part(trace, name, tokens // len(domains), read)) is not None]
    if not parts:
        return None
    pieces: list[bytes] = []
    headings = []
    for heading, text, _ in parts:
        headings.append((len(pieces), heading))
        pieces += text
    return _Excerpt(tuple(pieces), tuple(headings), RoutingTrace.concatenate([shown for *_, shown in parts]))


def _part(
    trace: RoutingTrace, domain: str, tokens: int, read: Reader
) -> tuple[str, Sequence[bytes], RoutingTrace] | None:
    """Heading, tokens and trace of the first document of a domain that can be read."""
    for index in trace.document_T.unique().tolist():
        document = trace.info.documents[index]
        text = read(document) if document.domain == domain else None
        if text is not None and len(text) == document.length:
            part = trace.select(document=index)
            part = part.select(tokens=min(tokens, part.num_tokens))
            heading = f"{domain}: {document.name.removeprefix(PAGES)}"
            return heading, [text[position] for position in part.position_T.tolist()], part
    return None
