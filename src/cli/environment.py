"""Environment variables that libraries read as they are imported, set in this one place."""

import os
import time
from pathlib import Path
from statistics import median

SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # threads of our own, each with its chunk, are faster
    "HYDRA_MAIN_MODULE": "src.run",  # Hydra names a job by the module of its task function, which is not the entry
}


LOAD, CPU_QUOTA = Path("/proc/loadavg"), Path("/sys/fs/cgroup/cpu.max")
LOOKS, SECONDS_BETWEEN = 5, 0.004


def set_switches() -> None:
    """Set what the user's environment does not: before torch is imported, and in a process that starts others."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and _is_crowded():
        os.environ["GOMP_SPINCOUNT"] = "1000"  # docs/decisions/0007


def _is_crowded() -> bool:
    """Return whether threads that spin while they wait would take time from other work, or from each other.

    They do where the processes that run now need these cores too, or a container may use less time than its cores have.
    What can't be seen, as on other systems than Linux, counts as crowded.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    try:
        num_threads = int(given) if given.isdecimal() else len(os.sched_getaffinity(0))
        if CPU_QUOTA.is_file():
            quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
            if quota != "max" and int(quota) < num_threads * int(period):
                return True
        return _num_others_running() + num_threads > (os.cpu_count() or 1)
    except (OSError, ValueError, AttributeError):
        return True


def _num_others_running() -> float:
    """Return how many threads of the machine run or could, but this one: the median of a few looks."""
    counts = []
    for _ in range(LOOKS):
        running, _all = LOAD.read_text(encoding="ascii").split()[3].split("/")
        counts.append(int(running) - 1)
        time.sleep(SECONDS_BETWEEN)
    return median(counts)
