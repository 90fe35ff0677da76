"""A run that is assembled but not trained: its rows, tokens, sizes and findings, shown and written down."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.config.job import Job
from src.config.schema import LossConfig
from src.data.advice import Finding, Level, about_schedule
from src.data.dataset import Data, build_data
from src.data.encoding import IGNORE_INDEX, PARTS, SPAN_KINDS
from src.data.sets import LabelledRow
from src.data.tokenizer import load_tokenizer
from src.errors import TowlineError
from src.evaluation.generate import check_prompts
from src.inspection.drawing import Paint, draw_lengths
from src.inspection.findings import about_initialised_rows, answer_scorer, findings, prove
from src.inspection.pages import (
    show_fading,
    show_findings,
    show_forecasts,
    show_model,
    show_rows,
    show_sets,
    show_tokens,
)
from src.inspection.run_forecast import about_disk, forecast_run
from src.model.build import check_adapter_of, check_lengths, empty_model
from src.model.embeddings import resize_and_initialise
from src.model.quantization import check_quantisable
from src.model.untrained import stored_untrained_tokens
from src.runtime.allocation import resident_bytes
from src.runtime.collector import collect_from_here
from src.runtime.precision import about_frozen_weights, device_of, with_precision
from src.runtime.products import bf16_warnings
from src.tracking.console import Console
from src.training.loss import part_weights


def inspect_run(job: Job, console: Console, libraries_bytes: int) -> int:
    """Assemble what a run would, without weights; show it, what it will take and the findings; return the exit code.
    TowlineError says what a run would refuse.
    """
    config, own = with_precision(job.config), job.entry_section
    folder, paint = Path("outputs", config.name, "preflight"), Paint(sys.stdout)
    collect_from_here()
    before = resident_bytes()
    tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer, console.working)
    held = libraries_bytes + max(0, resident_bytes() - before)
    model = empty_model(config.model)
    check_lengths(config.model, model.config, config.data.max_seq_length, config.data.max_target_length)
    if config.quantization.is_on:
        check_quantisable(model, config.quantization, device_of(config))
    check_adapter_of(config)
    untrained = stored_untrained_tokens(model, tokenizer, new_tokens, config.model)
    initialised = resize_and_initialise(model, tokenizer, new_tokens, config.tokens, config.seed, untrained or ())
    check_prompts(config, model, data)

    show_model(console, config, model)
    seen = untrained is not None
    show_tokens(console, config, model, tokenizer, new_tokens, initialised, data, are_weights_seen=seen)
    train = data.train.first
    sets = {"train": train} | data.validation | data.test
    show_sets(console, config, data, sets)
    draw_lengths(sets, config.data.max_seq_length, folder / "lengths.png")
    show_rows(console, train, data, own.rows, paint)
    scorer = answer_scorer(config, data)
    with console.work("checking", "masks", len(sets), "sets") as advance:
        proofs = {}
        for name, rows in sets.items():
            proofs[name] = prove(rows, scorer)
            advance()
    new_ids = list(initialised.ids.values())
    forecast = forecast_run(config, model, tokenizer, new_ids, data, job.run_dir, held, console, measure=own.measure)
    show_fading(console, config, data, forecast.work.num_epochs(config.training), paint)
    show_forecasts(console, config, forecast)
    found = [
        *findings(config, data, tokenizer, train, proofs, forecast.work.num_steps),
        *about_schedule(config, forecast.work.num_steps, forecast.work.num_steps_per_epoch),
        *about_initialised_rows(new_tokens, initialised),
        *about_disk(forecast.disk),
        *(Finding(Level.warning, text) for text in bf16_warnings(config, model.dtype, device_of(config))),
        *(Finding(Level.note, text) for text in about_frozen_weights(config, model.dtype)),
    ]
    found.sort(key=lambda finding: list(Level).index(finding.level))
    code = show_findings(console, found, proofs, paint)
    if own.dump is not None:
        console.label("dump", f"{dump(data, config.loss, Path(own.dump)):,} rows of train in {own.dump}")
    write_report(folder / "preflight.json", data, found, forecast)
    console.label("written", f"{folder}/lengths.png, preflight.json")
    return code


def dump(data: Data, loss: LossConfig, file: Path) -> int:
    """Write every encoded row of the train split, one JSON object a line, in the order of the files; count them."""
    count = 0
    try:
        with open(file, "w", encoding="utf-8") as lines:
            for rows in data.train.blocks():
                lines.writelines(json.dumps(dumped(rows[i], loss)) + "\n" for i in range(len(rows)))
                count += len(rows)
    except OSError as error:
        raise TowlineError(f"preflight.dump = {file} can't be written: {error.strerror}") from error
    return count


def dumped(row: LabelledRow, loss: LossConfig) -> dict[str, Any]:
    """Return an encoded row as JSON values.

    `input_ids` and `labels` are not shifted; `spans` are what is supervised: kind, start and stop within labels. An
    encoder-decoder's rows have `target_ids` too, which their labels belong to. `parts` and `weights` have an entry for
    each label: null and 0 where it is not supervised, else the token's part, of PARTS, and its weight in the loss.
    """
    weights, is_supervised = part_weights(loss), (row.labels != IGNORE_INDEX).tolist()
    parts = [part if here else None for part, here in zip(row.parts.tolist(), is_supervised, strict=True)]
    return {
        "input_ids": row.input_ids.tolist(),
        "labels": row.labels.tolist(),
        **({} if row.target_ids is None else {"target_ids": row.target_ids.tolist()}),
        "spans": [{"kind": SPAN_KINDS[kind], "start": a, "stop": b} for kind, a, b in row.spans.tolist()],
        "parts": [None if part is None else PARTS[part] for part in parts],
        "weights": [0.0 if part is None else weights[part] * row.weight for part in parts],
    }


def write_report(file: Path, data: Data, found: Sequence[Any], forecast: Any) -> None:
    """Write findings and forecasts as JSON, for a program to read."""
    report = {
        "findings": [{"level": finding.level.value, "text": finding.text} for finding in found],
        "data": {name: report.as_dict() for name, report in data.reports.items()},
        "steps": forecast.work.num_steps,
        "memory": {
            part.name: part.bytes for part in [*forecast.memory.parts, *forecast.memory.instead, forecast.memory.total]
        },
        "memory_on_cpu": {part.name: part.bytes for part in forecast.memory.on_cpu},
        "disk": {part.name: part.bytes for part in forecast.disk.parts},
        "time": {part.name: part._asdict() for part in forecast.time},
        "measured": forecast.measured and asdict(forecast.measured),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
