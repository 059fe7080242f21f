"""Every policy over every layer and micro-batch: what each pads, computes in vain, sends and drops. One tidy result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moe_lab.config import check_choice
from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.batches import count_matrix, micro_batches
from moe_lab.study.forced import forced_ids
from moe_lab.study.padding import Overhead, overhead, ratio
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.traffic import Traffic, traffic

# Settings of `overhead` by the name they are shown under.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "equal split": {"policy": "equal_split"},
    "adaptive 0.10": {"policy": "adaptive", "threshold": 0.10},
    **{f"multiple {n}": {"policy": "multiple", "multiple": n} for n in (8, 16, 32, 64, 128)},
    "drop 1.25": {"policy": "drop", "capacity_factor": 1.25},
    **{f"capacity {c}": {"policy": "capacity", "capacity_factor": c} for c in (1.0, 1.25, 2.0)},
    "padded bmm": {"policy": "padded_bmm"},
    "forced balance": {"policy": "forced_balance"},
}


class Row(NamedTuple):
    """One policy over one micro-batch of one layer."""

    setting: str
    layer: int
    micro_batch: int
    overhead: Overhead


class Total(NamedTuple):
    """One policy over many micro-batches: sums by rank; `straggler_factor` is sum of maxima over sum of means."""

    setting: str
    overhead: Overhead
    straggler_factor: float

    @property
    def dropped_share(self) -> float:
        """Assignments that are dropped, of all."""
        dropped = sum(self.overhead.dropped_R)
        return ratio(dropped, dropped + sum(self.overhead.rows_R))


@dataclass(frozen=True, eq=False)
class Waste:
    """Tidy rows, policy x layer x micro-batch, of `ep` ranks.

    `traffic` adds up what leaves each rank over all rows of a policy that moves the routing's own rows, and
    `forced_traffic` under round robin; both None where only counts are known.
    """

    rows: tuple[Row, ...]
    ep: int
    traffic: Traffic | None = None
    forced_traffic: Traffic | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings, in order."""
        return tuple(dict.fromkeys(row.setting for row in self.rows))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of all layers together."""
        return len({(row.layer, row.micro_batch) for row in self.rows})

    def total(self, setting: str, layer: int | None = None) -> Total:
        """One policy over all micro-batches, of one layer or all. `ValueError` for one that is not here."""
        check_choice("setting", setting, self.settings)
        chosen = [row.overhead for row in self.rows if row.setting == setting and layer in (None, row.layer)]
        if not chosen:
            raise ValueError(f"layer={layer} is not here: choose one of {sorted({row.layer for row in self.rows})}")
        fields = (tuple(map(sum, zip(*by_rank, strict=True))) for by_rank in list(zip(*chosen, strict=True))[1:])
        slowest = sum(max(map(sum, zip(one.rows_R, one.expert_zeros_R, strict=True))) for one in chosen)
        mean = sum(sum(one.rows_R) for one in chosen) / self.ep
        return Total(setting, Overhead(chosen[0].policy, *fields), ratio(slowest, mean))

    def totals(self, layer: int | None = None) -> Iterator[Total]:
        """Every policy over all micro-batches."""
        return (self.total(setting, layer) for setting in self.settings)


def waste_of_counts(
    matrices: Mapping[int, Sequence[CountMatrix]], settings: Mapping[str, dict[str, Any]] = SETTINGS
) -> Waste:
    """From the counts of each layer's micro-batches. `ValueError` where there are none."""
    sizes = {counts.ep for layer in matrices.values() for counts in layer}
    if len(sizes) != 1:
        raise ValueError(f"matrices are of ep={sorted(sizes)}: must be of one number of ranks")
    rows = tuple(
        Row(name, layer, i, overhead(counts, **chosen))
        for name, chosen in settings.items()
        for layer, batches in matrices.items()
        for i, counts in enumerate(batches)
    )
    return Waste(rows, sizes.pop())


def waste(
    source: RoutingTrace | Sequence[Sequence[Tensor]],
    placement: Placement,
    tokens_per_rank: int = 0,
    *,
    layer: int | None = None,
    settings: Mapping[str, dict[str, Any]] = SETTINGS,
    ranks_per_node: int = 8,
) -> Waste:
    """From a trace, one layer or all, in micro-batches of `tokens_per_rank` a rank; or from micro-batches of ids.

    Raises `ValueError` as `micro_batches` and `overhead` do.
    """
    if isinstance(source, RoutingTrace):
        layers = source.info.layers if layer is None else (layer,)
        ids = {one: list(micro_batches(source, one, placement.ep, tokens_per_rank)) for one in layers}
    else:
        ids = {layer or 0: [list(batch) for batch in source]}
    found = waste_of_counts(
        {one: [count_matrix(b, placement) for b in batches] for one, batches in ids.items()}, settings
    )
    flat = [batch for batches in ids.values() for batch in batches]
    real = _sum([traffic(batch, placement, ranks_per_node=ranks_per_node) for batch in flat])
    forced = [forced_ids(batch, placement.num_experts) for batch in flat]
    return Waste(
        found.rows,
        found.ep,
        real,
        _sum([traffic(batch, placement, ranks_per_node=ranks_per_node) for batch in forced]),
    )


def _sum(parts: Sequence[Traffic]) -> Traffic:
    return Traffic(*(tuple(map(sum, zip(*by_rank, strict=True))) for by_rank in zip(*parts, strict=True)))
