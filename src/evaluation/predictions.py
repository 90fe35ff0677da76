"""Predictions: generated and written a block at a time, so that a stop costs one block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config.files import expand
from src.config.schema import RunConfig
from src.data.sources import file_hash
from src.errors import RunFolderError
from src.evaluation.predicted_set import PredictedSet, Prediction, read_metrics
from src.evaluation.prediction_key import prediction_key
from src.tracking.console import Console, clock

if TYPE_CHECKING:
    from src.data.dataset import Prompts
    from src.data.sets import EncodedSet
    from src.evaluation.generate import Generator

BLOCK_BATCHES = 4
"""Batches that are generated before their rows are written: sorted by length among themselves, they are padded less."""


def open_sets(folder: Path, config: RunConfig, frozen: Mapping[str, Any], model: Path) -> dict[str, PredictedSet]:
    """Return the sets that are asked for, with what the folder has of them.

    Args:
        model: the folder of the model that predicts.
    Raises:
        RunFolderError: where something else decided what is there, naming what.
        DamagedFileError: where what is there can't be read; before anything is generated or removed.
    """
    read_metrics(folder)
    common = prediction_key(config, frozen, model)
    sets, refused = {}, []
    for name, files in config.data.test_sets().items():
        contents = [file_hash(file) for file in expand(files)]
        sets[name] = PredictedSet(folder, name, {"data.test_files": contents} | common)
        differences = sets[name].claim(force=config.force)
        if differences:
            refused.append(
                "\n  ".join([f"{sets[name].lines} holds predictions that something else decided:", *differences])
            )
        else:
            sets[name].check_unchanged()
    if refused:
        hint = (
            "predict.output=DIR puts the new predictions elsewhere; force=true removes these sets and starts them anew"
        )
        raise RunFolderError("\n".join([*refused, hint]))
    return sets


def describe_rows(rows: EncodedSet) -> str:
    """Return what became of a set's rows: how many are predicted, whose prompt was cut, what was left out."""
    text = f"{len(rows):,} rows"
    if rows.total("is_truncated"):
        cut = [rows.place(i) for i in range(len(rows)) if rows.is_truncated(i)]
        text += f"\n{_some(cut)} cut at the start of the prompt: too long"
    (part,) = rows.shards
    for reason in sorted({row.reason for row in part.stats.dropped}):
        left_out = [row.place for row in part.stats.dropped if row.reason == reason]
        why = "an empty prompt" if reason == "no_supervised_token" else "too long"
        text += f"\n{_some(left_out)} left out: {why}"
    return text


def predict_rows(
    into: PredictedSet, rows: EncodedSet, generator: Generator, prompts: Prompts, config: RunConfig, console: Console
) -> None:
    """Generate for the rows that have no line yet, block after block.

    A row draws from a stream of its own, by seed and its place in the set, so nothing depends on the blocks or on where
    it was stopped.

    Raises:
        Interrupted: between two tokens, where a signal asked for it; whole blocks are on the disk.
    """
    from src.evaluation.answers import AnswerReader  # not for those who only look at what is there

    reader = AnswerReader(prompts.encoder, config.thought_tags, prompts.frame)
    (part,) = rows.shards
    numbers = part.ordinals.tolist()
    block_rows = BLOCK_BATCHES * generator.batch_size
    begin = into.resume(numbers, block_rows)
    if begin:
        console.label(into.name, f"{begin:,} of {len(rows):,} rows are there already, continuing after them")
    started = time.monotonic()
    for start in range(begin, len(rows), block_rows):
        block = range(start, min(start + block_rows, len(rows)))
        completions = generator.generate([rows.prompt_ids(i) for i in block], config.seed, first_row=start)
        texts = [prompts.encoder.decode(completion.ids) for completion in completions]
        into.append(
            [
                Prediction(
                    row=numbers[i],
                    source=rows.place(i),
                    prompt=rows.prompt(i),
                    text=text,
                    answer=reader.answer(rows, i, text),
                    reference=reader.reference(rows, i) if rows.completion(i) else None,
                    stop_reason=completion.stop_reason,
                )
                for i, completion, text in zip(block, completions, texts, strict=True)
            ]
        )
        left = (time.monotonic() - started) / (block.stop - begin) * (len(rows) - block.stop)
        console.working(f"{into.name}: {block.stop:,} of {len(rows):,} rows  {clock(left)} left")


def _some(places: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(places) - most:,} more" if len(places) > most else ""
    return f"{', '.join(places[:most])}{rest}"
