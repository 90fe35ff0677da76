"""Training speed of Towline beside TRL's SFTTrainer, transformers' Trainer and a bare loop: `make bench`.

    python -m benchmarks.speed [--workloads small,long] [--ways towline,trl] [--output FILE.md] [KEY=VALUE …]

All ways train the same rows once, from the same weights, with the same optimizer and learning rate; padded and
grouped ones in the same batches, so that their losses have to be equal at every step (exit code 1 where they are
not). Peers are given the batches of Towline's grouping: their own works only from 200 batches an epoch on, and is as
good. Each measurement is a process of its own; rounds alternate forwards and backwards; warm-up steps are left out;
medians are shown. Tokens are those of rows, without padding; the ratio that counts is that of tokens a second. "Of
peak": the operations that the tokens need in matrix products, over the time, over what products of large matrices reach
in these processes. Packed ways take as many packs a step as have the tokens of a padded one. Blocks are computed once,
also in TRL's ways but for trl_default: TRL computes them again in backward unless it is told otherwise. KEY=VALUE
change Towline's configuration.

Figures differ from machine to machine; measure where nothing else runs. On a GPU: --device cuda (bf16, with a workload
of 1B parameters).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.speed.measurement import Measurement
from benchmarks.speed.results import Results, as_figure, as_markdown, as_summary
from benchmarks.speed.workloads import WAYS, WORKLOADS, Settings, Way, Workload, missing_packages
from src.figures import write_png
from src.util import write_atomically

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
INSTALL = "pip install -c constraints.txt -e '.[peers]'"


class Failed(Exception):
    """A process of a measurement ended otherwise than it should; the text is the end of what it wrote."""


def main() -> int:
    given = parse()
    rows_file = given.rows or (str(GSM8K) if GSM8K.is_file() else None)
    settings = Settings(given.device, given.mixed_precision, given.warm_up, given.steps, rows_file, given.checkpoint)
    settings = dataclasses.replace(settings, overrides=given.overrides)
    say("rows: " + (rows_file or "made-up ones as long as GSM8K's, which is not here (--rows FILE)"))
    if given.rounds < 3:
        say(f"{given.rounds} of at least 3 rounds: to try it out, not to be quoted")
    ways = [way for way in given.ways if not missed(way)]
    kept = earlier(given.output)
    done: list[Results] = []
    is_right = True
    for workload in given.workloads:
        fitting = [way for way in ways if way.goes_with(workload, settings.device)]
        with tempfile.TemporaryDirectory(prefix="towline-speed-") as folder:
            machine, results, has_failed = run_workload(workload, fitting, settings, given.rounds, Path(folder))
        is_right = is_right and not has_failed
        if not results.rounds:
            continue
        done.append(dataclasses.replace(results, measured=how_measured(machine, workload, settings, given.rounds)))
        print(as_markdown(done[-1]), flush=True)
        for one in results.disagreements():
            is_right = False
            say(f"WRONG: {workload.name}: {one}")
        if given.output is not None:
            write(given.output, kept, done)
    return 0 if is_right else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="other settings for Towline, as for src.run")
    parser.add_argument("--workloads", type=chosen(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--ways", type=chosen(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument(
        "--steps", type=at_least_one, help="measured steps of padded batches, in place of each workload's"
    )
    parser.add_argument("--warm-up", type=at_least_one, default=2, help="steps before them")
    parser.add_argument("--rows", metavar="FILE", help="JSONL with question and answer, as GSM8K's; else made-up rows")
    parser.add_argument("--checkpoint", metavar="DIR", help="a pretrained model, for real and real_lora")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], help="bf16 on cuda, else no")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="tables; FILE.png and FILE.json beside them; workloads that FILE.json has from before stay",
    )
    given = parser.parse_args()
    given.mixed_precision = given.mixed_precision or ("bf16" if given.device == "cuda" else "no")
    for option, file in (("--rows", given.rows), ("--checkpoint", given.checkpoint)):
        if file is not None and not Path(file).exists():
            parser.error(f"{option}: {file} does not exist")
    if given.ways is None:
        given.ways = [way for way in WAYS.values() if given.device == "cuda" or not way.has_kernels]
    if given.workloads is not None:
        if given.checkpoint is None and any(one.architecture is None for one in given.workloads):
            parser.error("real and real_lora need --checkpoint DIR, a pretrained model")
        return given
    on_device = [one for one in WORKLOADS.values() if given.device == "cuda" or not one.needs_gpu]
    given.workloads = [one for one in on_device if one.architecture is not None or given.checkpoint is not None]
    if given.checkpoint is None:
        say("real and real_lora are left out: they need --checkpoint DIR, a pretrained model")
    return given


def chosen(known: Mapping[str, Any]) -> Callable[[str], list[Any]]:
    """Return what reads names between commas."""

    def read(text: str) -> list[Any]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return [known[name] for name in dict.fromkeys(text.split(","))]

    return read


def at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def missed(way: Way) -> bool:
    """Return whether a way's packages are missing, and say so."""
    missing = missing_packages(way)
    if missing and not way.has_kernels:
        say(f"{way.name} is left out: {', '.join(missing)} is not installed ({INSTALL})")
    elif missing:
        say(f"{way.name} is left out: it needs {' and '.join(missing)}, and a GPU")
    return bool(missing)


def run_workload(
    workload: Workload, ways: Sequence[Way], settings: Settings, rounds: int, folder: Path
) -> tuple[str, Results, bool]:
    """Measure all ways of a workload; return the machine, the results, and whether a way failed."""
    say(f"{workload.name}: making model and rows")
    measured: dict[str, list[Measurement]] = {}
    try:
        machine = in_own_process(workload, None, settings, folder)["machine"]
    except Failed as error:
        say(f"FAILED: {workload.name}: {error}")
        return "", Results(workload, settings.mixed_precision, {}), True
    failed: set[str] = set()
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            if way.name in failed:
                continue
            began = time.monotonic()
            try:
                one = Measurement(**in_own_process(workload, way, settings, folder))
            except Failed as error:
                failed.add(way.name)
                say(f"FAILED: {workload.name}: {way.about}: {error}")
                continue
            measured.setdefault(way.name, []).append(one)
            spent = time.monotonic() - began
            place = f"{workload.name}, round {number + 1} of {rounds}"
            say(f"{place}: {way.about}: {one.tokens_per_second:,.0f} tokens/s ({spent:.0f} s with its start)")
    in_order = {way.name: measured[way.name] for way in ways if way.name in measured and way.name not in failed}
    return machine, Results(workload, settings.mixed_precision, in_order), bool(failed)


def in_own_process(workload: Workload, way: Way | None, settings: Settings, folder: Path) -> dict[str, Any]:
    """Prepare a workload, or measure a way, in a fresh process; Failed says how it ended."""
    request, result = folder / "request.json", folder / "result.json"
    asked = {"workload": workload.name, "way": way and way.name, "folder": str(folder)}
    request.write_text(json.dumps(asked | {"settings": dataclasses.asdict(settings)}), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.speed.child", str(request), str(result)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode or not result.is_file():
        raise Failed(f"exit {ended.returncode}\n{ended.stdout[-1000:]}{ended.stderr[-3000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def write(output: Path, kept: Mapping[str, Results], done: Sequence[Results]) -> None:
    """Write the tables, their figure, and the measurements themselves: those that were there, and those of now."""
    together = dict(kept) | {results.workload.name: results for results in done}
    everything = [together[name] for name in WORKLOADS if name in together]
    sections = "\n".join([as_summary(everything), *map(as_markdown, everything)])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, f"# Training speed\n\n{sections}")
    write_png(as_figure(everything), output.with_suffix(".png"))
    raw = {results.workload.name: results.as_dict() for results in everything}
    write_atomically(output.with_suffix(".json"), json.dumps(raw, indent=1))


def how_measured(machine: str, workload: Workload, settings: Settings, rounds: int) -> str:
    rows = "GSM8K's rows" if settings.rows_file else "made-up rows"
    steps = f"{settings.steps or workload.steps} steps after {settings.warm_up} of warm-up"
    return f"{date.today()}, {machine}; {rows}, mixed precision {settings.mixed_precision}, {rounds} rounds of {steps}"


def earlier(output: Path | None) -> dict[str, Results]:
    """Return what an earlier command has measured of each workload, in the same file."""
    if output is None or not (file := output.with_suffix(".json")).is_file():
        return {}
    raw = json.loads(file.read_text(encoding="utf-8"))
    return {name: Results.read(WORKLOADS[name], found) for name, found in raw.items() if name in WORKLOADS}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
