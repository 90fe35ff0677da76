"""Environment variables that libraries read as they are imported, set in this one place."""

import os

SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # threads of our own, each with its chunk, are faster
    "HYDRA_MAIN_MODULE": "src.run",  # Hydra names a job by the module of its task function, which is not the entry
}


def set_switches() -> None:
    """Set what the user's environment does not: before torch is imported, and in a process that starts others."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:
        # waiting threads spin; with other work on the same cores the default is up to seven times slower
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # docs/decisions/0007
