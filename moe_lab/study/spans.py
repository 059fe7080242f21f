"""Which document and position each recorded token has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.study.info import Document


class Spans:
    """Documents announced, and the tokens that came of them, chunk by chunk.

    Tokens that nobody announced are a document of their own, a forward each.
    """

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.document_chunks: list[Tensor] = []
        self.position_chunks: list[Tensor] = []
        self.num_tokens = 0
        self._queue: list[tuple[int, int]] | None = None  # (document, its next position) still to come

    def begin(self, documents: Sequence[Document]) -> None:
        """Announce documents, one after another; what is left of those before does not come."""
        if not documents or not all(isinstance(document, Document) for document in documents):
            raise ValueError(f"begin needs documents, got {documents!r:.80}")
        first = len(self.documents)
        self.documents += documents
        self._queue = [(first + i, 0) for i in range(len(documents))]

    def take(self, num_tokens: int) -> None:
        """Give the tokens of one forward their documents and positions. `ValueError` for more than announced."""
        queue = self._queue
        if queue is None:
            name = f"forward {len(self.documents)}"
            self.documents.append(Document(name, "unlabelled", "", 0, num_tokens))
            queue = [(len(self.documents) - 1, 0)]
        left = sum(self.documents[document].length - position for document, position in queue)
        if num_tokens > left:
            raise ValueError(f"{num_tokens:,} tokens came where begin() announced {left:,} more")
        rest = num_tokens
        while rest:
            document, start = queue.pop(0)
            end = min(self.documents[document].length, start + rest)
            self.position_chunks.append(torch.arange(start, end, dtype=torch.int32))
            self.document_chunks.append(torch.full((end - start,), document, dtype=torch.int32))
            rest -= end - start
            if end < self.documents[document].length:
                queue.insert(0, (document, end))
        self.num_tokens += num_tokens
