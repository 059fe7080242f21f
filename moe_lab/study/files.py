"""Reading the files that routing is kept in. What they hold is data, never code: a pickle is refused.

Every function raises `ValueError`, naming the file, for one that is unreadable or holds something else.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

MAX_JSON_FILE = 2**30
TORCH_SAVE = (".pt", ".pth", ".bin")
_T = TypeVar("_T")


def read_logits(path: str | Path) -> tuple[list[Tensor], Tensor | None]:
    """Router logits, one tensor a layer, and the attention mask if the file has one.

    A file of `torch.save` (read with `weights_only=True`): a tuple of tensors or one (L, T, E), or a dict with
    "router_logits" and perhaps "attention_mask". Or safetensors: one tensor "router_logits" (L, T, E), or one a
    layer, in the order of the numbers in their names.
    """
    return _guarded(Path(path), _logits)


def read_tensors(path: str | Path) -> Any:
    """What a file of `torch.save` (with `weights_only=True`) or of safetensors holds."""
    return _guarded(Path(path), _tensors)


def read_routed_experts(path: str | Path, *, num_layers: int | None = None, top_k: int | None = None) -> list[Tensor]:
    """Expert ids (tokens, layers, K), one tensor a sequence.

    `.npy` and `.npz`, `.safetensors`, a file of `torch.save`, or JSON (`.json`, `.jsonl`): responses of a server
    with "prompt_routed_experts" and "routed_experts", as nested lists or base64. Base64 holds a .npy file (vLLM),
    or bare int32 (SGLang), for which `num_layers` and `top_k` must be given.
    """
    return _guarded(Path(path), lambda path: _routed_experts(path, num_layers, top_k))


def _guarded(path: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(path)
    except Exception as error:  # a hostile file makes readers raise anything
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read: {text:.300}") from error


def _tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in TORCH_SAVE:
        raise ValueError(f"its kind {path.suffix!r} is not known: must be {', '.join(TORCH_SAVE)} or .safetensors")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to run what the file holds
        raise ValueError(
            "it is no file of torch.save, or holds more than tensors: save these alone, such as output.router_logits"
        ) from error


def _logits(path: Path) -> tuple[list[Tensor], Tensor | None]:
    content, mask = _tensors(path), None
    if isinstance(content, dict):
        mask = content.pop("attention_mask", None)
        content = content.pop("router_logits", content)
    if isinstance(content, dict):
        numbered = [(re.findall(r"\d+", name), value) for name, value in content.items() if isinstance(name, str)]
        if not all(numbers for numbers, _ in numbered):
            raise ValueError("it has no 'router_logits', nor tensors with a layer's number in their names")
        content = [value for _, value in sorted(numbered, key=lambda pair: [int(n) for n in pair[0]])]
    layers = list(content.unbind()) if isinstance(content, Tensor) and content.dim() >= 3 else content
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, Tensor) for layer in layers):
        raise ValueError("it must hold one tensor a layer")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError("its attention_mask must be a tensor")
    return list(layers), mask


def _routed_experts(path: Path, num_layers: int | None, top_k: int | None) -> list[Tensor]:
    if path.suffix in (".json", ".jsonl"):
        if path.stat().st_size > MAX_JSON_FILE:
            raise ValueError(f"is larger than {MAX_JSON_FILE:,} bytes")
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        values = [value for line in lines if line.strip() for value in _routed_values(json.loads(line))]
        if not values:
            raise ValueError("it has neither 'routed_experts' nor 'prompt_routed_experts'")
        return [_decode(value, num_layers, top_k) for value in values]
    if path.suffix in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    content = _tensors(path)
    tensors = (
        [content] if isinstance(content, Tensor) else list(content.values() if isinstance(content, dict) else content)
    )
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError("it must hold tensors of expert ids")
    return tensors


def _routed_values(content: Any) -> Iterator[Any]:
    """What stands under the names of routed experts anywhere in a response, in order."""
    if isinstance(content, list):
        for item in content:
            yield from _routed_values(item)
    elif isinstance(content, dict):
        for name, value in content.items():
            if name in ("prompt_routed_experts", "routed_experts"):
                if value is not None:
                    yield value
            else:
                yield from _routed_values(value)


def _decode(value: Any, num_layers: int | None, top_k: int | None) -> Tensor:
    if not isinstance(value, str):
        array = np.asarray(value)
        if array.dtype.kind != "i":
            raise ValueError("routed experts must be nested lists of integers")
        return torch.from_numpy(array)
    content = base64.b64decode(value, validate=True)
    if content.startswith(b"\x93NUMPY"):
        return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    if num_layers is None or top_k is None:
        raise ValueError("its ids are bare int32: num_layers and top_k must be given (moe-lab import ids)")
    return torch.from_numpy(np.frombuffer(content, dtype="<i4").reshape(-1, num_layers, top_k).copy())
