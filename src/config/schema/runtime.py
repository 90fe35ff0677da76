"""The section `runtime` of conf/config.yaml."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from src.config.schema.checks import COUNT, PROCESSES, Check, is_int, up_to
from src.config.schema.fields import BY_OUTCOME, Impact, key

PORT = Check("a port's number, from 1 to 65535", lambda v: v is None or (is_int(v) and 1 <= v <= 65535))
MACHINES = up_to(65_536, "more machines than any cluster has")


Device = StrEnum("Device", "auto cpu cuda")


_key = partial(key, read_by_predict=True)


@dataclass
class RuntimeConfig:
    """On what the run computes."""

    device: Device = _key(resume=BY_OUTCOME)
    num_processes: int = _key(PROCESSES, resume=BY_OUTCOME)
    num_machines: int = _key(MACHINES, resume=BY_OUTCOME)
    machine_rank: int = _key(COUNT, resume=BY_OUTCOME)
    main_process_ip: str | None = _key(resume=BY_OUTCOME)
    main_process_port: int | None = _key(PORT, resume=BY_OUTCOME)
    deterministic: bool = _key(resume=Impact.rounding)

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_machines
