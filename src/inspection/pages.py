"""What preflight prints: model, tokens, sets, rows, forecasts and findings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from src.config.schema import Batching, InitMethod, RunConfig, Weights
from src.data.advice import Finding, Level
from src.data.batching_choice import about_choice
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.errors import visible
from src.forecast.parameters import MemoryItem
from src.forecast.time import TimeItem
from src.inspection.drawing import Paint, histogram, painted_row
from src.inspection.findings import Proof
from src.inspection.run_forecast import Forecast
from src.model.build import num_parameters
from src.model.embeddings import InitialisedRows, num_embedding_rows
from src.tokens import ConfiguredTokens
from src.tracking.console import Console
from src.tracking.live import clock
from src.util import human_bytes, plural

MOST_NAMED = 6  # source tokens of a row that are named one by one
COLOURS = {Level.error: "1;31", Level.warning: "33", Level.note: "2"}


def show_model(console: Console, config: RunConfig, model: Any) -> None:
    """Print which model it is, from its configuration alone."""
    total, _ = num_parameters(model)
    weights = "random weights" if config.model.weights is Weights.random else "pretrained weights, not loaded here"
    dtype = str(model.dtype).removeprefix("torch.")
    text = f"{type(model).__name__} of {config.model.checkpoint}, {weights}, {dtype}\n{total:,} parameters"
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    console.label("model", f"{text}{f', {layers} layers' if layers else ''}")


def show_tokens(
    console: Console,
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    new: ConfiguredTokens,
    initialised: InitialisedRows,
    data: Data,
    *,
    are_weights_seen: bool,
) -> None:
    """Print for each configured token whether it is one id, how often it is fed and supervised, and its initial row.

    Where the weights are seen, it is known which rows of the checkpoint were never trained.
    """
    special = {"BOS": tokenizer.bos_token, "EOS": tokenizer.eos_token, "pad": tokenizer.pad_token}
    ids_of = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items() if token is not None}
    named = ", ".join(f"{name} {special[name]} = {token_id}" for name, token_id in ids_of.items())
    lines = [f"{len(tokenizer):,} in the vocabulary, {num_embedding_rows(model):,} rows; {named}"]
    if data.stop_ids[1:] or data.frame.end_text:
        stops = [*tokenizer.convert_ids_to_tokens(data.stop_ids), *filter(None, [data.frame.end_text])]
        lines.append(f"generation stops at {', '.join(stops)}")
    counts = data.reports["train"].new_tokens
    for token, token_id in new.ids.items():
        if token in initialised.ids:
            sources = tokenizer.convert_ids_to_tokens(initialised.sources[token])
            start = "" if token in new.added else "untrained in the checkpoint: "
            start += f"initialised {_initialised_from(config.tokens.init.method, sources)}"
        elif are_weights_seen:
            start = "in the vocabulary, its row is kept"
        else:
            start = "in the vocabulary; whether the checkpoint trained its row is seen when the weights are loaded"
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        one = f"one id, {token_id}" if len(ids) == 1 else f"{len(ids)} ids"
        fed, supervised = counts[token]["fed"], counts[token]["supervised"]
        lines.append(f"{token}  {one}; fed {fed:,} times, supervised {supervised:,} times; {start}")
    console.label("tokens", "\n".join(lines))


def _initialised_from(method: InitMethod, sources: list[str]) -> str:
    """Return what a token's row starts as, in words."""
    if sources:
        named = " ".join(map(repr, sources)) if len(sources) <= MOST_NAMED else f"the rows of {len(sources)} tokens"
        return f"from the mean of {named}"
    return "at random" if method is InitMethod.random else "from the mean of all rows"


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
        weight = f"  weight {train[i].weight:g}" if train.has_weights else ""
        console.say(f"  {paint(Paint.BOLD, train.place(i))}{weight}", is_painted=True)
        for line in painted_row(train, i, data.encoder, data.stop_ids, paint).split("\n"):
            console.say(f"    {line}", is_painted=True)


def show_fading(console: Console, config: RunConfig, data: Data, num_epochs: int, paint: Paint) -> None:
    """Show the first row with thoughts as the first, the middle and the last epoch feed it, and the first epoch of a
    schedule in which it has none.
    """
    train, schedule = data.train.first, config.data.thought_schedule
    found = ((i, text) for i in range(len(train) if train.varies else 0) if (text := train.fading(i)) is not None)
    index, text = next(found, (0, None))
    if text is None:
        return
    epochs = {0, num_epochs // 2, num_epochs - 1}
    if schedule is not None:
        epochs.add(max(1, math.ceil(max(text.lengths) / schedule.tokens_per_epoch)))
    console.label("fading", f"{train.place(index)}, by epoch, counted from 0")
    for epoch in sorted(epochs):
        rest = "" if epoch < num_epochs else f" (the run ends after {plural(num_epochs, 'epoch')})"
        console.say(f"  {paint(Paint.BOLD, f'epoch {epoch}')}{rest}", is_painted=True)
        for line in painted_row(train.in_epoch(epoch), index, data.encoder, data.stop_ids, paint).split("\n"):
            console.say(f"    {line}", is_painted=True)


def show_forecasts(console: Console, config: RunConfig, forecast: Forecast) -> None:
    """Print the number of steps and the forecasts of memory, disk and time."""
    training, work = config.training, forecast.work
    sampler = work.batch_sampler
    rows = f"{sampler.token_budget if sampler.counts_tokens else sampler.size} x {training.gradient_accumulation_steps}"
    processes = config.runtime.world_size
    rows += f" x {processes} processes" if processes > 1 else ""
    each = ", for each process" if processes > 1 else ""
    epochs = "" if work.num_steps_per_epoch is None else f"{work.num_steps / work.num_steps_per_epoch:.3g}"
    epochs = epochs and f" ({epochs} {'epoch' if epochs == '1' else 'epochs'})"
    padded = 1 - work.tokens_fed / max(1, work.tokens_computed)
    fades = bool(config.data.thought_dropout or config.data.thought_schedule)
    fed = f"{'at most ' if fades else ''}{work.tokens_fed:,} tokens fed{' (thoughts fade)' if fades else ''}"
    unit = "positions" if sampler.counts_tokens else "sequences" if sampler.batching is Batching.packed else "rows"
    chosen = "" if sampler.saved_share is None else f"\n{about_choice(sampler)}"
    console.label(
        "steps",
        f"{work.num_steps:,}{epochs} of {rows} {unit}\n"
        f"{fed}; {padded:.0%} of what is computed is padding ({sampler.batching.value}){chosen}",
    )
    memory, disk, measured = forecast.memory, forecast.disk, forecast.measured
    console.label("memory", _table([*memory.parts, *memory.instead, memory.total._replace(name=f"total{each}")]))
    if memory.on_cpu:
        console.label("on the CPU", _table(memory.on_cpu))
    if measured:
        text = f"the widest micro-batch kept {human_bytes(measured.activation_bytes)} of activations and logits; "
        text += f"{human_bytes(measured.peak_memory_bytes)} held in all, libraries included"
        console.label("measured", text)
    console.label("disk", _table([*disk.parts, disk.total]))
    console.label("", f"{human_bytes(disk.free_bytes)} free in {disk.place}")
    console.label("time", _table(forecast.time))
    if measured is None:
        console.label("", "preflight.measure=true computes a batch of each and forecasts it better")


def _table(parts: Sequence[MemoryItem | TimeItem]) -> str:
    """Align names, values and formulas."""
    values = [_shown(part) for part in parts]
    width, room = max(len(part.name) for part in parts), max(map(len, values))
    lines = zip(parts, values, strict=True)
    return "\n".join(f"{part.name:<{width}}  {value:>{room}}   {part.how}" for part, value in lines)


def _shown(part: MemoryItem | TimeItem) -> str:
    if isinstance(part, MemoryItem):
        return "unknown" if part.bytes is None else human_bytes(part.bytes)
    if part.seconds is None:
        return "unknown"
    return f"{'at least ' if part.is_lower_bound else ''}{clock(part.seconds)}"


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
    return int(any(finding.level is Level.error for finding in found))
