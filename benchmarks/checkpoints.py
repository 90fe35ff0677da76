"""How long training waits for a save, beside torch.save of the same bytes, in turn, in one process.

    python -m benchmarks.checkpoints [--mib 500] [--rounds 9] [--folder FOLDER]

What is saved are the weights of a Llama and AdamW's two moments, float32, --mib of them in all; and before that 10 MiB.
Every way begins with nothing of it on the disk and nothing left to be written:

    stall                 Checkpoints.save with nothing pending, and taking the snapshot: what the loop waits
    torch.save            the same tensors and values into one file
    torch.save + fsync    and until that is on the disk
    whole                 from the beginning of a save until its checkpoint is on the disk, read back and in its place
    at once               what the loop waits for a save that comes straight behind another

Prints the ratios of the medians, stall / torch.save first, which should be at most 1.2, then the medians with the least
and the most. Not a test: figures differ from machine to machine, and with what else it does. Nine rounds of 500 MiB
take half a minute, twice that in memory and three times that on the disk, which is the one of --folder, or else that of
temporary files.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.checkpoint.store import Snapshot, open_checkpoints
from src.config.gate import admit
from src.config.job import Job
from src.runtime.session import rng_as_json
from src.util import sync

MIB = 2**20
SMALL_MIB = 10
NUM_LAYERS = 12
BYTES_A_PARAMETER = 12
"""Of a weight and its two moments."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=500, help="weights and moments in all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write")
    given = parser.parse_args()
    admitted = admit(["tracking=none"]).run
    assert admitted is not None
    for mib in (SMALL_MIB, given.mib):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            compare(mib, Path(folder), given.rounds, admitted)


def compare(mib: int, folder: Path, rounds: int, admitted: Job) -> None:
    """Measure all ways in turn, each round beginning with another one, and print the medians of their seconds."""
    weights = weights_of(mib * MIB // BYTES_A_PARAMETER)
    optimizer = {
        f"{name}/{key}": torch.rand_like(tensor)
        for name, tensor in weights.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    optimizer |= {f"{name}/step": torch.tensor(1.0) for name in weights}
    values = {"step": 1, "config": admitted.frozen}

    def take() -> Snapshot:
        return Snapshot(weights, optimizer, values | {"rng": [rng_as_json(generators())]})

    def save() -> dict[str, float]:
        with open_checkpoints(admitted.config.checkpoint, folder) as checkpoints:
            started = time.perf_counter()
            checkpoints.save(1, take)
            stall = time.perf_counter() - started
            checkpoints.wait()
            return {"stall": stall, "whole": time.perf_counter() - started}

    def save_twice() -> dict[str, float]:
        with open_checkpoints(admitted.config.checkpoint, folder) as checkpoints:
            checkpoints.save(1, take)
            started = time.perf_counter()
            checkpoints.save(2, take)
            return {"at once": time.perf_counter() - started}

    def plain() -> dict[str, float]:
        started = time.perf_counter()
        torch.save({"weights": weights, "optimizer": optimizer, "rng": generators(), **values}, folder / "all.pt")
        seconds = time.perf_counter() - started
        sync(folder / "all.pt")
        return {"torch.save": seconds, "torch.save + fsync": time.perf_counter() - started}

    ways: list[Callable[[], dict[str, float]]] = [save, plain, save_twice]
    measured: dict[str, list[float]] = {}
    for number in range(-1, rounds):  # the first one only warms up
        for i in range(len(ways)):
            empty(folder)
            for name, taken in ways[(number + i) % len(ways)]().items():
                measured.setdefault(name, []).extend([taken] if number >= 0 else [])
    medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
    num_bytes = take().num_bytes
    print(f"{num_bytes / MIB:,.0f} MiB in {len(weights) + len(optimizer)} tensors, medians of {rounds} rounds")
    for name in ("stall", "at once", "whole", "torch.save + fsync"):
        print(f"  {name + ' / torch.save':<34}{medians[name] / medians['torch.save']:8.2f}")
    for name, seconds in measured.items():
        least, most = 1000 * min(seconds), 1000 * max(seconds)
        print(f"  {name:<34}{1000 * medians[name]:8.1f} ms  ({least:.1f} to {most:.1f})")
    print(flush=True)


def weights_of(num_parameters: int) -> dict[str, Tensor]:
    """Make random weights with the names and forms of a Llama of about that size."""
    width = max(8, round(math.sqrt(num_parameters / (12.5 * NUM_LAYERS))))
    inner, vocabulary = round(8 * width / 3), 6 * width
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for layer in range(NUM_LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{kind}_proj.weight": (width, width) for kind in "qkvo"}
        shapes |= {f"{name}.mlp.{kind}_proj.weight": (inner, width) for kind in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{name}.{kind}_layernorm.weight": (width,) for kind in ("input", "post_attention")}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def generators() -> dict[str, object]:
    """Take down where every generator is, as `Runtime.rng_state` does."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def empty(folder: Path) -> None:
    """Leave nothing in a folder, and nothing in memory that has yet to reach the disk."""
    for place in folder.iterdir():
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    os.sync()


if __name__ == "__main__":
    main()
