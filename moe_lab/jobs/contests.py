"""What competes in `moe-lab bench`: a whole routed part, or its dispatch, experts or combine, each done by many.

Every arm computes the same; `hold` runs each once, before anything is timed, and refuses those whose output is not
within the budget: twice the error that the plainest arm has in the same dtype, against one dtype up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from moe_lab.config import Backend, check_choice
from moe_lab.jobs.bench_inputs import Inputs, dense_bound, exact_dtype, reference, relative_error
from moe_lab.jobs.peers import PEERS, Arm, grouped_experts_of, ours
from moe_lab.kernels.scatter_add import deterministic_scatter_add
from moe_lab.layer.combine import COMBINE_ARMS
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.layer.plan import plan_local
from moe_lab.layer.router import Routing, count

Build = Callable[[Inputs], Arm]


class Field(NamedTuple):
    """Who may compete in one bench: our own by name, others by name, and the plainest, which sets the budget."""

    backends: Mapping[str, Build]
    peers: Mapping[str, Build]
    plainest: str


class Contest(NamedTuple):
    """Arms that agree, with their errors, why others are left out, and what they run on and against.

    `leaves`: what every arm is called with and gives gradients to. `dense`: products of the same operations, if there
    are any. `num_bytes`: what must be read and written, forward and with backward.
    """

    arms: dict[str, Arm]
    errors: dict[str, float]
    missing: dict[str, str]
    leaves: tuple[Tensor, ...]
    dense: Callable[[], object] | None
    num_bytes: tuple[int, int]


def hold(what: str, inputs: Inputs, backends: Sequence[str] | None = None, peers: Sequence[str] = ()) -> Contest:
    """The contest named `what` on these inputs; `backends` None means all of ours. `ValueError` for unknown names."""
    check_choice("bench", what, FIELDS)
    field = FIELDS[what]
    for kind, names, known in (("backends", backends or (), field.backends), ("peers", peers, field.peers)):
        for name in names:
            check_choice(kind, name, known)
    builds = {name: field.backends[name] for name in (field.backends if backends is None else backends)}
    builds |= {name: field.peers[name] for name in peers}
    inputs, leaves, exact = PROBLEMS[what](inputs)
    plainest = (field.backends | field.peers)[field.plainest](inputs)  # type: ignore[operator]
    budget = 2 * relative_error(_output(plainest, leaves), exact)
    contest = Contest({}, {}, {}, leaves, _dense(what, inputs), _num_bytes(what, inputs))
    for name, build in builds.items():
        try:
            arm = build(inputs)
            error = relative_error(_output(arm, leaves), exact)
        except Exception as failed:  # whatever a library raises that is not here, or was made for other versions
            contest.missing[name] = (str(failed).strip() or repr(failed)).splitlines()[0]
            continue
        if reason := refusal(error, budget, field.plainest):
            contest.missing[name] = reason
        else:
            contest.arms[name], contest.errors[name] = arm, error
    return contest


def refusal(error: float, budget: float, plainest: str) -> str | None:
    """Why an arm of this relative error is not timed, or None."""
    if error <= budget and math.isfinite(error):
        return None
    return f"not equal: error {error:.2e} is above the budget {budget:.2e}, twice that of {plainest!r}"


def _output(arm: Arm, leaves: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return arm.run(*leaves)


# what goes in, and what must come out


def _layer(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...], Tensor]:
    return inputs, (inputs.x_TD, inputs.gates_TK), reference(inputs)


def _experts(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...], Tensor]:
    """Rows that are sorted already: each a token of its own with one expert and gate 1."""
    ids_R = inputs.expert_ids_TK.flatten().sort().values
    rows_RD = inputs.x_TD.repeat(inputs.expert_ids_TK.shape[1], 1)
    gates_R1 = torch.ones(len(ids_R), 1, device=ids_R.device)
    inputs = Inputs(rows_RD, gates_R1, ids_R[:, None], *inputs[3:])
    return inputs, (rows_RD,), reference(inputs)


def _dispatch(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...], Tensor]:
    order_R = inputs.expert_ids_TK.flatten().argsort(stable=True)
    return inputs, (inputs.x_TD,), inputs.x_TD[order_R // inputs.expert_ids_TK.shape[1]]


def _combine(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...], Tensor]:
    _, _, rows_RD = _dispatch(inputs)
    exact = exact_dtype(rows_RD.dtype)
    order_R = inputs.expert_ids_TK.flatten().argsort(stable=True)
    rows = rows_RD.to(exact) * inputs.gates_TK.flatten()[order_R, None].to(exact)
    out_TD = torch.zeros_like(inputs.x_TD, dtype=exact).index_add_(0, order_R // inputs.expert_ids_TK.shape[1], rows)
    return inputs, (rows_RD, inputs.gates_TK), out_TD


PROBLEMS = {"layer": _layer, "experts": _experts, "dispatch": _dispatch, "combine": _combine}


def _dense(what: str, inputs: Inputs) -> Callable[[], object] | None:
    return dense_bound(inputs) if what in ("layer", "experts") else None


def _num_bytes(what: str, inputs: Inputs) -> tuple[int, int]:
    """Least bytes forward, and with backward: gradients are as large as what they are of."""
    tokens, rows = inputs.x_TD[0].nbytes * len(inputs.x_TD), inputs.x_TD[0].nbytes * inputs.expert_ids_TK.numel()
    if what == "dispatch":  # each row is read and written; backward reads rows and writes tokens
        return 2 * rows, 2 * rows + rows + tokens
    if what == "combine":  # backward reads tokens and rows, and writes rows
        return rows + tokens, rows + tokens + 2 * rows + tokens
    used = len(inputs.expert_ids_TK.unique())  # weights that no token chose need not be read
    once = 2 * tokens + sum(used * weight[0].nbytes for weight in inputs[3:])
    return once, 3 * once


# who competes


def _our_experts(backend: str) -> Build:
    def build(inputs: Inputs) -> Arm:
        experts = grouped_experts_of(inputs, backend)
        ends_E = count(inputs.expert_ids_TK, len(inputs.w1_EFD)).cumsum(0, dtype=torch.int32)
        return Arm(lambda rows_RD: experts(rows_RD, ends_E), tuple(experts.parameters()))

    return build


def _our_dispatch(inputs: Inputs) -> Arm:
    num_experts, ids_TK = len(inputs.w1_EFD), inputs.expert_ids_TK
    dispatcher, nothing = LocalTokenDispatcher(num_experts), inputs.gates_TK.new_empty(0, num_experts)
    routing = Routing(inputs.gates_TK, ids_TK, nothing, nothing, count(ids_TK, num_experts))
    return Arm(lambda x_TD: dispatcher.dispatch(x_TD, routing)[0], ())


def _torch_dispatch(inputs: Inputs) -> Arm:
    """A stable argsort of int64 ids, counts by a boolean (T, E) map, and rows by index: what torchtitan runs."""
    ids_TK, num_experts = inputs.expert_ids_TK, len(inputs.w1_EFD)

    def run(x_TD: Tensor) -> Tensor:
        chosen_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.bool, device=ids_TK.device)
        chosen_TE.scatter_(1, ids_TK, True).sum(0)
        return x_TD[torch.argsort(ids_TK.reshape(-1), stable=True) // ids_TK.shape[1]]

    return Arm(run, ())


def _our_combine(arm: str) -> Build:
    def build(inputs: Inputs) -> Arm:
        plan = plan_local(inputs.expert_ids_TK, len(inputs.w1_EFD))
        return Arm(lambda rows_RD, gates_TK: COMBINE_ARMS[arm](rows_RD, gates_TK, plan), ())

    return build


def _added(add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Build:
    """Rows weighted in float32, rounded, and added to zeros by `add(zeros, token of each row, rows)`."""

    def build(inputs: Inputs) -> Arm:
        order_R = inputs.expert_ids_TK.flatten().argsort(stable=True)
        token_R = order_R // inputs.expert_ids_TK.shape[1]

        def run(rows_RD: Tensor, gates_TK: Tensor) -> Tensor:
            weighted_RD = (rows_RD * gates_TK.reshape(-1)[order_R, None]).to(rows_RD.dtype)
            return add(rows_RD.new_zeros(len(gates_TK), rows_RD.shape[1]), token_R, weighted_RD)

        return Arm(run, ())

    return build


def _deterministic(zeros_TD: Tensor, token_R: Tensor, rows_RD: Tensor) -> Tensor:
    return deterministic_scatter_add(zeros_TD, token_R[:, None].expand_as(rows_RD), rows_RD)


BACKENDS = get_args(Backend)
FIELDS: dict[str, Field] = {
    "layer": Field({name: partial(ours, backend=name) for name in BACKENDS}, PEERS, "loop"),
    "experts": Field({name: _our_experts(name) for name in BACKENDS}, {}, "loop"),
    "dispatch": Field({"local": _our_dispatch}, {"torch_sort_index": _torch_dispatch}, "torch_sort_index"),
    "combine": Field(
        {name: _our_combine(name) for name in COMBINE_ARMS},
        {
            "index_add": _added(lambda zeros_TD, token_R, rows_RD: zeros_TD.index_add(0, token_R, rows_RD)),
            "deterministic_2d_index": _added(_deterministic),
        },
        "index_add",
    ),
}
