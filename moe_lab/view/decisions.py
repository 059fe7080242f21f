"""The record of fast paths as a tree: each decision of the layer, its branches, those taken lit, with reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from moe_lab.fastpaths import Entry, Record
from moe_lab.jobs.savings import Saving, Step
from moe_lab.study import timing
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import CHANCE, INK, LESS, MORE, MUTED, WIDTH

PER_ROW, WRAP = 3, 50
FATE = 40  # letters of a reason in a table of two, which a notebook's column holds
ROW, HEIGHT, GAP = 66, 58, 12  # CSS pixels


class Branch(NamedTuple):
    """One way to go: the names that are noted when it is taken, and those whose reasons say why it was not."""

    label: str
    taken: tuple[str, ...]
    refused: tuple[str, ...] = ()


class Decision(NamedTuple):
    """A question that the layer answers, in the order of a forward."""

    question: str
    branches: tuple[Branch, ...]


class Found(NamedTuple):
    """What a record says of one branch: how often it was taken and why, or why not; 0 and "" where it is silent."""

    question: str
    branch: str
    taken: int
    reason: str


def _kept(question: str, name: str) -> Decision:
    hit, miss = (f"cached_{name}_hit",), (f"cached_{name}_miss",)
    return Decision(question, (Branch("kept: hit", hit, miss), Branch("made: miss", miss)))


_SKIP, _A2A = (
    "normal_equal_a2a_padding_adaptive_skip",
    ("equal_a2a_padding_dispatch", "normal_equal_a2a_padding_dispatch"),
)
DECISIONS = (
    Decision("Are splits known?", (Branch("known: forced balance", ("force_load_balance_dispatch",)),)),
    Decision(
        "Sort, or slices?",
        (Branch("strided slices", ("direct_equal_split_dispatch",), ("direct_equal_split_skip",)),),
    ),
    Decision(
        "Pad the exchange?",
        (Branch("even: padded", _A2A, (_SKIP,)), Branch("uneven: as they are", (_SKIP,), _A2A)),
    ),
    Decision(
        "Received rows by",
        (
            Branch("transpose", ("equal_count_permute",), ("segment_cat_permute", "index_permute")),
            Branch("segments", ("segment_cat_permute",), ("equal_count_permute",)),
            Branch("index", ("index_permute",), ("equal_count_permute",)),
        ),
    ),
    Decision(
        "Gates multiply",
        (
            Branch("before the experts", ("score_before_experts",)),
            Branch("after, in float32", ("score_after_experts", "score_after_experts_bf16")),
            Branch("within the backend", ("fused_dispatch_combine", "buffered_dispatch_combine")),
        ),
    ),
    Decision("Experts by", tuple(Branch(n, ()) for n in ("loop", "padded", "grouped", "buffered", "batched", "fused"))),
    _kept("Stacked w13", "w13"),
    _kept("Transposed w2", "w2_t"),
    Decision(
        "Shared output",
        (
            Branch("in place", ("scatter_add_inplace_no_grad",), ("scatter_add_autograd_or_alias",)),
            Branch("into a copy", ("scatter_add_autograd_or_alias",)),
        ),
    ),
    Decision("Wait for the device?", (Branch("host reads counts", ("host_sync",)),)),
)


def found_in(record: Record) -> Iterator[Found]:
    """Every branch of every decision that the record speaks of."""
    for question, branches in DECISIONS:
        each = [_backend(record, b.label) if question == "Experts by" else _noted(record, b) for b in branches]
        if any(count or reason for count, reason in each):
            for branch, (count, reason) in zip(branches, each):
                yield Found(question, branch.label, count, reason)


def _noted(record: Record, branch: Branch) -> tuple[int, str]:
    taken = [record.entries[name] for name in branch.taken if name in record.entries]
    if taken:
        return sum(entry.count for entry in taken), _joined(taken)
    return 0, _joined([record.entries[name] for name in branch.refused if name in record.entries])


def _joined(entries: Sequence[Entry]) -> str:
    reasons = [reason for entry in entries for reason in entry.reasons]
    return reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "") if reasons else ""


def _backend(record: Record, name: str) -> tuple[int, str]:
    """Taken where a reason begins with the name; refused where it says "not name: why"."""
    entry = record.entries.get("experts_backend")
    reasons = entry.reasons if entry else {}
    for reason, count in reasons.items():
        chosen, *refused = reason.split("; not ")
        if chosen.startswith(f"{name}: "):
            return count, chosen.removeprefix(f"{name}: ")
        for other in refused:
            if other.startswith(f"{name}: "):
                return 0, other.removeprefix(f"{name}: ")
    return 0, ""


@dataclass(frozen=True, eq=False, repr=False)
class DecisionText(Text):
    """The tree as a table: a line a branch that the record speaks of."""

    record: Record

    def text(self) -> str:
        """Decision, branch, how often it was taken, why or why not."""
        rows: list[tuple[str, ...]] = [("decision", "branch", "taken", "why, or why not")]
        before = ""
        for question, branch, count, reason in found_in(self.record):
            if count or reason:
                rows.append((question if question != before else "", branch, str(count or "-"), reason))
                before = question
        return table(rows, left=(0, 1, 3))


def decision_tree(record: Record, what: str) -> Figure:
    """Decisions from top to bottom, branches side by side: blue ran, white did not, with its reason where known."""
    groups: dict[str, list[Found]] = {}
    for found in found_in(record):
        groups.setdefault(found.question, []).append(found)
    heights = [ROW * -(-len(branches) // PER_ROW) + GAP for branches in groups.values()]
    with theme.style():
        drawn = theme.figure(WIDTH, sum(heights) + 52)
        axes = drawn.add_axes((0, 0, 1, sum(heights) / (sum(heights) + 52)))
        axes.set(xlim=(0, WIDTH), ylim=(sum(heights), 0))
        axes.axis("off")
        drawn.text(14 / WIDTH, 1 - 18 / (sum(heights) + 52), "Which path ran, and why", size=9)
        drawn.text(14 / WIDTH, 1 - 34 / (sum(heights) + 52), what, size=7.5, color=MUTED)
        top, last = 0, None
        for (question, branches), height in zip(groups.items(), heights):
            axes.text(14, top + 30, question, size=8.5, color=INK, weight="bold", va="center")
            for i, found in enumerate(branches):
                x, y = 160 + 246 * (i % PER_ROW), top + ROW * (i // PER_ROW) + 2
                _box(axes, x, y, found)
                if found.taken:
                    if last is not None:
                        _trail(axes, last, (x, y), top)
                    last = (x, y)
            top += height
    return drawn


def _trail(axes: Axes, start: tuple[int, int], end: tuple[int, int], top: int) -> None:
    """From below one box to the top of a later one, between the boxes on the way."""
    (x0, y0), (x1, y1) = start, end
    points = [(x0 + 117, y0 + HEIGHT), (x0 + 117, top - 5)]
    if y1 > top + 2:  # in a second row: down the gap on its left
        points += [(x1 - 6, top - 5), (x1 - 6, y1 - 4)]
        points += [(x1 + 117, y1 - 4)]
    else:
        points += [(x1 + 117, top - 5)]
    axes.plot(*zip(*[*points, (x1 + 117, y1)]), color=LESS, lw=1.6, zorder=1)


def _box(axes: Axes, x: float, y: float, found: Found) -> None:
    lit = found.taken > 0
    silent = not lit and not found.reason
    box = FancyBboxPatch((x, y), 234, HEIGHT, boxstyle="round,pad=0,rounding_size=5", lw=1.6 if lit else 0.8, zorder=2)
    box.set(facecolor="#dcebf7" if lit else "#ffffff", edgecolor=LESS if lit else CHANCE)
    axes.add_patch(box)
    ink, weight = (INK, "bold") if lit else (MUTED, "normal")
    axes.text(x + 8, y + 11, found.branch, size=8, weight=weight, color=ink, va="center", zorder=3)
    mark = f"{found.taken} x" if lit else "" if silent else "not taken"
    axes.text(x + 226, y + 11, mark, size=7.5, color=LESS if lit else MUTED, ha="right", va="center", zorder=3)
    lines = textwrap.wrap(found.reason, WRAP, max_lines=3, placeholder=" …")
    axes.text(
        x + 8, y + 20, "\n".join(lines), size=6.2, color=INK if lit else MUTED, va="top", zorder=3, linespacing=1.15
    )


@dataclass(frozen=True, eq=False, repr=False)
class HistoryText(Text):
    """What became of the kept copies after each change of the weights."""

    steps: Sequence[Step]

    def text(self) -> str:
        """A line a change: both copies, bytes kept, whether the output is that of the present weights."""
        rows: list[tuple[str, ...]] = [("after", "w13", "w2_t", "bytes kept", "output right")]
        for step in self.steps:
            fates = (textwrap.shorten(fate, FATE, placeholder=" …") for fate in (step.w13, step.w2_t))
            rows.append((step.what, *fates, f"{step.num_bytes:,}", "yes" if step.right else "NO, stale"))
        return table(rows, left=(0, 1, 2))


def cache_strip(steps: Sequence[Step], what: str) -> Figure:
    """A column a change, a row a copy: blue was found again, white was made anew, orange found again though stale."""
    with theme.style():
        drawn = theme.figure(WIDTH, 150)
        axes = inset(drawn, left=60, right=10, bottom=42, top=48)
        heading(axes, "Kept copies as weights change", what)
        for x, step in enumerate(steps):
            for y, fate in enumerate((step.w13, step.w2_t)):
                hit = fate == "hit"
                colour = "#ffffff" if not hit else LESS if step.right or y else MORE
                axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=colour, edgecolor=CHANCE))
                text = "hit" if hit and colour == LESS else "hit, stale" if hit else "made"
                axes.text(x + 0.5, y + 0.5, text, size=7, ha="center", va="center", color="#ffffff" if hit else MUTED)
        axes.set(xlim=(0, len(steps)), ylim=(2, 0))
        axes.set_yticks([0.5, 1.5], ["w13", "w2_t"])
        labels = ["\n".join(textwrap.wrap(step.what, 13, break_long_words=False)) for step in steps]
        axes.set_xticks([x + 0.5 for x in range(len(steps))], labels, size=7)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return drawn


@dataclass(frozen=True, eq=False, repr=False)
class SavingText(Text):
    """Fast paths beside what they replace, ms in rounds that take turns: holds for the machine that shows it."""

    times: Sequence[tuple[Saving, Sequence[float], Sequence[float]]]

    def text(self) -> str:
        """A line a path: both medians and the paired ratio with its interval."""
        rows: list[tuple[str, ...]] = [("path", "instead of", "ms", "ms", "ratio", "95 %")]
        for saving, fast, slow in self.times:
            ratio = timing.ratio(fast, slow)
            medians = (f"{timing.summarise(ms).median:.2f}" for ms in (fast, slow))
            between = f"{ratio.low:.2f} - {ratio.high:.2f}"
            rows.append((saving.path, saving.instead_of, *medians, f"{ratio.median:.2f}", between))
        return table(rows, left=(0, 1))


def saving_bars(times: Sequence[tuple[Saving, Sequence[float], Sequence[float]]], what: str) -> Figure:
    """A bar a path: its time over that of what it replaces, with the interval; left of 1 is faster."""
    with theme.style():
        drawn = theme.figure(WIDTH, 84 + 30 * len(times))
        axes = inset(drawn, left=190, right=40, bottom=36, top=48)
        heading(axes, "Time over that of the way replaced", what)
        for y, (_, fast, slow) in enumerate(times):
            ratio = timing.ratio(fast, slow)
            axes.barh(y, ratio.median, 0.6, color=LESS if ratio.high < 1 else MORE if ratio.low > 1 else CHANCE, lw=0)
            axes.plot([ratio.low, ratio.high], [y, y], color=INK, lw=1.2)
            axes.annotate(
                f"{ratio.median:.2f}", (max(ratio.high, ratio.median), y), (5, 0), textcoords="offset points",
                va="center", size=7.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        axes.axvline(1, color=INK, lw=0.8, ls="--", zorder=0)
        axes.set_yticks(range(len(times)), [f"{saving.path} / {saving.instead_of}" for saving, *_ in times])
        axes.set(ylim=(len(times) - 0.5, -0.5), xlabel="ratio, paired rounds (line: 95 % of the median)")
        axes.margins(x=0.1)
        axes.tick_params(axis="y", length=0)
    return drawn
