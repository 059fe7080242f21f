"""Where a recorded trace comes from: model, router and documents. Frozen, validated, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import NoReturn

from moe_lab.config import RouterConfig, check_int

MAX_EXPERTS = 2**15 - 1  # ids are stored in int16 at most
MAX_JSON = 2**24
FORMAT = 1
FORWARD_FIELDS = ("step", "rank", "micro_batch")


def _check_text(name: str, value: object, *, empty: bool = True) -> None:
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{name}={value!r} must be {'a' if empty else 'a non-empty'} string")
    if not value.isprintable():
        raise ValueError(f"{name}={value!r} must hold printable characters only")


def _check_tuple(name: str, value: object, kind: type) -> None:
    if not isinstance(value, tuple) or not value or not all(type(item) is kind for item in value):
        raise ValueError(f"{name}={value!r:.80} must be a non-empty tuple of {kind.__name__}")


@dataclass(frozen=True)
class Document:
    """A span of text that tokens were recorded from.

    `name` is a path relative to its root, such as "stdlib:json/decoder.py"; `domain` the kind of text.
    `sha256` is of the whole source file (64 hex digits; "" where there is no file). `offset` is the byte
    where the span starts in the file, `length` its length in tokens: bytes, for a model that reads bytes.
    `step`, `rank` and `micro_batch` say in which forward of a run it was, None where that is not known.
    """

    name: str
    domain: str
    sha256: str
    offset: int
    length: int
    step: int | None = None
    rank: int | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        _check_text("document name", self.name, empty=False)
        _check_text("document domain", self.domain, empty=False)
        parts = re.split(r"[:/]", self.name)
        if "" in parts or ".." in parts or "\\" in self.name:
            raise ValueError(f"document name={self.name!r} must be a relative path like 'root:folder/file'")
        if not isinstance(self.sha256, str) or not re.fullmatch(r"([0-9a-f]{64})?", self.sha256):
            raise ValueError(f"document sha256={self.sha256!r} must be 64 hex digits, or '' for no file")
        check_int("document offset", self.offset, 0)
        check_int("document length", self.length, 1, 2**31 - 1)
        for name in FORWARD_FIELDS:
            if getattr(self, name) is not None:
                check_int(f"document {name}", getattr(self, name), 0, 2**62)


@dataclass(frozen=True)
class TraceInfo:
    """What a trace was recorded from, and with what.

    `router` is the configuration that made the recorded choice of `top_k` out of `num_experts` experts;
    `layers` the numbers of the recorded layers in forward order; `versions` what ran ("torch": "2.13.0").
    """

    model: str
    source: str
    licence: str
    versions: dict[str, str]
    router: RouterConfig
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        for name in ("model", "source", "licence"):
            _check_text(name, getattr(self, name))
        if not isinstance(self.versions, dict):
            raise ValueError(f"versions={self.versions!r:.80} must be a dict from names to versions")
        for package, version in self.versions.items():
            _check_text("versions key", package)
            _check_text(f"versions[{package!r}]", version)
        if not isinstance(self.router, RouterConfig):
            raise ValueError(f"router={self.router!r:.80} must be a RouterConfig")
        check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        self.router.check(self.num_experts, self.top_k)
        _check_tuple("layers", self.layers, int)
        if min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers={self.layers} must be distinct and >= 0")
        _check_tuple("documents", self.documents, Document)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back to an equal value."""
        values = dataclasses.asdict(self)
        values["documents"] = [{k: v for k, v in d.items() if v is not None} for d in values["documents"]]
        return json.dumps({"format": FORMAT, **values}, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> TraceInfo:
        """Read `to_json`'s text. Raises `ValueError` for anything else, however hostile."""
        if len(text) > MAX_JSON:
            raise ValueError(f"metadata of {len(text):,} characters is over the limit of {MAX_JSON:,}")
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
            if values.pop("format") != FORMAT:
                raise ValueError(f"metadata is not of trace format {FORMAT}")
            values["documents"] = tuple(Document(**document) for document in values["documents"])
            values["layers"] = tuple(values["layers"])
            values["router"] = RouterConfig(**values["router"])
            return cls(**values)
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError) as error:
            raise ValueError(f"metadata is not what a trace holds: {error!r:.200}") from None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"metadata holds {text}, which is no JSON number")
