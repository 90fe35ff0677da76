"""What a step frees is there for the next one, without the kernel."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, towline

HAS_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def count_faults(_arguments: list[str]) -> int:
    """Print how many fresh pages twenty steps take from the kernel."""
    import resource

    import torch

    from src.config.schema import Device, MixedPrecision, RuntimeConfig
    from src.runtime.session import start_runtime
    from src.runtime.signals import StopRequest

    def step() -> None:
        _kept = [torch.empty(2**20).fill_(1) for _ in range(8)]  # 4 MiB each

    with start_runtime(RuntimeConfig(device=Device.cpu, deterministic=False), MixedPrecision.no, 0, StopRequest()):
        step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0


@pytest.mark.skipif(not HAS_GLIBC, reason="only glibc has these settings")
def test_steps_take_no_fresh_pages_from_the_kernel_unless_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = 20 * 8 * 4 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    for name in [name for name in os.environ if "MALLOC" in name]:
        monkeypatch.delenv(name)
    assert int(towline(main=count_faults).stdout) < pages / 8
    own = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}  # read where a process starts
    command = [sys.executable, "-c", "import sys; from tests import test_allocation as t; t.count_faults([])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | own)
    assert int(done.stdout) > pages / 2
