"""Which GPUs there are, and which of several jobs gets which. No torch here: it would start CUDA in this process."""

import os
import subprocess
from collections.abc import Mapping, Sequence


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty where there are none."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one.strip() for one in visible.split(",") if one.strip() and one.strip() != "-1"]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.split()


def shares(devices: Sequence[str], count: int, each: int) -> list[list[str]]:
    """Return the devices of each of `count` jobs that take `each` of them; where there are too few, jobs share them."""
    if not devices:
        return [[] for _ in range(count)]
    wanted = min(each, len(devices))
    return [[devices[(job * wanted + i) % len(devices)] for i in range(wanted)] for job in range(count)]


def threads_each(count: int, processes: int = 1, environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many CPU threads each process of `count` jobs computes with; None where torch decides."""
    if "OMP_NUM_THREADS" in environment or count == 1:
        return None
    return max(1, len(os.sched_getaffinity(0)) // (count * processes))
