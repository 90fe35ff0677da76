"""The process's memory: how much it holds, and that what one step frees is kept for the next."""

import ctypes
import os

import psutil

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings, see malloc.h."""
LARGEST_KEPT = 32 * 2**20  # bytes; the most that glibc allows
KEPT_IN_ALL = 2 * LARGEST_KEPT  # bytes; as many as glibc itself would keep, once it had freed a block of that size


def keep_freed_memory() -> None:
    """Have glibc keep freed memory that is soon allocated again: from the kernel it comes cleared, which takes time.

    Settings of malloc in the environment stay, and with other C libraries nothing is done (docs/decisions/0026).
    """
    set_before = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.getenv("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not set_before:
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, KEPT_IN_ALL)


def resident_bytes() -> int:
    """Return how much memory this process holds now."""
    return int(psutil.Process().memory_info().rss)
