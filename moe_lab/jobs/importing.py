"""Turn what a run dumped into a trace that every panel opens.

moe-lab import logits router_logits.pt --top-k 8 --preset olmoe_1b_7b --out mine.safetensors
moe-lab import megatron traces/ --top-k 8 --out mine.safetensors
moe-lab import ids responses.jsonl --num-experts 128 --out mine.safetensors
moe-lab import counts tokens_per_expert.csv --out mine.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_lab.config import PRESETS, RouterConfig, check_choice
from moe_lab.jobs.options import new_file
from moe_lab.study.compare import reproduced
from moe_lab.study.counts import DIMS, CountsTrace
from moe_lab.study.files import read_logits, read_routed_experts
from moe_lab.study.importers import from_routed_experts
from moe_lab.study.megatron import megatron_parts
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.writer import write_trace

KINDS = {
    "logits": "router logits by layer (torch.save or safetensors)",
    "megatron": "folder of Megatron-Core's --moe-routing-trace-path",
    "ids": "routed expert ids of vLLM or SGLang (npy, npz, safetensors, pt, json, jsonl)",
    "counts": "counts by step, layer, rank, expert (json, csv)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab import`."""
    parser.add_argument("kind", choices=KINDS, help="; ".join(f"{name}: {text}" for name, text in KINDS.items()))
    parser.add_argument("path", type=Path, help="file or folder to read")
    parser.add_argument("--out", type=new_file, required=True, help="file to write (safetensors; json for counts)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--preset", choices=sorted(PRESETS), help="route as this model does")
    how.add_argument("--router", help="""RouterConfig as JSON, such as '{"score_func": "sigmoid"}'""")
    parser.add_argument("--top-k", type=int, help="experts a token (logits; ids without a shape)")
    parser.add_argument("--num-experts", type=int, help="how many experts there are (ids; counts; megatron)")
    parser.add_argument("--num-layers", type=int, help="layers of ids without a shape")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to keep (ids)")
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks to read (megatron)")
    parser.add_argument("--model", default="", help="name of the model")
    parser.add_argument("--licence", default="", help="licence of the trace")


def main(args: argparse.Namespace) -> None:
    """Write the trace and say what it holds."""
    if args.kind == "counts":
        counts = CountsTrace.load(args.path, num_experts=args.num_experts)
        args.out.write_text(json.dumps({"dims": DIMS, "counts": counts.counts_SLRE.tolist()}), encoding="utf-8")
        print(counts)
        return
    names = {"model": args.model, "licence": args.licence, "source": args.path.name}
    router = _router(args)
    if args.kind == "megatron":
        parts = megatron_parts(args.path, router=router, num_experts=args.num_experts, ranks=args.ranks, **names)
        write_trace(args.out, parts)
    elif args.kind == "ids":
        if args.num_experts is None:
            raise ValueError("--num-experts is needed: experts that nobody chose leave no sign in ids")
        sequences = read_routed_experts(args.path, num_layers=args.num_layers, top_k=args.top_k)
        from_routed_experts(sequences, args.num_experts, router=router, layers=args.layers, **names).save(args.out)
    else:
        logits, mask = read_logits(args.path)
        top_k = args.top_k or (PRESETS[args.preset].top_k if args.preset else None)
        if top_k is None:
            raise ValueError("--top-k is needed: logits do not say how many experts were chosen")
        config = router or RouterConfig()
        RoutingTrace.from_router_logits(logits, config, top_k, valid=mask, **names).save(args.out)
    trace = RoutingTrace.load(args.out)
    print(trace)
    if args.kind == "megatron" and trace.logits_LTE is not None:
        shares = reproduced(trace)
        print(f"ids are as recorded; the recorded logits lead to {100 * float(shares.mean()):.2f} % of them again,")
        print(f"to {100 * float(shares.min()):.2f} % in layer {trace.info.layers[int(shares.argmin())]}, the worst")


def read_source(
    path: str | Path,
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    router: RouterConfig | None = None,
) -> RoutingTrace | CountsTrace:
    """Whatever routing is kept at a path, by what it holds: a trace, or what `moe-lab import` turns into one.

    A folder is Megatron-Core's; CSV and JSON with counts are counts; tensors of floating-point numbers are logits
    (`top_k` needed), of integers expert ids (`num_experts` needed). Raises `ValueError` for what is none of these,
    naming what is missing.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return RoutingTrace.concatenate(list(megatron_parts(path, router=router, num_experts=num_experts)))
    if not path.exists():
        raise ValueError(f"{str(path)!r} does not exist")
    if path.suffix == ".csv":
        return CountsTrace.load(path, num_experts=num_experts)
    readers = {
        ".safetensors": (_as_trace, _as_logits, _as_ids),
        ".json": (_as_counts, _as_ids),
        ".jsonl": (_as_ids,),
        ".npy": (_as_ids,),
        ".npz": (_as_ids,),
    }.get(path.suffix, (_as_logits, _as_ids))
    reasons: dict[str, list[str]] = {}
    for read in readers:
        try:
            return read(path, top_k, num_experts, router)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(read.__name__.removeprefix("_as_"))
    told = "; as ".join(f"{' or '.join(kinds)}: {reason}" for reason, kinds in reasons.items())
    raise ValueError(f"{str(path)!r} is no routing that is known. As {told}")


def _as_trace(path: Path, top_k: int | None, num_experts: int | None, router: RouterConfig | None) -> RoutingTrace:
    return RoutingTrace.load(path)


def _as_counts(path: Path, top_k: int | None, num_experts: int | None, router: RouterConfig | None) -> CountsTrace:
    return CountsTrace.load(path, num_experts=num_experts)


def _as_logits(path: Path, top_k: int | None, num_experts: int | None, router: RouterConfig | None) -> RoutingTrace:
    logits, mask = read_logits(path)
    if not all(layer.is_floating_point() for layer in logits):
        raise ValueError("its tensors hold integers")
    if top_k is None:
        raise ValueError("top_k is needed: logits do not say how many experts were chosen (open_panel(path, top_k=8))")
    return RoutingTrace.from_router_logits(logits, router or RouterConfig(), top_k, valid=mask, source=path.name)


def _as_ids(path: Path, top_k: int | None, num_experts: int | None, router: RouterConfig | None) -> RoutingTrace:
    sequences = read_routed_experts(path, top_k=top_k)
    if any(ids.is_floating_point() for ids in sequences):
        raise ValueError("its tensors hold floating-point numbers")
    if num_experts is None:
        raise ValueError(
            "num_experts is needed: experts that nobody chose leave no sign in ids (open_panel(path, num_experts=64))"
        )
    return from_routed_experts(sequences, num_experts, router=router, source=path.name)


def _router(args: argparse.Namespace) -> RouterConfig | None:
    if args.preset:
        return PRESETS[args.preset].router
    if not args.router:
        return None
    try:
        fields = json.loads(args.router)
    except ValueError as error:
        raise ValueError(f"--router is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("--router must be a JSON object of RouterConfig's fields")
    for name in fields:
        check_choice("--router field", name, RouterConfig.__dataclass_fields__)
    return RouterConfig(**fields)
