"""The one table that every measurement goes into: a row a quantity, the environment beside it, a version.

Times are milliseconds, sizes bytes. A field that was not measured is None, never zero. A file is JSON:

    {"format": "moe_lab measurements", "version": 1, "environment": {"device": ...}, "rows": [{...}, ...]}
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.config import check_choice
from moe_lab.study import timing
from moe_lab.study.measurement_text import lines

if TYPE_CHECKING:
    import pandas

FORMAT, VERSION = "moe_lab measurements", 1
DIRECTIONS = ("forward", "forward+backward")
MAX_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One arm's time for one phase of one layer, over rounds in which the arms of a `bench` ran in turn.

    `bench`: what was compared (layer, experts, dispatch, combine, phases, ranks, decode). `phase`: "all", or what part.
    `mode`: eager, compile, or graph (replayed). `tokens` to `top_k`: the layer's T, D, F, E, K, a rank; `ranks` share
    the experts, and `rank` is whose time it is (None: one rank, or all). `skew`: standard deviation of the experts' own
    logits, where they are drawn.
    `median`, `low`, `high`: ms over rounds, with the 95 % bootstrap interval of the median; `q25` to `p99` and
    `mean` are of single runs. `ratio`: the median over rounds of this arm's time over that of the arm `ratio_to`,
    with its interval.
    `dense_ms`: two dense products of the same operations in the same rounds; `bytes_ms`: what the bytes it must move
    take at the copy rate of the same minute.
    `max_over_mean`: imbalance of the experts' loads; `error`: relative to float32; `saved` and `peak`: bytes above
    the inputs when forward ends, and at the worst moment without the weights' gradients.
    `repeats`: ms of every round, where they were kept.
    """

    bench: str
    layer: str
    arm: str
    direction: str = "forward"
    phase: str = "all"
    mode: str = "eager"
    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    ranks: int = 1
    rank: int | None = None
    skew: float | None = None
    max_over_mean: float | None = None
    dtype: str
    device: str
    median: float
    low: float
    high: float
    q25: float | None = None
    q75: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    ratio_to: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    dense_ms: float | None = None
    bytes_ms: float | None = None
    error: float | None = None
    saved: int | None = None
    peak: int | None = None
    repeats: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_kinds(vars(self))
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("mode", self.mode, ("eager", "compile", "graph"))
        for name in ("median", "ratio"):
            parts = ("low", "high") if name == "median" else ("ratio_low", "ratio_high")
            middle, low, high = (getattr(self, part) for part in (name, *parts))
            if middle is not None and not (low is not None and high is not None and low <= middle <= high):
                raise ValueError(f"{name}={middle!r} must lie between {parts[0]}={low!r} and {parts[1]}={high!r}")

    @property
    def bound_ms(self) -> float | None:
        """The least it could take: its operations at the rate of dense products, or its bytes at that of a copy."""
        return max((bound for bound in (self.dense_ms, self.bytes_ms) if bound is not None), default=None)

    @property
    def roofline_share(self) -> float | None:
        """The bound over the median: 1 is all that the device gives."""
        return None if self.bound_ms is None or not self.median else self.bound_ms / self.median


def _check_kinds(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if not any(_is(value, kind) for kind in FIELDS[name]):
            allowed = " or ".join(NAMES[kind] for kind in FIELDS[name])
            raise ValueError(f"{name}={value!r} must be {allowed}")


def _is(value: object, kind: object) -> bool:
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and 0 <= value < math.inf  # type: ignore[operator]
    if kind == tuple[float, ...]:
        return isinstance(value, tuple) and all(_is(item, float) for item in value)
    return isinstance(value, kind)  # type: ignore[arg-type]


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


FIELDS = {name: _kinds(kind) for name, kind in typing.get_type_hints(Measurement).items()}
REQUIRED = [field.name for field in dataclasses.fields(Measurement) if field.default is dataclasses.MISSING]
NAMES: dict[Any, str] = {
    int: "an integer >= 0",
    float: "a finite number >= 0",
    str: "a text",
    tuple[float, ...]: "a list of finite numbers >= 0",
    type(None): "null",
}


def measured(
    runs: Sequence[Sequence[float]],
    *,
    to: tuple[str, Sequence[Sequence[float]]] | None = None,
    keep: bool = False,
    **of: Any,
) -> Measurement:
    """A row from the ms of every run, round by round; `to`: another arm's name and runs in the same rounds."""
    times = timing.medians(runs)
    found = timing.spread([run for block in runs for run in block])._asdict()
    if to is not None:
        ratio = timing.ratio(times, timing.medians(to[1]))
        found |= {"ratio_to": to[0], "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    return Measurement(**timing.summarise(times)._asdict(), **found, **of, repeats=tuple(times) if keep else None)


@dataclass(frozen=True)
class Measurements:
    """Rows of one environment: device, versions, date, threads, commit and command, as far as known."""

    environment: dict[str, str | int]
    rows: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        if "device" not in self.environment:
            raise ValueError("environment must name its device")

    def select(self, **fields: Any) -> Measurements:
        """The rows whose fields are these. `ValueError` for a field there is none of."""
        for name in fields:
            check_choice("field", name, FIELDS)
        kept = (row for row in self.rows if all(getattr(row, name) == value for name, value in fields.items()))
        return Measurements(self.environment, tuple(kept))

    def values(self, field: str) -> list[Any]:
        """What stands in a field, each once, in order of first appearance."""
        check_choice("field", field, FIELDS)
        return list(dict.fromkeys(getattr(row, field) for row in self.rows))

    def frame(self) -> pandas.DataFrame:
        """Rows as a tidy table, without fields that no row has, and without raw repeats."""
        import pandas

        table = pandas.DataFrame([dataclasses.asdict(row) for row in self.rows], columns=list(FIELDS))
        table["roofline_share"] = [row.roofline_share for row in self.rows]
        return table.drop(columns="repeats").dropna(axis="columns", how="all")

    def save(self, path: str | Path) -> None:
        """Write JSON; whole or not at all."""
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in self.rows]
        content = {"format": FORMAT, "version": VERSION, "environment": self.environment}
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = json.dumps(content, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
        partial = Path(path).with_name(Path(path).name + ".part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def __str__(self) -> str:
        """The environment on a line, then a table for each layer and bench."""
        facts = "  ".join(f"{name} {fact}" for name, fact in self.environment.items())
        groups: dict[tuple[Any, ...], list[Measurement]] = {}
        for row in self.rows:
            groups.setdefault((row.layer, row.bench, row.tokens, row.ranks, row.skew), []).append(row)
        return "\n\n".join([facts, *(lines(rows) for rows in groups.values())])


def load(path: str | Path) -> Measurements:
    """Read a file that `save` wrote. `ValueError`, naming file and row, for anything else."""
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
        return _parsed(json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} holds no measurements: {error}") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no measurement")


def _parsed(content: Any) -> Measurements:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"version={content.get('version')!r} must be {VERSION}")
    environment, rows = content.get("environment"), content.get("rows")
    if not isinstance(environment, dict) or not all(isinstance(fact, (str, int)) for fact in environment.values()):
        raise ValueError("environment must be names with texts or integers")
    if not isinstance(rows, list):
        raise ValueError("rows must be a list")
    return Measurements(environment, tuple(_row(number, row) for number, row in enumerate(rows)))


def _row(number: int, row: Any) -> Measurement:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} must be an object")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise ValueError(f"row {number} has unknown fields: {', '.join(unknown)}")
    if isinstance(row.get("repeats"), list):
        row = row | {"repeats": tuple(row["repeats"])}
    if missing := [name for name in REQUIRED if name not in row]:
        raise ValueError(f"row {number} lacks {', '.join(missing)}")
    try:
        _check_kinds(row)
        return Measurement(**row)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
