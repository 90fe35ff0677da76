"""What preflight prints: model, sets, rows, forecasts and findings."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.config.schema import RunConfig, Weights
from src.data.advice import Finding, Level
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.errors import visible
from src.forecast.parameters import MemoryItem
from src.forecast.time import TimeItem
from src.inspection.drawing import Paint, histogram, painted_row
from src.inspection.findings import Proof
from src.inspection.run_forecast import Forecast
from src.model.build import num_parameters
from src.tracking.console import Console, clock
from src.util import human_bytes

COLOURS = {Level.error: "1;31", Level.warning: "33", Level.note: "2"}


def show_model(console: Console, config: RunConfig, model: Any) -> None:
    """Print which model it is, from its configuration alone."""
    total, _ = num_parameters(model)
    weights = "random weights" if config.model.weights is Weights.random else "pretrained weights, not loaded here"
    dtype = str(model.dtype).removeprefix("torch.")
    text = f"{type(model).__name__} of {config.model.checkpoint}, {weights}, {dtype}\n{total:,} parameters"
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    console.label("model", f"{text}{f', {layers} layers' if layers else ''}")


def show_sets(console: Console, config: RunConfig, data: Data, sets: Mapping[str, EncodedSet]) -> None:
    """Print counts of each set's rows, and a histogram of the train rows' lengths."""
    for name, rows in sets.items():
        report = data.reports[name]
        share = report.supervised_tokens / max(1, report.tokens)
        lines = report.summary.split("\n")
        lines[0] += f" ({share:.0%})"
        if report.thought_tokens:
            lines[0] += f", {report.thought_tokens / max(1, report.supervised_tokens):.0%} of these are thoughts"
        for reason, places in report.dropped_places.items():
            lines.append(f"  {reason.replace('_', ' ')}: {', '.join(places)}{' …' if len(places) == 10 else ''}")
        if report.rows_cleaned:
            lines.append(f"  {report.rows_cleaned:,} dialogues cleaned")
        shown = ", ".join(f"{word} {count:,}" for word, count in report.lengths.items())
        lines.append(f"  tokens a row: {shown}")
        if name == "train":
            lines += [f"    {line}" for line in histogram(rows.lengths, config.data.max_seq_length)]
        console.label(name, "\n".join(lines))


def show_rows(console: Console, train: EncodedSet, data: Data, count: int, paint: Paint) -> None:
    """Show the first rows as the model will see them."""
    if not count:
        return
    console.label("rows", paint.legend, is_painted=True)
    for i in range(min(count, len(train))):
        console.say(f"  {paint(Paint.BOLD, train.place(i))}", is_painted=True)
        for line in painted_row(train, i, data.encoder, data.stop_ids, paint).split("\n"):
            console.say(f"    {line}", is_painted=True)


def show_forecasts(console: Console, config: RunConfig, forecast: Forecast) -> None:
    """Print the number of steps and the forecasts of memory, disk and time."""
    training, work = config.training, forecast.work
    rows = f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps}"
    processes = config.runtime.world_size
    rows += f" x {processes} processes" if processes > 1 else ""
    each = ", for each process" if processes > 1 else ""
    epochs = "" if work.num_steps_per_epoch is None else f" ({work.num_steps / work.num_steps_per_epoch:.3g} epochs)"
    padded = 1 - work.tokens_fed / max(1, work.tokens_computed)
    console.label(
        "steps",
        f"{work.num_steps:,}{epochs} of {rows} {'sequences' if config.data.batching.value == 'packed' else 'rows'}\n"
        f"{work.tokens_fed:,} tokens fed; {padded:.0%} of what is computed is padding ({config.data.batching.value})",
    )
    most = forecast.memory.total._replace(name=f"total{each}")
    console.label("memory", _table([*forecast.memory.parts, *forecast.memory.instead, most]))
    if forecast.memory.on_cpu:
        console.label("on the CPU", _table(forecast.memory.on_cpu))
    if forecast.measured:
        measured = forecast.measured
        console.label(
            "measured",
            f"the widest micro-batch kept {human_bytes(measured.activation_bytes)} of activations and logits; "
            f"{human_bytes(measured.peak_memory_bytes)} held in all, libraries included",
        )
    console.label("disk", _table([*forecast.disk.parts, forecast.disk.total]))
    console.label("", f"{human_bytes(forecast.disk.free_bytes)} free in {forecast.disk.place}")
    console.label("time", _times(forecast.time))
    if forecast.measured is None:
        console.label("", "preflight.measure=true computes a batch of each and forecasts it better")


def _times(parts: Sequence[TimeItem]) -> str:
    width = max(len(part.name) for part in parts)
    lines = []
    for part in parts:
        seconds = "unknown" if part.seconds is None else clock(part.seconds)
        bound = "at least " if part.is_lower_bound and part.seconds is not None else ""
        lines.append(f"{part.name:<{width}}  {bound}{seconds}   {part.how}")
    return "\n".join(lines)


def _table(parts: Sequence[MemoryItem]) -> str:
    sizes = ["unknown" if part.bytes is None else human_bytes(part.bytes) for part in parts]
    width = max(len(part.name) for part in parts)
    room = max(map(len, sizes))
    lines = zip(parts, sizes, strict=True)
    return "\n".join(f"{part.name:<{width}}  {size:>{room}}   {part.how}" for part, size in lines)


def show_findings(console: Console, found: Sequence[Finding], proofs: Mapping[str, Proof], paint: Paint) -> int:
    """Print the proofs and findings; return the exit code, 1 if a finding is an error."""
    for name, proof in proofs.items():
        whole = proof.num_checked - proof.num_cut
        right = whole - len({*proof.wrong_mask, *proof.unlike, *proof.altered})
        text = f"{name}: {right:,} of {whole:,} whole rows decode to their text, and what is supervised to the "
        text += f"completion; {proof.num_with_end:,} teach where to end"
        if proof.altered:
            text += f"; in {len(proof.altered):,} the chat template leaves out or changes a message"
        console.label("mask" if name == next(iter(proofs)) else "", text)
    if not found:
        console.label("findings", "none")
    for i, finding in enumerate(found):
        level = f"{finding.level.value:<8}"
        level = f"\x1b[{COLOURS[finding.level]}m{level}\x1b[0m" if paint.in_colour else level
        console.label("findings" if i == 0 else "", f"{level} {visible(finding.text)}", is_painted=True)
    return 1 if any(finding.level is Level.error for finding in found) else 0
