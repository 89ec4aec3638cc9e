"""Random weights that a name decides, and files of any size written from them one tensor at a time.

A tensor's values depend on the seed, on what file it stands in and on its name, so that neither the order of
writing nor the number of shards changes them. They are uniform, taken from the raw bits of a PCG64 stream and
scaled, which is the same on every machine and with every release of numpy. OpenVLA's 15 GB took a minute of
one core and 250 MB of memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ACTION_IDS = (31_744, 32_000)
# Trained models answer with action tokens alone; random ones do where these rows of the lm_head are larger.
ACTION_GAIN = 3.0
_CHUNK = 1 << 18  # a multiple of four; small enough for the cache
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Spec:
    """One tensor: its shape, its type on disk, and the file it is told apart by where names repeat."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    file: str = ""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


Specs = Mapping[str, Spec]


def random_tensor(name: str, spec: Spec, seed: int) -> Tensor:
    """The whole tensor at once."""
    data = b"".join(_bytes(name, spec, seed))
    return torch.frombuffer(bytearray(data), dtype=spec.dtype).view(spec.shape)


def write_safetensors(path: Path, specs: Specs, seed: int) -> None:
    """One safetensors file; at most a chunk of one tensor is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            file.writelines(_bytes(name, spec, seed))


def write_shards(directory: Path, specs: Specs, seed: int, shards: int) -> None:
    """At most ``shards`` files of about equal size and their index, named as Hugging Face names them."""
    total = sum(spec.nbytes for spec in specs.values())
    groups: dict[int, dict[str, Spec]] = {}
    done = 0
    for name, spec in specs.items():
        middle = done + spec.nbytes // 2
        groups.setdefault(middle * shards // total, {})[name] = spec
        done += spec.nbytes
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups.values(), start=1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(directory / file, group, seed)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_pickle(path: Path, parts: Mapping[str, Specs] | Specs, seed: int, wrap: str | None = None) -> None:
    """What ``torch.save`` makes of a state dict, or of ``{wrap: {part: state dict}}``.

    The values first go to a temporary file beside it, from which they are mapped while torch writes: twice
    the disk, and no memory but pages of that file, which the system takes back when it needs them.
    """
    specs: dict[str, Spec] = {}
    for key, value in parts.items():
        # Parts are told apart so that an EMA weight is not the plain one again.
        specs |= {key: value} if isinstance(value, Spec) else {f"{key}/{n}": s for n, s in value.items()}
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        starts = {}
        for name, spec in specs.items():
            scratch.write(bytes(-scratch.tell() % 64))
            starts[name] = scratch.tell()
            scratch.writelines(_bytes(name, spec, seed))
        scratch.flush()
        mapped = np.memmap(scratch, np.uint8, "r+")
        tensors = {}
        for name, spec in specs.items():
            data = torch.from_numpy(mapped[starts[name] : starts[name] + spec.nbytes])
            tensors[name] = data.view(spec.dtype).view(spec.shape)
        if wrap is None:
            torch.save(tensors, path)
            return
        nested: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            nested.setdefault(part, {})[rest] = tensor
        torch.save({wrap: nested}, path)


def _bytes(name: str, spec: Spec, seed: int) -> Iterator[bytes]:
    offset, gain = _law(name, spec.shape)
    digest = hashlib.sha256(f"{seed}/{spec.file}/{name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:16], "little"))
    for start in range(0, spec.count, _CHUNK):
        count = min(_CHUNK, spec.count - start)
        values = _uniform(bits, count) * np.float32(gain) + np.float32(offset)
        if name.endswith("lm_head.weight"):
            rows = np.arange(start, start + count) // spec.shape[1]
            values[(rows >= ACTION_IDS[0]) & (rows < ACTION_IDS[1])] *= np.float32(ACTION_GAIN)
        yield torch.from_numpy(values).to(spec.dtype).view(torch.uint8).numpy().tobytes()


def _uniform(bits: np.random.PCG64, count: int) -> npt.NDArray[np.float32]:
    """``count`` values of mean 0 and variance 1, 16 bits each."""
    raw = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
    deviation = math.sqrt((65_536**2 - 1) / 12)
    return (raw.astype(np.float32) - np.float32(32_767.5)) * np.float32(1 / deviation)


def _law(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation that keep activations near 1 and outputs different from one input to the next."""
    if name.endswith((".gamma", ".scale_factor")):
        return 0.75, 0.14
    if name.endswith(("pos_embed", "cls_token", "reg_token", "latent", "positional_embedding")):
        return 0.0, 0.5
    if name.endswith(("embed_tokens.weight", "uncondition")):
        return 0.0, 1.0
    if name.endswith("bias"):
        return 0.0, 0.05
    if "gemma" in name and name.endswith("norm.weight"):  # of which Gemma stores what is above 1
        return 0.0, 0.3
    if len(shape) == 1:
        return 1.0, 0.1
    # Random queries and keys would look at everything alike; these choose.
    sharp = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")) else 1.0
    return 0.0, sharp / math.sqrt(math.prod(shape[1:]))
