"""A small byte-level language model with a Mixture-of-Experts in every block.

Bytes in, logits of the next byte out: token t of a sequence is byte t of the text, so a routing trace lines up
with the text it was recorded on without a tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lab.config import Backend, MoEConfig, RouterConfig, check_int
from moe_lab.layer.moe import MoE
from moe_lab.parallel.sequence import MeshShard

VOCAB = 256
SHARD_BYTES = 15 * 2**20


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """`num_layers` blocks of attention and `moe`, over `moe.dim` channels in `num_heads` heads.

    `max_length`: longest sequence in training, in bytes; the model refuses longer ones, whose positions it has
    never seen.
    """

    num_layers: int
    num_heads: int
    max_length: int
    moe: MoEConfig

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "max_length"):
            check_int(name, getattr(self, name), 1)
        if self.moe.dim % (2 * self.num_heads):
            raise ValueError(f"num_heads={self.num_heads} must divide moe.dim={self.moe.dim} into heads of even size")

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> LMConfig:
        """The inverse of `to_dict`, validated."""
        moe = values["moe"]
        return cls(**{**values, "moe": MoEConfig(**{**moe, "router": RouterConfig(**moe["router"])})})


# The shipped model: 11.5 million parameters, 3.2 million of them active a byte.
SMALL = LMConfig(
    num_layers=6,
    num_heads=4,
    max_length=1024,
    moe=MoEConfig(dim=256, hidden_dim=64, num_experts=32, top_k=4, num_shared_experts=1, load_balance_coeff=1e-3),
)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BLD: Float[Tensor, "B L D"], rotary: Float[Tensor, "2 L h"], part: MeshShard | None = None
    ) -> Float[Tensor, "B L D"]:
        """(B, L, D) -> (B, L, D); `rotary` holds cosine and sine (2, L, head/2). `part`: as of the model."""
        q, k, v = self.heads(x_BLD, rotary)
        if part is None:
            return self.attend(q, k, v)
        k, v = part.gather(torch.stack((k, v)))
        return self.attend(q, k, v, part.sees_lL(x_BLD.device))

    def heads(self, x_BLD: Float[Tensor, "B L D"], rotary: Float[Tensor, "2 L h"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, L, D/heads): of each position by itself."""
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        head = (q.shape[-1],)
        q, k = (rotate(F.rms_norm(t, head), rotary) for t in (q, k))
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sees_lL: Bool[Tensor, "l L"] | None = None
    ) -> Float[Tensor, "B l D"]:
        """Queries of l positions to keys and values of L, which each sees as told; without, itself and those before."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees_lL, is_causal=sees_lL is None)
        return self.out(y.transpose(1, 2).flatten(2))


def rotary_table(length: int, head_dim: int, device: torch.device, start: int = 0) -> Float[Tensor, "2 L h"]:
    """Cosine and sine of position * 10000^(-2i/head_dim), from `start` (RoPE, arXiv:2104.09864, eq. 15), float32."""
    exponent = torch.arange(0, head_dim, 2, device=device) / head_dim
    angle = torch.arange(start, start + length, device=device)[:, None] * 10000.0**-exponent
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Float[Tensor, "2 L h"]) -> Tensor:
    """Rotate the halves of each head as pairs, in float32, back to x's dtype."""
    cos, sin = rotary.to(torch.promote_types(x.dtype, torch.float32))
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.moe.dim, eps=1e-6)
        self.attention = Attention(config.moe.dim, config.num_heads)
        self.moe_norm = nn.RMSNorm(config.moe.dim, eps=1e-6)
        self.moe = MoE(config.moe)

    def forward(self, x_BLD: Tensor, rotary: Tensor, part: MeshShard | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). `part`: as of the model."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rotary, part)
        rows_BLD = self.moe_norm(x_BLD)
        return x_BLD + (self.moe(rows_BLD) if part is None else part.run(self.moe, rows_BLD))


class MoELM(nn.Module):
    """Logits of the next byte at every position."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB, config.moe.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.moe.dim, eps=1e-6)
        self.head = nn.Linear(config.moe.dim, VOCAB, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, standard deviation fan_in ** -0.5; branches into the residual divided by sqrt(2 * layers)."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            nn.init.normal_(weight, std=1.0 if name == "embedding.weight" else weight.shape[-1] ** -0.5)
            if name.endswith(("attention.out.weight", "w2_EDF", "shared_experts.w2.weight")):
                weight.data /= (2 * self.config.num_layers) ** 0.5
        nn.init.normal_(self.head.weight, std=0.02)

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE of each block, in order."""
        return [block.moe for block in self.blocks]  # type: ignore[misc]

    def forward(self, bytes_BL: Int[Tensor, "B L"], part: MeshShard | None = None) -> Float[Tensor, "B L V"]:
        """Byte values (B, L), int64 -> logits (B, L, 256) of byte l + 1. `ValueError` beyond `max_length`.

        `part`: bytes are this rank's of longer sequences, as `part.cut` gives them, and so are the logits.
        """
        length = bytes_BL.shape[1] if part is None else part.length
        if length > self.config.max_length:
            raise ValueError(f"sequence of {length} bytes: at most max_length={self.config.max_length}")
        x_BLD = self.embedding(bytes_BL)
        head_dim, start = self.config.moe.dim // self.config.num_heads, 0 if part is None else part.start
        rotary = rotary_table(bytes_BL.shape[1], head_dim, bytes_BL.device, start)
        for block in self.blocks:
            x_BLD = block(x_BLD, rotary, part)
        return self.head(self.norm(x_BLD))

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
        """Write the weights as safetensors shards of at most 15 MiB, rounded to `dtype`; biases stay float32."""
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in self.state_dict().items():
            kept = tensor if name.endswith("expert_bias_E") else tensor.to(dtype)
            used = sum(t.nbytes for t in shards[-1].values())
            if shards[-1] and used + kept.nbytes > SHARD_BYTES:
                shards.append({})
            shards[-1][name] = kept.cpu().contiguous()
        meta = {"moe_lab.lm": json.dumps(self.config.to_dict())}
        paths = [folder / f"model-{i + 1:02d}-of-{len(shards):02d}.safetensors" for i in range(len(shards))]
        for path, shard in zip(paths, shards, strict=True):
            save_file(shard, path, metadata=meta)
        return paths

    @classmethod
    def load(cls, folder: Path, *, backend: Backend = "loop") -> MoELM:
        """The model saved in `folder`, float32, eval mode, on CPU; `backend` is free to differ from training's.

        Raises `ValueError` if shards are missing or foreign.
        """
        state: dict[str, Tensor] = {}
        configs: set[str] = set()
        paths = sorted(Path(folder).glob("model-*-of-*.safetensors"))
        for path in paths:
            with safe_open(path, framework="pt") as file:
                configs.add((file.metadata() or {}).get("moe_lab.lm", ""))
                state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        if len(configs) != 1 or "" in configs:
            raise ValueError(f"{folder} must hold the shards of one saved MoELM, found {[p.name for p in paths]}")
        config = LMConfig.from_dict(json.loads(configs.pop()))
        model = cls(dataclasses.replace(config, moe=config.moe.replace(backend=backend)))
        missing = model.state_dict().keys() ^ state.keys()
        if missing:
            raise ValueError(f"{folder} lacks or has unknown tensors: {sorted(missing)[:5]}")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return model.eval()
