"""Record what the routers of a model decide, by forward hooks that change nothing."""

from __future__ import annotations

import inspect
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_lab.config import RouterConfig, check_int
from moe_lab.layer.router import TokenChoiceTopKRouter
from moe_lab.models import hf, titan
from moe_lab.study.compact import half, small_dtype
from moe_lab.study.info import MAX_EXPERTS, Document, TraceInfo
from moe_lab.study.spans import Spans
from moe_lab.study.validate import kept_tokens

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

    The routers are the model's `TokenChoiceTopKRouter` modules, or those of a model of transformers or torchtitan,
    found by their structure (see `moe_lab.models.hf` and `titan`). Each must run once a forward, on the same tokens:
    (T, D), or (B, L, D) as T = B*L tokens row by row. Routing is kept on CPU in compact dtypes, a forward at a time;
    memory is bounded by `max_tokens`, past which a forward raises `ValueError`. What runs outside a whole forward
    (activation recomputing, one layer by itself) is not recorded. Tokens that the model's `attention_mask` (B, L)
    leaves out are recorded as not valid; of a mask of another shape a warning says that it was not read.

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
        own = {m: name for name, m in model.named_modules() if isinstance(m, TokenChoiceTopKRouter)}
        self._routers: dict[nn.Module, str] = own or hf.find_routers(model)  # type: ignore[assignment]
        if len({_kind(m) for m in self._routers}) > 1:
            raise ValueError("routers differ in num_experts, top_k or config: record layers that are alike")
        self._num_experts, self._top_k = _kind(next(iter(self._routers)))[:2]
        check_int("num_experts", self._num_experts, 1, MAX_EXPERTS)
        self._config: RouterConfig | None = None  # of a router of transformers: found from its first decision
        self._handles: list[RemovableHandle] = []
        self._used = False
        self._forward: dict[nn.Module, _Decision] | None = None  # of the forward that is running
        self._order: list[nn.Module] = []
        self._bias: dict[nn.Module, Tensor | None] = {}
        self._chunks: list[list[_Decision]] = []
        self._spans = Spans()
        self._valid_chunks: list[Tensor] = []
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
        self._handles.append(self._model.register_forward_hook(self._on_end, with_kwargs=True))
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
        self._spans.begin(documents)

    def trace(self, *, model: str = "", source: str = "", licence: str = "") -> RoutingTrace:
        """Everything recorded so far. `ValueError` when that is nothing."""
        from moe_lab.study.trace import RoutingTrace  # which offers `record` beside it

        if not self._chunks or self._config is None:
            raise ValueError("nothing was recorded: call the model inside `with record(model) as recorder:`")
        info = TraceInfo(
            model=model or type(self._model).__name__,
            source=source,
            licence=licence,
            versions=_versions(self._order[0]),
            router=self._config,
            num_experts=self._num_experts,
            top_k=self._top_k,
            layers=_layer_numbers([self._routers[r] for r in self._order]),
            documents=tuple(self._spans.documents),
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
            document_T=torch.cat(self._spans.document_chunks),
            position_T=torch.cat(self._spans.position_chunks),
            valid_T=torch.cat(self._valid_chunks),
        )

    # hooks

    def _on_start(self, model: nn.Module, args: Any) -> None:
        self._forward = {}

    def _on_router(self, router: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._forward is None:
            return
        name = self._routers[router]
        if isinstance(router, TokenChoiceTopKRouter):
            routing = hf.Decision(output.expert_ids_TK, output.gates_TK, output.logits_TE)
            bias_E = args[1] if len(args) > 1 else kwargs.get("expert_bias_E")
        elif titan.is_router(router):
            routing = titan.decision(router, output)
            bias_E = args[1] if len(args) > 1 else kwargs.get("expert_bias_E")
        else:
            routing, bias_E = hf.decision(router, output), hf.balancing_bias(router)
        if router in self._forward:
            raise ValueError(f"router {name!r} ran twice in one forward: a trace holds one decision a token")
        num_tokens = len(routing.expert_ids_TK)
        if self._spans.num_tokens + num_tokens > self._max_tokens:
            raise ValueError(
                f"max_tokens={self._max_tokens:,} is too few: {self._spans.num_tokens:,} are recorded and "
                f"{num_tokens:,} more came"
            )
        bias_E = None if bias_E is None else bias_E.detach().to("cpu", torch.float32, copy=True)
        if router in self._bias and not _same(self._bias[router], bias_E):
            raise ValueError(f"expert_bias_E of router {name!r} changed between forwards: record one state")
        self._bias[router] = bias_E
        if self._config is None and num_tokens:
            self._config = _config(router, routing, bias_E)
        ids_TK = routing.expert_ids_TK.detach().cpu()
        small = small_dtype(self._num_experts, dropped=bool((ids_TK < 0).any()))
        nothing = torch.empty(0)
        self._forward[router] = _Decision(
            ids_TK.to(small),
            half(f"gates of router {name!r}", routing.gates_TK) if self._gates else nothing,
            half(f"logits of router {name!r}", routing.logits_TE) if self._logits else nothing,
        )

    def _on_end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
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
            valid_T = _valid(_mask(model, args, kwargs), num_tokens)
            self._spans.take(num_tokens)
            self._valid_chunks.append(valid_T)
            self._chunks.append(list(forward.values()))

    def _stacked_bias(self) -> Tensor | None:
        biases = [self._bias[router] for router in self._order]
        if all(bias is None for bias in biases):
            return None
        zero_E = torch.zeros(self._num_experts)
        return torch.stack([zero_E if bias is None else bias for bias in biases])


def _kind(router: nn.Module) -> tuple[int, int, object]:
    """What must be the same of all routers of a trace."""
    own = isinstance(router, TokenChoiceTopKRouter)
    return int(router.num_experts), int(router.top_k), router.config if own else type(router)  # type: ignore[arg-type]


def _config(router: nn.Module, seen: hf.Decision, bias_E: Tensor | None) -> RouterConfig:
    """How a router chooses. Warns when no configuration explains what a router of transformers chose."""
    if isinstance(router, TokenChoiceTopKRouter):
        return router.config if router.training else router.eval_config
    seen = hf.Decision(*(part.detach().cpu()[:1024] for part in seen))
    found = hf.fit(titan.config_of(router), seen, bias_E) if titan.is_router(router) else None
    config, ids_share, gate_error = found or hf.fit_router(router, seen, bias_E)
    if ids_share < 0.99 or gate_error > 0.02:
        warnings.warn(
            f"{type(router).__name__} routes like no RouterConfig: the nearest has the experts of {ids_share:.1%} of "
            f"tokens and gates within {gate_error:.1%}. What is recorded is what ran; rerouting starts elsewhere",
            stacklevel=2,
        )
    return config


def _versions(router: nn.Module) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    package = type(router).__module__.partition(".")[0]
    if package not in ("moe_lab", "__main__") and (version := getattr(sys.modules.get(package), "__version__", None)):
        versions[package] = str(version)
    return versions


def _mask(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    """The attention mask of a forward, given by name or by place."""
    if "attention_mask" in kwargs:
        return kwargs["attention_mask"]
    given = zip(inspect.signature(model.forward).parameters, args)
    return next((value for name, value in given if name == "attention_mask"), None)


def _valid(mask: object, num_tokens: int) -> Tensor:
    """Which tokens of a forward are no padding, by its attention mask: (B, L), past tokens first."""
    all_T = torch.ones(num_tokens, dtype=torch.bool)
    if mask is None:
        return all_T
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
    if len(shape) != 2 or not shape[0] or num_tokens % shape[0] or shape[1] < num_tokens // shape[0]:
        what = f"of shape {shape}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        warnings.warn(
            f"attention_mask is {what}, not (B, L) of {num_tokens} tokens: all count as valid, padding too",
            stacklevel=2,
        )
        return all_T
    return kept_tokens("attention_mask", mask)[:, -(num_tokens // shape[0]) :].reshape(-1)  # type: ignore[arg-type]


def _stack(layers: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(chunks) for chunks in layers])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


def _layer_numbers(names: list[str]) -> tuple[int, ...]:
    """The first number in each router's name ("layers.3.moe.router" is 3), or 0, 1, 2, ... if they repeat."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = tuple(int(match[1]) for match in found if match)
    return numbers if len(set(numbers)) == len(names) else tuple(range(len(names)))
