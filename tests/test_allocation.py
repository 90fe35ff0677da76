"""What a step frees is there for the next one, without the kernel."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HAS_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
STEPS = """
import resource
import sys
import torch
from src.runtime.allocation import keep_freed_memory
from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.runtime.session import start_runtime
from src.runtime.signals import StopRequest

def step():
    kept = [torch.empty(2**20).fill_(1) for _ in range(8)]  # 4 MiB each

with start_runtime(RuntimeConfig(device=Device.cpu, deterministic=False), MixedPrecision.no, 0, StopRequest()):
    keep_freed_memory(int(sys.argv[1]))
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not HAS_GLIBC, reason="only glibc has these settings")
def test_steps_take_no_fresh_pages_from_the_kernel_unless_the_environment_says_how() -> None:
    pages = 20 * 8 * 4 * 2**20 // os.sysconf("SC_PAGE_SIZE")

    def faults(weights_bytes: int = 0, **environment: str) -> int:
        plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        command = [sys.executable, "-c", STEPS, str(weights_bytes)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env={**plain, **environment}
        )
        return int(done.stdout)

    assert faults() < pages / 8
    assert faults(2**30) > pages / 2  # a large model's blocks go back
    assert faults(MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536") > pages / 2
