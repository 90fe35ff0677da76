"""The section `runtime` of conf/config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from src.config.schema.checks import COUNT, PROCESSES, Check, is_int, up_to
from src.config.schema.fields import key

PORT = Check("a port's number, from 1 to 65535", lambda v: v is None or (is_int(v) and 1 <= v <= 65535))
MACHINES = up_to(65_536, "more machines than any cluster has")


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class RuntimeConfig:
    """On what the run computes."""

    device: Device = MISSING
    num_processes: int = key(PROCESSES)
    num_machines: int = key(MACHINES)
    machine_rank: int = key(COUNT)
    main_process_ip: str | None = MISSING
    main_process_port: int | None = key(PORT)
    deterministic: bool = MISSING

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_machines
