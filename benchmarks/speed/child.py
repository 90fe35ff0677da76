"""A process of its own for one measurement: `python -m benchmarks.speed.child REQUEST RESULT`, both files of JSON."""

import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.speed.workloads import WAYS, WORKLOADS, Settings
from src.cli.environment import set_switches
from src.errors import TowlineError


def main(request: Path, result: Path) -> None:
    """Prepare a workload, or measure a way of one that is prepared, as the request asks."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    workload, settings, folder = WORKLOADS[asked["workload"]], Settings(**asked["settings"]), Path(asked["folder"])
    if asked["way"] is None or not WAYS[asked["way"]].is_peer:  # peers get the environment that their users have
        set_switches()
    if asked["way"] is None:
        from benchmarks.speed.machine import describe
        from benchmarks.speed.preparing import Facts, prepare

        prepare(workload, settings, folder)
        found = dataclasses.asdict(Facts.read(folder)) | {"machine": describe(settings.device)}
    else:
        from benchmarks.speed.measuring import measure

        found = dataclasses.asdict(measure(workload, WAYS[asked["way"]], settings, folder))
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:3]))
    except TowlineError as error:
        sys.exit(str(error))
