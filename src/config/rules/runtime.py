"""Rules of `runtime`."""

from collections.abc import Iterator

from src.config.problems import Problem
from src.config.rules.rule import applies_to
from src.config.schema import RuntimeConfig


@applies_to("run")
def machines_can_meet(runtime: RuntimeConfig) -> Iterator[Problem]:
    if runtime.machine_rank >= runtime.num_machines:
        reason = f"counts from 0 to runtime.num_machines - 1, which is {runtime.num_machines - 1}"
        yield Problem("runtime.machine_rank", reason, runtime.machine_rank)
    if runtime.num_machines > 1 and runtime.main_process_ip is None:
        yield Problem("runtime.main_process_ip", "several machines need the address of the one with rank 0", None)
