"""Record what the routers of a model decide, by forward hooks that change nothing."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_lab.config import check_int
from moe_lab.layer.router import Routing, TokenChoiceTopKRouter
from moe_lab.study.info import MAX_EXPERTS, Document, TraceInfo

if TYPE_CHECKING:
    from moe_lab.study.trace import RoutingTrace


def record(
    model: nn.Module,
    documents: Sequence[Document] = (),
    *,
    gates: bool = True,
    logits: bool = True,
    max_tokens: int = 2**20,
) -> Recorder:
    """Record the routing of every forward of `model` inside a `with` block.

        with record(model) as recorder:
            for document, tokens in spans:
                recorder.begin(document)
                model(tokens)
        trace = recorder.trace(model="lm", source="held-out text")

    The routers are the model's `TokenChoiceTopKRouter` modules, each of which must run once a forward, on
    the same tokens: (T, D), or (B, L, D) as T = B*L tokens row by row. Routing is kept on CPU in compact
    dtypes, a forward at a time; memory is bounded by `max_tokens`, past which a forward raises `ValueError`.
    What runs outside a whole forward (activation recomputing, one layer by itself) is not recorded.

    `documents` are begun at once (see `Recorder.begin`). Without any, every forward is its own document.
    Raises `ValueError` for a model without such routers, or with routers that differ in num_experts, top_k or
    configuration.
    """
    return Recorder(model, documents, gates=gates, logits=logits, max_tokens=max_tokens)


class _Decision(NamedTuple):
    """What one router said about the tokens of one forward, in the dtypes of a trace."""

    ids_TK: Tensor
    gates_TK: Tensor
    logits_TE: Tensor


class Recorder:
    """Collects routing while its `with` block runs; made by `record`. Usable once."""

    def __init__(
        self, model: nn.Module, documents: Sequence[Document], *, gates: bool, logits: bool, max_tokens: int
    ) -> None:
        check_int("max_tokens", max_tokens, 1)
        self._model, self._gates, self._logits, self._max_tokens = model, gates, logits, max_tokens
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, TokenChoiceTopKRouter)]
        if not found:
            raise ValueError(f"{type(model).__name__} holds no TokenChoiceTopKRouter to record")
        if len({(m.num_experts, m.top_k, m.config) for _, m in found}) > 1:
            raise ValueError("routers differ in num_experts, top_k or config: record layers that are alike")
        self._example = found[0][1]
        check_int("num_experts", self._example.num_experts, 1, MAX_EXPERTS)
        self._routers: dict[nn.Module, str] = {m: name for name, m in found}
        self._handles: list[RemovableHandle] = []
        self._used = False
        self._forward: dict[nn.Module, _Decision] | None = None  # of the forward that is running
        self._order: list[nn.Module] = []
        self._bias: dict[nn.Module, Tensor | None] = {}
        self._chunks: list[list[_Decision]] = []
        self._documents: list[Document] = []
        self._document_chunks: list[Tensor] = []
        self._position_chunks: list[Tensor] = []
        self._num_tokens = 0
        self._queue: list[tuple[int, int]] | None = None  # (document, its next position) still to come
        if documents:
            self.begin(*documents)

    def __enter__(self) -> Recorder:
        if self._used:
            raise ValueError("a recorder runs once: call record(model) again")
        if getattr(self._model, "_moe_lab_recorder", None) is not None:
            raise ValueError("this model is being recorded already: one recorder at a time")
        self._used = True
        self._model._moe_lab_recorder = self  # type: ignore[assignment]
        for router in self._routers:
            self._handles.append(router.register_forward_hook(self._on_router, with_kwargs=True))
        self._handles.append(self._model.register_forward_pre_hook(self._on_start))
        self._handles.append(self._model.register_forward_hook(self._on_end))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward = None
        del self._model._moe_lab_recorder

    def begin(self, *documents: Document) -> None:
        """Say what the coming tokens are: these documents, one after another, each of its `length` tokens.

        Ends the document before, complete or not. A document may come in several forwards, or several
        documents of equal length in one forward, as the rows of a (B, L, D) input. Tokens past the end raise
        `ValueError`.
        """
        if not documents or not all(isinstance(document, Document) for document in documents):
            raise ValueError(f"begin needs documents, got {documents!r:.80}")
        first = len(self._documents)
        self._documents += documents
        self._queue = [(first + i, 0) for i in range(len(documents))]

    def trace(self, *, model: str = "", source: str = "", licence: str = "") -> RoutingTrace:
        """Everything recorded so far. `ValueError` when that is nothing."""
        from moe_lab.study.trace import RoutingTrace  # which offers `record` beside it

        if not self._chunks:
            raise ValueError("nothing was recorded: call the model inside `with record(model) as recorder:`")
        router = self._example
        info = TraceInfo(
            model=model or type(self._model).__name__,
            source=source,
            licence=licence,
            versions={"python": platform.python_version(), "torch": torch.__version__},
            router=router.config,
            num_experts=router.num_experts,
            top_k=router.top_k,
            layers=_layer_numbers([self._routers[r] for r in self._order]),
            documents=tuple(self._documents),
        )
        ids, gates, logits = (
            [[decision[part] for decision in layer] for layer in zip(*self._chunks, strict=True)] for part in range(3)
        )
        return RoutingTrace(
            info=info,
            expert_ids_LTK=_stack(ids),
            gates_LTK=_stack(gates) if self._gates else None,
            logits_LTE=_stack(logits) if self._logits else None,
            expert_bias_LE=self._stacked_bias(),
            document_T=torch.cat(self._document_chunks),
            position_T=torch.cat(self._position_chunks),
            valid_T=torch.ones(self._num_tokens, dtype=torch.bool),
        )

    # hooks

    def _on_start(self, model: nn.Module, args: Any) -> None:
        self._forward = {}

    def _on_router(self, router: TokenChoiceTopKRouter, args: Any, kwargs: Any, routing: Routing) -> None:
        if self._forward is None:
            return
        name = self._routers[router]
        if router in self._forward:
            raise ValueError(f"router {name!r} ran twice in one forward: a trace holds one decision a token")
        num_tokens = len(routing.expert_ids_TK)
        if self._num_tokens + num_tokens > self._max_tokens:
            raise ValueError(
                f"max_tokens={self._max_tokens:,} is too few: {self._num_tokens:,} are recorded and "
                f"{num_tokens:,} more came"
            )
        bias_E = args[1] if len(args) > 1 else kwargs.get("expert_bias_E")
        bias_E = None if bias_E is None else bias_E.detach().to("cpu", torch.float32, copy=True)
        if router in self._bias and not _same(self._bias[router], bias_E):
            raise ValueError(f"expert_bias_E of router {name!r} changed between forwards: record one state")
        self._bias[router] = bias_E
        ids_TK = routing.expert_ids_TK.detach().cpu()
        small = torch.uint8 if router.num_experts <= 256 and not (ids_TK < 0).any() else torch.int16
        nothing = torch.empty(0)
        self._forward[router] = _Decision(
            ids_TK.to(small),
            _half(f"gates of router {name!r}", routing.gates_TK) if self._gates else nothing,
            _half(f"logits of router {name!r}", routing.logits_TE) if self._logits else nothing,
        )

    def _on_end(self, model: nn.Module, args: Any, output: Any) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            raise ValueError("the recorded model was called inside its own forward")
        missing = [name for router, name in self._routers.items() if router not in forward]
        if missing:
            raise ValueError(f"routers {missing} did not run in this forward: a trace needs every layer")
        lengths = {self._routers[router]: len(decision.ids_TK) for router, decision in forward.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"routers saw different numbers of tokens: {lengths}")
        order = list(forward)
        if self._order and order != self._order:
            raise ValueError("routers ran in another order than in the forward before")
        self._order = order
        if num_tokens := lengths[self._routers[order[0]]]:
            self._take_tokens(num_tokens)
            self._chunks.append(list(forward.values()))

    def _take_tokens(self, num_tokens: int) -> None:
        """Give the tokens of one forward their documents and positions."""
        queue = self._queue
        if queue is None:
            name = f"forward {len(self._documents)}"
            self._documents.append(Document(name, "unlabelled", "", 0, num_tokens))
            queue = [(len(self._documents) - 1, 0)]
        left = sum(self._documents[document].length - position for document, position in queue)
        if num_tokens > left:
            raise ValueError(f"{num_tokens:,} tokens came where begin() announced {left:,} more")
        rest, documents, positions = num_tokens, [], []
        while rest:
            document, start = queue.pop(0)
            end = min(self._documents[document].length, start + rest)
            positions.append(torch.arange(start, end, dtype=torch.int32))
            documents.append(torch.full((end - start,), document, dtype=torch.int32))
            rest -= end - start
            if end < self._documents[document].length:
                queue.insert(0, (document, end))
        self._document_chunks += documents
        self._position_chunks += positions
        self._num_tokens += num_tokens

    def _stacked_bias(self) -> Tensor | None:
        biases = [self._bias[router] for router in self._order]
        if all(bias is None for bias in biases):
            return None
        zero_E = torch.zeros(self._example.num_experts)
        return torch.stack([zero_E if bias is None else bias for bias in biases])


def _stack(layers: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(chunks) for chunks in layers])


def _half(name: str, values: Tensor) -> Tensor:
    half = values.detach().to("cpu", torch.float16)
    if not half.isfinite().all():
        raise ValueError(f"{name} are not finite in float16 (at most 65504): a trace cannot hold them")
    return half


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


def _layer_numbers(names: list[str]) -> tuple[int, ...]:
    """The first number in each router's name ("layers.3.moe.router" is 3), or 0, 1, 2, ... if they repeat."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = tuple(int(match[1]) for match in found if match)
    return numbers if len(set(numbers)) == len(names) else tuple(range(len(names)))
