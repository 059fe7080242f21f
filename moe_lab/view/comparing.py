"""Traces of the same tokens side by side, by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure

from moe_lab.study.compare import Agreement, agreement, rounded
from moe_lab.study.trace import RoutingTrace
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import MUTED, SERIES, WIDTH


class Comparison(Text):
    """Agreements with one trace, by name."""

    def __init__(self, agreements: Mapping[str, Agreement]) -> None:
        self.agreements = dict(agreements)

    def text(self) -> str:
        """Tokens whose set of experts differs, and the margins of those beside the others."""
        first = next(iter(self.agreements.values()))
        rows = [["tokens with other experts, %", *(f"layer {layer}" for layer in first.layers)]]
        for name, got in self.agreements.items():
            rows.append([name, *(f"{100 * (1 - share):.2f}" for share in got.tokens_L.tolist())])
        for title, field in (("margin where they stay", "margin_same_L"), ("where they change", "margin_changed_L")):
            rows.append([title, *("" for _ in first.layers)])
            for name, got in self.agreements.items():
                rows.append([name, *(_margin(value) for value in getattr(got, field).tolist())])
        return f"{first.tokens:,} tokens\n" + table(rows)


def precisions(
    trace: RoutingTrace, dtypes: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
) -> Comparison:
    """What rounding the recorded logits does to the choice: float16 is as recorded."""
    exact = rounded(trace, torch.float16)
    return Comparison({name: agreement(exact, rounded(trace, dtype)) for name, dtype in dtypes.items()})


def changed(result: Comparison) -> Figure:
    """Share of tokens whose set of experts differs, by layer, one colour a trace."""
    first = next(iter(result.agreements.values()))
    with theme.style():
        drawn = theme.figure(WIDTH, 230)
        axes = inset(drawn, left=52, right=90, bottom=40, top=44)
        heading(axes, "Tokens that get other experts", f"{first.tokens:,} tokens · share of tokens, by layer")
        width = 0.8 / len(result.agreements)
        for i, (name, got) in enumerate(result.agreements.items()):
            share_L = 100 * (1 - got.tokens_L.numpy())
            axes.bar(np.arange(len(share_L)) + (i + 0.5) * width - 0.4, share_L, width, color=SERIES[i], label=name)
        axes.set_xticks(range(len(first.layers)), [str(layer) for layer in first.layers])
        axes.set_xlabel("layer", color=MUTED)
        axes.set_ylabel("%", labelpad=2)
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def _margin(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
