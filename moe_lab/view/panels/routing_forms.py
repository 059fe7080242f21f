"""What the routing panel shows in other forms: a line, a table, CSV, a config, one picture."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from moe_lab.config import RouterConfig
from moe_lab.study.choice import Choice
from moe_lab.study.load import Load
from moe_lab.study.windows import WindowLoads, ratio
from moe_lab.view import theme
from moe_lab.view.text import table, window_of
from moe_lab.view.tokens import TintedText

METRICS = {
    "max_over_mean": ("max/mean", "{:.2f}"),
    "cv": ("CV", "{:.3f}"),
    "gini": ("Gini", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "dead_experts": ("dead", "{:.3g}"),
}


class Shown(NamedTuple):
    """What the panel shows, in words and numbers.

    `choice` and `recorded` say how experts are and were chosen; `loads` of every layer and `load` of the chosen
    one; a pinned load with its words, if any.
    """

    source: str
    choice: str
    recorded: str
    open_loop: bool
    loads: WindowLoads
    load: Load
    tinted: TintedText | None
    baseline: Load | None = None
    baseline_words: str = ""

    @property
    def words(self) -> str:
        """What all numbers are of."""
        return f"{self.source}, {where(self.load)}, {self.choice}, {self.loop}"

    @property
    def loop(self) -> str:
        """Whether later layers saw this choice."""
        return f"open-loop (recorded: {self.recorded})" if self.open_loop else "as recorded"


def where(load: Load) -> str:
    """Window, domain, layer, rank."""
    return f"{window_of(load)}, layer {load.layer}, one rank".replace(" · ", ", ")


def change(value: float, before: float) -> str:
    """A difference in percent, with its sign; nothing where there is nothing to compare with."""
    return f"{100 * (value / before - 1):+.0f} %".replace("-", "−") if before else ""


def readings(shown: Shown) -> list[tuple[str, str, str]]:
    """Name, value and what to compare it with, of the three numbers on the line."""
    load, baseline, cells = shown.load, shown.baseline, []
    for field in ("max_over_mean", "cv", "dead_experts"):
        name, form = METRICS[field]
        value, low, high = (getattr(of, field) for of in (load.metrics, load.null.low, load.null.high))
        notes = [f"chance {form.format(low)}–{form.format(high)}"] if high else []
        if baseline is not None:
            before = getattr(baseline.metrics, field)
            notes.append(f"baseline {form.format(before)} {change(value, before)}".rstrip())
        cells.append((name, form.format(value), f"({'; '.join(notes)})" if notes else ""))
    return cells


def line(shown: Shown) -> str:
    """The line below the pictures, as HTML."""
    cells = [f"{name} <b>{value}</b> <small>{escape(note)}</small>" for name, value, note in readings(shown)]
    return " &ensp;|&ensp; ".join(["&emsp;".join(cells), escape(where(shown.load)), escape(shown.loop)])


def text(shown: Shown) -> str:
    """Every metric beside what chance gives and the baseline, the busiest experts, the text's experts."""
    load, baseline = shown.load, shown.baseline
    rows = [["", "value", "chance", "95 % of chance", *(["baseline", "change"] if baseline else [])]]
    for field, (name, form) in METRICS.items():
        of = (load.metrics, load.null.mean, load.null.low, load.null.high)
        value, mean, low, high = (getattr(metrics, field) for metrics in of)
        rows.append([name, form.format(value), form.format(mean), f"{form.format(low)} - {form.format(high)}"])
        if baseline is not None:
            before = getattr(baseline.metrics, field)
            rows[-1] += [form.format(before), change(value, before)]
    ratio_E = ratio(load)
    busiest = np.argsort(-ratio_E, kind="stable")[:4]
    lines = [shown.words, table(rows)]
    lines.append(f"busiest (load / mean): {', '.join(f'{e} ({ratio_E[e]:.2f})' for e in busiest)}")
    if baseline is not None:
        lines.append(f"baseline: {shown.baseline_words}")
    if shown.tinted is not None:
        firsts = [f"{expert} ({share})" for expert, share in shown.tinted.shares()[:4]]
        lines.append(f"first experts of the text: {', '.join(firsts)}")
    return "\n".join(lines)


def csv_text(shown: Shown) -> str:
    """One tidy table: metrics, load / mean of every expert and layer, the experts of the text's tokens."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    load, baseline = shown.load, shown.baseline
    writer.writerow(["quantity", "layer", "expert", "token", "value", "chance_low", "chance_high", "baseline", "of"])
    for field in METRICS:
        of = (load.metrics, load.null.low, load.null.high)
        before = getattr(baseline.metrics, field) if baseline else None
        row = [_number(getattr(metrics, field)) for metrics in of]
        writer.writerow([field, load.layer, "", "", *row, _number(before), shown.words])
    before_E = ratio(baseline) if baseline and len(baseline.shares_E) == len(load.shares_E) else None
    for of_layer in shown.loads.loads:
        band = [_number(share * len(load.shares_E)) for share in (load.null.share_low, load.null.share_high)]
        for expert, value in enumerate(ratio(of_layer)):
            before = before_E[expert] if before_E is not None and of_layer is load else None
            numbers = [_number(value), *band, _number(before)]
            writer.writerow(["load_over_mean", of_layer.layer, expert, "", *numbers, shown.words])
    if shown.tinted is not None:
        for token, expert in enumerate(shown.tinted.expert_ids_TK[:, 0].tolist()):
            writer.writerow(["first_expert", load.layer, expert, token, "", "", "", "", shown.tinted.where])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def config_code(choice: Choice, num_experts: int) -> str:
    """Python that makes a layer which chooses so; widths are not in a trace and left to the reader."""
    defaults, router = RouterConfig(), choice.router
    settings = [
        f"{field.name}={getattr(router, field.name)!r}"
        for field in dataclasses.fields(router)
        if getattr(router, field.name) != getattr(defaults, field.name)
    ]
    lines = [
        "from moe_lab import MoEConfig, RouterConfig",
        "",
        "dim, hidden_dim = 256, 64  # yours: a trace does not hold widths",
        "config = MoEConfig(",
        "    dim=dim,",
        "    hidden_dim=hidden_dim,",
        f"    num_experts={num_experts},",
        f"    top_k={choice.top_k},",
        f"    router=RouterConfig({', '.join(settings)}),",
        *(["    load_balance_coeff=1e-3,"] if choice.use_bias else []),
        ")",
    ]
    return "\n".join(lines)


def picture(shown: Shown, drawn: Sequence[bytes]) -> bytes:
    """The panel's pictures side by side, its line of numbers below."""
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png in drawn]
    width, height = sum(p.width for p in pictures), max(p.height for p in pictures)
    footer = _footer(shown, width)
    page = Image.new("RGB", (width, height + footer.height), theme.PAPER)
    left = 0
    for part in pictures:
        page.paste(part, (left, 0))
        left += part.width
    page.paste(footer, (0, height))
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


def _footer(shown: Shown, width: int) -> Image.Image:
    cells = [f"{name} {value}  {note}" for name, value, note in readings(shown)]
    with theme.style():
        drawn = theme.figure(width / theme.SCALE, 44)
        drawn.text(0.01, 0.78, "      ".join(cells), va="center", size=9)
        drawn.text(0.01, 0.3, shown.words, va="center", size=8, color=theme.MUTED)
    return Image.open(io.BytesIO(theme.png(drawn))).convert("RGB")
