"""Train the small language model on a prepared corpus; stop and resume to the bit.

Every step draws its crops from its own number, so a run is a function of the config alone, and a resumed run
walks on as if it had never stopped. Weights are float32; the forward and backward run in `dtype`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moe_lab.config import Backend, DropPolicy, check_choice, check_int
from moe_lab.jobs.corpus_file import Corpus, load_corpus
from moe_lab.jobs.evaluate import as_tensor, bits
from moe_lab.layer.losses import switch_loss, transformers_loss, z_loss
from moe_lab.layer.router import Routing
from moe_lab.models.lm import SMALL, LMConfig, MoELM
from moe_lab.parallel.sharding import clip_grad_norm
from moe_lab.study.metrics import load_imbalance

LOSSES = ("switch", "sequence", "global", "hf", "z")
NUMBERS = {  # options that are fields of the same name
    "steps": "optimizer steps",
    "batch": "crops a step",
    "accumulate": "micro-batches that a step's crops are taken in",
    "switch_parts": "parts of a micro-batch that the switch loss counts by themselves",
    "warmup": "steps until the learning rate is whole",
    "seed": "of weights and crops",
    "log_every": "steps a line of the log",
    "save_every": "steps a checkpoint",
    "learning_rate": "of AdamW, at its highest",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`steps` of `batch` crops of the model's `max_length` bytes; AdamW, warm-up, then cosine to a tenth.

    Weights of the auxiliary losses of `moe_lab.layer.losses`, summed over layers: `switch_coeff` counts each
    micro-batch by itself, or each of `switch_parts` equal parts of it, as so many ranks would, and averages;
    `sequence_coeff` each crop; `global_coeff` the step's micro-batches so far over all ranks (Megatron-Core);
    `hf_coeff` pools the layers as transformers does; `z_coeff` is the z-loss. Bias, drops, Sinkhorn and jitter are
    settings of the model's layers.

    `accumulate`: micro-batches that a step's batch is taken in, one after another; losses are of each, averaged.
    The balancing bias moves once a step, by all of them.

    `log_every` steps make one line of the log; `save_every` steps one checkpoint and one held-out evaluation
    over `eval_files` files a domain.
    """

    model: LMConfig = SMALL
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    switch_coeff: float = 0.0
    sequence_coeff: float = 0.0
    global_coeff: float = 0.0
    hf_coeff: float = 0.0
    z_coeff: float = 0.0
    switch_parts: int = 1
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    log_every: int = 20
    save_every: int = 500
    eval_files: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "switch_parts", "warmup", "log_every", "save_every", "eval_files"):
            check_int(name, getattr(self, name), 1)
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch={self.batch}")
        if self.batch % (self.accumulate * self.switch_parts):
            raise ValueError(f"switch_parts={self.switch_parts} must divide the crops of a micro-batch")
        check_choice("dtype", self.dtype, DTYPES)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be a positive number")
        for name in (f"{loss}_coeff" for loss in LOSSES):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number >= 0")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def heldout_bits(model: MoELM, corpus: Corpus, files: int | None = None) -> dict[str, float]:
    """Held-out bits per byte by domain and over `all`, over the first `files` files of each (None: all of them)."""
    model.eval()
    by_domain = {
        domain: torch.cat(bits(model, [as_tensor(text) for text in islice(corpus.heldout.texts(domain), files)]))
        for domain in corpus.heldout.domains
    }
    return {
        name: float(bits_B.mean()) for name, bits_B in (by_domain | {"all": torch.cat([*by_domain.values()])}).items()
    }


class Losses(NamedTuple):
    """Cross-entropy in nats a byte, and what the auxiliary losses add to it."""

    cross_entropy: Tensor
    auxiliary: Tensor


class Step(NamedTuple):
    """What one optimizer step left behind, on the device: losses, gradient norm, assignments."""

    losses: Losses
    grad_norm: Tensor
    counts_LE: Tensor


def auxiliary_loss(
    config: TrainConfig, routings: Sequence[Routing], batch: int, counts_LE: Tensor | None = None
) -> Tensor:
    """The weighted losses of every layer's routing of `batch` crops, as long as each other, summed over layers.

    `counts_LE`: assignments of the step, for the global loss.
    """
    tokens = len(routings[0].scores_TE)
    token_T = torch.arange(tokens, device=routings[0].scores_TE.device)
    total = torch.zeros((), device=token_T.device)
    if counts_LE is not None:
        for routing, counts_E in zip(routings, counts_LE):
            loss = switch_loss(routing.scores_TE, routing.expert_ids_TK, counts_E=counts_E)
            total = total + config.global_coeff * loss
    for coeff, parts in ((config.switch_coeff, config.switch_parts), (config.sequence_coeff, batch)):
        if coeff:
            part_T = None if parts == 1 else token_T // (tokens // parts)
            for routing in routings:
                loss = switch_loss(routing.scores_TE, routing.expert_ids_TK, sequence_T=part_T)
                total = total + coeff * loss
    if config.hf_coeff:
        top_k = routings[0].expert_ids_TK.shape[1]
        total = total + config.hf_coeff * transformers_loss([routing.logits_TE for routing in routings], top_k)
    if config.z_coeff:
        for routing in routings:
            total = total + config.z_coeff * z_loss(routing.logits_TE)
    return total


Groups = list[tuple[list[torch.nn.Parameter], float]]


class TrainingDiverged(RuntimeError):
    """The loss or a gradient was NaN or infinite; the message names the step and the checkpoint that is left."""


class Trainer:
    """A model, its optimizer and the number of the next step, in one place that can be saved and restored."""

    checkpoint = "checkpoint.pt"
    leads = True  # whether this process writes the log

    def __init__(self, config: TrainConfig, corpus: Corpus, device: str) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus, self.device = config, corpus, device
        self.model = self.spread(MoELM(config.model).to(device))
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [(decayed, config.weight_decay), (plain, 0.0)]
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay} for params, decay in self.split(groups)],
            betas=(0.9, 0.95),
            fused=True,
        )
        self.step = 0
        self.text_B = corpus.train_U8.to(device)
        self._routings: list[Routing] = []
        for moe in self.model.moe_layers:
            moe.router.register_forward_hook(lambda router, args, routing: self._routings.append(routing))
        losses = self._losses
        self.losses: Callable[[Tensor], Losses] = torch.compile(losses) if config.compile else losses

    def spread(self, model: MoELM) -> MoELM:
        """The model as it is trained: here, whole."""
        return model

    def split(self, groups: Groups) -> Groups:
        """Parameters that the optimizer may step together, each with its weight decay."""
        return groups

    def _losses(self, bytes_BL: Tensor) -> Losses:
        """Mean over each next byte. Weights but the gates' are rounded to `dtype` first."""
        dtype = DTYPES[self.config.dtype]
        weights = {name: p if ".router." in name else p.to(dtype) for name, p in self.model.named_parameters()}
        self._routings.clear()
        logits_BLV = torch.func.functional_call(self.model, weights, (bytes_BL[:, :-1],))
        auxiliary = auxiliary_loss(self.config, self._routings, len(bytes_BL), self.counts())
        self._routings.clear()
        return Losses(F.cross_entropy(logits_BLV.flatten(0, 1).float(), bytes_BL[:, 1:].flatten()), auxiliary)

    def counts(self) -> Tensor | None:
        """Assignments (L, E) of the step so far, this micro-batch's among them; None where no loss asks for them."""
        if not self.config.global_coeff:
            return None
        return torch.stack([moe.tokens_per_expert_E for moe in self.model.moe_layers])

    def batch(self, step: int) -> Tensor:
        """The crops of a step, (batch, max_length + 1) int64."""
        length = self.config.model.max_length + 1
        if len(self.text_B) < length:
            raise ValueError(f"corpus has {len(self.text_B)} training bytes: at least {length} are needed")
        # The generator reads the low 32 bits of its seed only; runs of less than a million steps stay apart.
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) % 2**32)
        start_B = torch.randint(len(self.text_B) - length + 1, (self.config.batch,), generator=generator)
        index_BL = start_B[:, None] + torch.arange(length)
        return self.text_B[index_BL.to(self.device)].long()

    def advance(self) -> Step:
        """One optimizer step. Raises `TrainingDiverged`, before the weights move, if it is not finite."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.gradients(self.batch(self.step))
        norm = self.clip()
        if not norm.isfinite():
            raise TrainingDiverged(
                f"step {self.step + 1}: loss {losses.cross_entropy.item()}, gradient norm {norm.item()}; "
                "the weights and the last checkpoint are from before it"
            )
        self.optimizer.step()
        counts_LE = self.balance()
        self.step += 1
        return Step(losses, norm.detach(), counts_LE)

    def gradients(self, bytes_BL: Tensor) -> Losses:
        """Those of the mean over micro-batches, added to the weights'; that mean."""
        parts = []
        for part_BL in bytes_BL.chunk(self.config.accumulate):
            losses = self.losses(part_BL)
            ((losses.cross_entropy + losses.auxiliary) / self.config.accumulate).backward()
            parts.append([loss.detach() for loss in losses])
        return Losses(*(torch.stack(values).mean() for values in zip(*parts)))

    def clip(self) -> Tensor:
        """The gradient's norm, which is then at most `config.clip`."""
        return clip_grad_norm(self.model.parameters(), self.config.clip)

    def balance(self) -> Tensor:
        """Move the balancing biases; the step's assignments (L, E)."""
        counts_LE = torch.stack([moe.tokens_per_expert_E for moe in self.model.moe_layers])
        for moe in self.model.moe_layers:
            moe.update_expert_bias()
        return counts_LE

    def save(self, path: Path) -> None:
        """Write a checkpoint beside the last one and swap: a kill leaves one of the two whole."""
        state = {
            "step": self.step,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same config; `ValueError` names the first field that differs."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.compare(state["config"], path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def compare(self, theirs: dict[str, Any], path: Path) -> None:
        """`ValueError` naming the first field of a checkpoint's config that differs from this run's."""
        for name, value in self.config.to_dict().items():
            if theirs.get(name) != value:
                raise ValueError(f"{path} was trained with {name}={theirs.get(name)!r}, not {value!r}: cannot resume")


def train(
    config: TrainConfig,
    corpus: Corpus,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    stop: int | None = None,
    progress: bool = True,
    make: Callable[[TrainConfig, Corpus, str], Trainer] = Trainer,
) -> Trainer:
    """Run to `config.steps` (or `stop`), logging to `out/log.jsonl` and checkpointing to `out/checkpoint.pt`.

    `progress`: show a bar. `make`: what trains. Many ranks each call this with one that knows of the others; one of
    them leads.
    Raises `TrainingDiverged` at the first step whose gradient is not finite; the checkpoint is then the last one
    written before it.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = make(config, corpus, device)
    if resume:
        trainer.resume(out / trainer.checkpoint)
    steps: list[Step] = []
    started = time.monotonic()
    with (
        (out / "log.jsonl" if trainer.leads else Path(os.devnull)).open("a" if resume else "w") as log,
        tqdm(
            total=config.steps,
            initial=trainer.step,
            desc="train",
            unit="step",
            file=sys.stderr,
            disable=not (trainer.leads and progress),
        ) as bar,
    ):
        last = min(stop or config.steps, config.steps)
        while trainer.step < last:
            steps.append(trainer.advance())
            save = trainer.step % config.save_every == 0 or trainer.step == last
            if not save and trainer.step % config.log_every:
                continue
            line = _log_line(trainer, steps) | {"seconds": round(time.monotonic() - started, 3)}
            steps.clear()
            if save:
                trainer.save(out / trainer.checkpoint)
                line["heldout_bits_per_byte"] = heldout_bits(trainer.model, corpus, config.eval_files)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update(trainer.step - bar.n)
            bar.set_postfix(bits_per_byte=f"{line['bits_per_byte']:.3f}")
    return trainer


def _log_line(trainer: Trainer, steps: list[Step]) -> dict[str, Any]:
    """Means over the steps since the last line."""
    loss, auxiliary = (torch.stack(values).double().mean() for values in zip(*(step.losses for step in steps)))
    grad_norm = torch.stack([step.grad_norm for step in steps]).double().mean()
    return {
        "step": trainer.step,
        "bytes": trainer.step * trainer.config.batch * trainer.config.model.max_length,
        "bits_per_byte": float(loss) / math.log(2),
        "auxiliary_loss": float(auxiliary),
        "grad_norm": float(grad_norm),
        "learning_rate": trainer.config.rate(trainer.step - 1),
        "max_over_mean": [round(load_imbalance(c).max_over_mean, 4) for c in steps[-1].counts_LE.cpu()],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab train`."""
    default = TrainConfig()
    parser.add_argument("--corpus", type=Path, required=True, help="file written by moe-lab corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--no-balancing", action="store_true", help="train without the balancing bias")
    parser.add_argument("--capacity-factor", type=float, help="drop what experts have no room for (default: nothing)")
    parser.add_argument(
        "--drop-policy",
        default=SMALL.moe.drop_policy,
        choices=get_args(DropPolicy),
        help="which assignments are dropped",
    )
    for name in LOSSES:
        parser.add_argument(f"--{name}-coeff", type=float, default=0.0, help=f"weight of the {name} loss of each layer")
    parser.add_argument(
        "--backend", default=SMALL.moe.backend, choices=get_args(Backend), help="how experts are computed"
    )
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts, under torchrun")
    parser.add_argument("--sp", type=int, default=1, help="ranks that share each sequence, under torchrun")
    parser.add_argument("--checkpointing", action="store_true", help="run blocks again in backward, under torchrun")
    parser.add_argument("--fixed-order", action="store_true", help="sum gradients in the order of ranks")
    parser.add_argument("--compile", action="store_true", help="compile the loss")
    parser.add_argument("--dtype", default=default.dtype, choices=tuple(DTYPES))
    for name, what in NUMBERS.items():
        kind = type(getattr(default, name))
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=getattr(default, name), help=f"{what} (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Train, then write the weights and the held-out bits per byte of every domain."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={args.device!r}: PyTorch sees no GPU here, choose 'cpu'")
    coeff = None if args.no_balancing else SMALL.moe.load_balance_coeff
    moe = SMALL.moe.replace(
        backend=args.backend,
        load_balance_coeff=coeff,
        capacity_factor=args.capacity_factor,
        drop_policy=args.drop_policy,
    )
    names = (
        "steps",
        "batch",
        "accumulate",
        "warmup",
        "seed",
        "log_every",
        "save_every",
        "learning_rate",
        *(f"{loss}_coeff" for loss in LOSSES),
        "switch_parts",
        "dtype",
        "compile",
    )
    config = TrainConfig(model=dataclasses.replace(SMALL, moe=moe), **{name: getattr(args, name) for name in names})
    corpus = load_corpus(args.corpus)
    if "RANK" in os.environ:
        from moe_lab.jobs.train_distributed import train_on_ranks

        options = {name: getattr(args, name) for name in ("ep", "sp", "checkpointing", "fixed_order")}
        train_on_ranks(config, corpus, args.out, device=args.device, resume=args.resume, **options)
        return
    if args.ep != 1 or args.sp != 1 or args.checkpointing or args.fixed_order:
        raise ValueError(
            "ep, sp, checkpointing and fixed_order are for many ranks: start with torchrun -m moe_lab train"
        )
    trainer = train(config, corpus, args.out, device=args.device, resume=args.resume)
    trainer.model.save(args.out / "lm")
    # What is reported is what was saved: rounded weights, float32 arithmetic.
    model = MoELM.load(args.out / "lm").to(args.device)
    report = {
        "config": config.to_dict(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "torch": str(torch.__version__),
        "heldout_bits_per_byte": heldout_bits(model, corpus),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["heldout_bits_per_byte"], indent=1))
