"""Tensors by name in a safetensors file, written and read one by one: no process holds all that is sharded."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import _TYPES  # the only table of its names of types, which nothing public returns
from torch import Tensor

from src.runtime.sharding import ShardedTensor

Tensors = Mapping[str, Tensor | ShardedTensor]
NAMES = {dtype: name for name, dtype in _TYPES.items()}  # of types in safetensors


def tensors_digest(tensors: Tensors) -> str:
    """Return a hash of names, types, shapes and contents, 32 hex digits."""
    return _digest(one_by_one(tensors))


def stored_digest(path: Path) -> str:
    """Return the same hash of what a file holds, reading one tensor at a time: a mapped file would fill the memory."""
    with safe_open(path, framework="pt", backend="pread") as file:
        sizes = {name: _TYPES[file.get_slice(name).get_dtype()].itemsize for name in sorted(file.keys())}
        return _digest((name, file.get_tensor(name)) for name in _in_order(sizes))


def one_by_one(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Yield each full tensor on the CPU, in the order in which they are written; all processes take part."""
    for name in _in_order({name: one.dtype.itemsize for name, one in tensors.items()}):
        source = tensors[name]
        tensor = source.gather() if isinstance(source, ShardedTensor) else source
        yield name, tensor.detach().to("cpu").contiguous()


def write_tensors(file: Path, tensors: Tensors) -> str:
    """Write a file that safetensors reads; return the digest of what should be in it, or raise an OSError."""
    header, end = {}, 0
    for name in _in_order({name: one.dtype.itemsize for name, one in tensors.items()}):
        one = tensors[name]
        start, end = end, end + one.nbytes
        header[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor begins where its type may
    hashed = xxhash.xxh3_128()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in one_by_one(tensors):
            _add(hashed, name, tensor)
            if tensor.numel():
                out.write(_content(tensor))
    return hashed.hexdigest()


def _in_order(widths: Mapping[str, int]) -> list[str]:
    """Return names with the widest types first, so that no tensor begins where its type may not."""
    return sorted(widths, key=lambda name: (-widths[name], name))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    hashed = xxhash.xxh3_128()
    for name, tensor in tensors:
        _add(hashed, name, tensor)
    return hashed.hexdigest()


def _add(hashed: xxhash.xxh3_128, name: str, tensor: Tensor) -> None:
    hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        hashed.update(_content(tensor))


def _content(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
