"""What `moe-lab bench layer` measured, as rows of the one table (`moe_lab.study.measurements`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe_lab.study.measurements import Measurement, Measurements
from moe_lab.study.timing import Timing

if TYPE_CHECKING:
    from moe_lab.jobs.bench import Result

SKEW = 0.5  # standard deviation of the experts' own logits in `bench.make_inputs`


def measurements(results: Sequence[Result], environment: dict[str, str | int]) -> Measurements:
    """Every time of these layers; what could not run is in the environment, with its reason."""
    missing: dict[str, str | int] = {
        f"{r.layer} without {name}": reason for r in results for name, reason in r.missing.items()
    }
    rows = (row for result in results for row in _rows(result, environment))
    return Measurements(environment | missing, tuple(rows))


def _rows(result: Result, environment: dict[str, str | int]) -> Iterator[Measurement]:
    shape = dict(zip(("tokens", "dim", "hidden_dim", "num_experts", "top_k"), (result.shape[s] for s in "TDFEK")))
    of: dict[str, Any] = {"layer": result.layer, "skew": SKEW, "max_over_mean": result.imbalance, **shape}
    of |= {"dtype": environment["dtype"], "device": environment["device"]}
    dense = result.rows[0]
    for row in result.rows:
        ahead, versus = row.forward, row.forward_ratio
        of_arm = {"bench": "layer", "arm": row.arm, "ratio_to": dense.arm} | of
        yield Measurement(**of_arm, **ahead._asdict(), **_ratio(versus), dense_ms=dense.forward.median, error=row.error)
        if row.both and row.both_ratio and dense.both:
            yield Measurement(
                **of_arm,
                direction="forward+backward",
                **row.both._asdict(),
                **_ratio(row.both_ratio),
                dense_ms=dense.both.median,
                saved=row.saved,
                peak=row.peak,
            )
    for name, time in result.kernels.items():
        yield Measurement(bench="kernels", arm=name, **of, **time._asdict(), bytes_ms=result.bounds.get(name))


def _ratio(ratio: Timing) -> dict[str, Any]:
    return dict(zip(("ratio", "ratio_low", "ratio_high"), ratio))
