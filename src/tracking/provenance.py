"""Where a run comes from: code, versions, hardware, data and configuration."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from src import secrets
from src.config import plugins
from src.config.frozen import config_hash
from src.tracking.secrets_in_code import clean_code

PACKAGES = (
    *("torch", "transformers", "tokenizers", "accelerate", "datasets"),
    *("mlflow", "hydra-core", "omegaconf", "numpy"),
)
MAX_DIFF = 200_000  # characters of `git diff` that are kept


def provenance(frozen: Mapping[str, Any], data_hashes: Mapping[str, str], device: str, project: Path) -> dict[str, Any]:
    """Collect what is needed to know later what a run was.

    Args:
        data_hashes: file -> SHA-256 of its content.
        device: the device's name, as the runtime describes it.
        project: the folder whose git state counts.
    """
    section = frozen.get("deepspeed", {})  # a file is the JSON that was read when the configuration was composed
    is_file = section.get("type") == "file"
    deepspeed_file = {"deepspeed": {section["config_file"]: section["sha256"]}} if is_file else {}
    return {
        "command": secrets.cleaned(sys.orig_argv),
        "config_hash": config_hash(frozen),
        "git": git_state(project),
        "data": dict(data_hashes),
        **deepspeed_file,
        "plugins": {name: asdict(plugin) for name, plugin in plugins.imported(frozen).items()},
        "python": platform.python_version(),
        "versions": versions(),
        "hardware": {
            "device": device,
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpu_count": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
    }


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state(project: Path) -> dict[str, Any]:
    """Return the commit, whether files differ from it, and the difference; nulls outside a git checkout."""
    commit = _git(project, ["rev-parse", "HEAD"])
    status = _git(project, ["status", "--porcelain"])
    if commit is None or status is None:
        return {"commit": None, "dirty": None, "diff": None}
    secrets.know_environment()
    diff = clean_code(_git(project, ["diff", "HEAD"]) or "")
    return {"commit": commit.strip(), "dirty": bool(status.strip()), "diff": diff[:MAX_DIFF]}


def _git(project: Path, arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=project, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace")
