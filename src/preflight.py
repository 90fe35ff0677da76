"""Everything about a run that can be known without training it: `python -m src.preflight KEY=VALUE …`.

Takes the same choices as src.run, and keys of its own. Loads no weights unless it measures. Exit code 0, 1 where a
finding is an error, 2 where something is yours to mend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.gate import admit
from src.config.job import Job
from src.errors import TowlineError
from src.runtime.collector import collect_from_here

if TYPE_CHECKING:
    from src.data.dataset import Data
    from src.tracking.console import Console


def preflight(job: Job) -> int:
    """Look at one admitted configuration and say what a run of it would be; give the exit code.

    Raises:
        TowlineError: what the user can mend.
    """
    from src.tracking.console import Console

    config, own = job.config, job.own
    if own.dump is not None and not Path(own.dump).absolute().parent.is_dir():
        raise TowlineError(f"preflight.dump = {own.dump} can't be written: No such file or directory")
    console = Console()
    console.label("preflight", f"{config.name}: nothing is trained")

    from src.inspection.libraries import import_as_run
    from src.sweep.workers import WARM, modules_of_run

    return look_ahead(job, console, import_as_run([WARM, *modules_of_run(config)]))


def look_ahead(job: Job, console: Console, libraries_bytes: int) -> int:
    """Assemble what a run would, show it and what it will take; return the exit code."""
    from src.data.advice import Level
    from src.data.dataset import build_data
    from src.data.tokenizer import load_tokenizer
    from src.evaluation.generate import check_prompts
    from src.inspection.drawing import Paint, draw_lengths
    from src.inspection.findings import findings, judge_of, prove
    from src.inspection.libraries import resident_bytes
    from src.inspection.outlook import about_disk, device_of, outlook
    from src.inspection.pages import show_findings, show_forecasts, show_model, show_rows, show_sets
    from src.inspection.starts import about_starts, show_tokens
    from src.model.build import check_adapter_of, check_lengths, empty_model
    from src.model.embeddings import resize_and_initialise
    from src.model.quantization import check_quantisable
    from src.model.unlearned import stored_unlearned_tokens

    config, own = job.config, job.own
    folder = Path("outputs", config.name, "preflight")
    collect_from_here()
    before = resident_bytes()
    tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer, console.working)
    data_bytes = max(0, resident_bytes() - before)
    model = empty_model(config.model)
    check_lengths(config.model, model.config, config.data.max_seq_length, config.data.max_target_length)
    if config.quantization.is_on:
        check_quantisable(model, config.quantization, device_of(config))
    check_adapter_of(config)
    unlearned = stored_unlearned_tokens(model, tokenizer, new_tokens, config.model)
    started = resize_and_initialise(model, tokenizer, new_tokens, config.tokens, config.seed, unlearned or ())
    train = data.train.first
    check_prompts(config, model, data)
    sets = {"train": train} | data.validation | data.test
    paint = Paint(sys.stdout)

    show_model(console, config, model)
    show_tokens(console, config, model, tokenizer, new_tokens, started, data, are_weights_seen=unlearned is not None)
    show_sets(console, config, data, sets)
    draw_lengths(sets, config.data.max_seq_length, folder / "lengths.png")
    show_rows(console, train, data, own.rows, paint)
    judge = judge_of(config, data)
    proofs = {name: prove(rows, judge) for name, rows in sets.items()}
    new_ids = list(started.ids.values())
    held = libraries_bytes + data_bytes
    ahead = outlook(config, model, tokenizer, new_ids, data, job.run_dir, held, measure=own.measure)
    show_forecasts(console, config, ahead)
    found = [
        *findings(config, data, tokenizer, train, proofs, ahead.work.num_steps),
        *about_starts(new_tokens, started),
        *about_disk(ahead.disk),
    ]
    found.sort(key=lambda finding: list(Level).index(finding.level))
    code = show_findings(console, found, proofs, paint)
    if own.dump is not None:
        console.label("dump", f"{dump(data, Path(own.dump)):,} rows of train in {own.dump}")
    write_report(folder / "preflight.json", data, found, ahead)
    console.label("written", f"{folder}/lengths.png, preflight.json")
    return code


def dump(data: Data, file: Path) -> int:
    """Write every encoded row of the train split, one JSON object a line, in the order of the files; count them.

    `input_ids` and `labels` are not shifted; `spans` are what is supervised: kind, start and stop within labels. An
    encoder-decoder's rows have `target_ids` too, which their labels belong to.
    """
    from src.data.encoding import SPAN_KINDS

    count = 0
    try:
        with open(file, "w", encoding="utf-8") as lines:
            for rows in data.train.blocks():
                for i in range(len(rows)):
                    row = rows[i]
                    spans = [{"kind": SPAN_KINDS[kind], "start": a, "stop": b} for kind, a, b in row.spans.tolist()]
                    line: dict[str, Any] = {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}
                    if row.target_ids is not None:
                        line["target_ids"] = row.target_ids.tolist()
                    lines.write(json.dumps(line | {"spans": spans}) + "\n")
                count += len(rows)
    except OSError as error:
        raise TowlineError(f"preflight.dump = {file} can't be written: {error.strerror}") from error
    return count


def write_report(file: Path, data: Data, found: Sequence[Any], ahead: Any) -> None:
    """Write what was found for a program to read."""
    report = {
        "findings": [{"level": finding.level.value, "text": finding.text} for finding in found],
        "data": {name: report.as_dict() for name, report in data.reports.items()},
        "steps": ahead.work.num_steps,
        "memory": {part.name: part.bytes for part in [*ahead.memory.parts, *ahead.memory.instead, ahead.memory.total]},
        "memory_on_cpu": {part.name: part.bytes for part in ahead.memory.on_cpu},
        "disk": {part.name: part.bytes for part in ahead.disk.parts},
        "time": {part.name: part._asdict() for part in ahead.time.parts},
        "measured": ahead.measured and asdict(ahead.measured),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then look at what it asks for; return the exit code."""

    def look(arguments: list[str]) -> int:
        request = admit(arguments, "preflight")
        assert request.run is not None
        job = request.run
        return guarded(lambda: preflight(job), when_stopped="Nothing was trained.")

    return answer("preflight", __doc__, argv, look)


if __name__ == "__main__":
    as_command(main)
