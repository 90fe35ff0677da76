"""Predictions: generated and written a block at a time, so that a stop costs one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.exported import ADAPTER, MAY_CHANGE, weight_files
from src.config.files import expand
from src.config.keys import all_keys
from src.config.schema import LATER_KEYS, RunConfig
from src.data.sources import file_hash
from src.errors import RunFolderError
from src.evaluation.predicted_set import PredictedSet, Prediction, Sample, read_metrics
from src.evaluation.row_log import RowLog
from src.tracking.console import Console

if TYPE_CHECKING:  # torch is for those who generate, not for those who only look at what is there
    from src.data.sets import EncodedSet
    from src.evaluation.answers import Completion
    from src.evaluation.generate import Generator

BLOCK_BATCHES = 4
"""Batches that are generated before their rows are written: sorted by length among themselves, they are padded less."""
SAMPLING = ("temperature", "top_k", "top_p")  # settings that count only where words are drawn


def open_sets(folder: Path, config: RunConfig, frozen: Mapping[str, Any], model: Path) -> dict[str, PredictedSet]:
    """Return the sets that are asked for, with what the folder has of them; `model` is the folder of the model.

    RunFolderError names what decided otherwise what is there; DamagedFileError where that can't be read. Both are
    raised before anything is generated or removed.
    """
    read_metrics(folder)
    common = _key(config, frozen, model)
    sets, refused = {}, []
    for name, files in config.data.test_sets().items():
        contents = [file_hash(file) for file in expand(files)]
        sets[name] = one = PredictedSet(folder, name, {"data.test_files": contents} | common)
        if differences := one.claim(force=config.force):
            refused.append("\n  ".join([f"{one.lines} holds predictions that something else decided:", *differences]))
        else:
            one.check_unchanged()
    if refused:
        hint = "predict.output=DIR puts the new predictions elsewhere; force=true removes these sets and starts them "
        raise RunFolderError("\n".join([*refused, f"{hint}anew"]))
    return sets


def _key(config: RunConfig, frozen: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Return what decides the predictions of any set, as plain values by name.

    The seed decides only where words are drawn, the size of the batches nothing.
    """
    data_keys = {key.leaf for key in all_keys().values() if key.section == "data" and key.shapes_rows} | {"limit"}
    data_keys.remove("max_target_length")  # an answer takes no room
    return {
        **generation_key(config, frozen),
        **{f"data.{key}": value for key, value in frozen["data"].items() if key in data_keys},
        **{f"tokens.{key}": frozen["tokens"][key] for key in ("thought_open", "thought_close")},
        **model_key(config, model),
    }


def generation_key(config: RunConfig, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides how texts are generated, as plain values by name."""
    draws, later = config.generation.do_sample, LATER_KEYS["generation"].items()
    decides = {key: value for key, value in frozen["generation"].items() if draws or key not in SAMPLING}
    # a key that is added later counts as if it were not there, as in the configuration's hash
    settings = {f"generation.{key}": value for key, value in decides.items() if (key, value) not in later}
    return settings | ({"seed": config.seed} if draws else {})


def model_key(config: RunConfig, model: Path) -> dict[str, Any]:
    """Return what decides a run's model and how it computes; `model` is its folder."""
    files = [file for file in sorted(model.rglob("*")) if file.is_file() and file.name not in MAY_CHANGE]
    base = weight_files(config.model.checkpoint) if (model / ADAPTER).exists() else []
    weights = [file for file in base if file.suffix == ".safetensors"]
    return {
        "model.dtype": config.model.dtype.value,
        "training.mixed_precision": config.training.mixed_precision.value,
        "model": {str(file.relative_to(model)): file_hash(str(file)) for file in files},
        "base": {file.name: file_hash(str(file)) for file in weights},
    }


def describe_rows(rows: EncodedSet) -> str:
    """Return what became of a set's rows: how many are predicted, whose prompt was cut, what was left out."""
    text = f"{len(rows):,} rows"
    if rows.total("is_truncated"):
        cut = [rows.place(i) for i in range(len(rows)) if rows.is_truncated(i)]
        text += f"\n{_some(cut)} cut at the start of the prompt: too long"
    (part,) = rows.shards
    for reason in sorted({row.reason for row in part.stats.dropped}):
        left_out = [row.place for row in part.stats.dropped if row.reason == reason]
        why = "an empty prompt" if reason == "no_supervised_token" else reason.replace("_", " ")
        text += f"\n{_some(left_out)} left out: {why}"
    return text


def row_numbers(rows: EncodedSet) -> list[int]:
    """Return the number of each row of a set among the records of its files, from 0."""
    (part,) = rows.shards
    numbers: list[int] = part.ordinals[rows.indices[:, 1]].tolist()
    return numbers


def predict_rows(
    into: RowLog,
    rows: EncodedSet,
    generator: Generator,
    seed: int,
    num_samples: int,
    console: Console,
    chosen: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Generate for the rows that have no line yet, block after block: for all, or for the `chosen` ones, which are
    `numbers` in the file.

    A row draws from a stream of its own, by seed and its place in the set, so nothing depends on the blocks or on where
    it was stopped. Interrupted between two tokens, where a signal asked for it; whole blocks are on the disk.
    """
    chosen = range(len(rows)) if chosen is None else chosen
    numbers = chosen if numbers is None else numbers
    for block in blocks(into, numbers, generator.batch_size, console):
        prompts = [rows.prompt_ids(chosen[place]) for place in block]
        generated = generator.generate_samples(prompts, seed, block.start, num_samples)
        lines = zip(block, generated, strict=True)
        into.append([_prediction(generator, rows, chosen[place], numbers[place], texts) for place, texts in lines])


def _prediction(
    generator: Generator, rows: EncodedSet, index: int, number: int, completions: Sequence[Completion]
) -> Prediction:
    """Return the line of a row, the `number`-th of its files."""
    reader, rule, prompt = generator.reader, generator.thoughts, rows.prompt_ids(index)
    assert reader is not None
    texts = [reader.encoder.decode(completion.ids) for completion in completions]
    samples = [
        Sample(
            text,
            reader.answer(rows, index, text),
            completion.stop_reason,
            None if rule is None else rule.found(prompt, completion.ids),
        )
        for completion, text in zip(completions, texts, strict=True)
    ]
    plain = [{key: value for key, value in asdict(one).items() if value is not None} for one in samples]
    return Prediction(
        row=number,
        source=rows.place(index),
        prompt=rows.prompt(index),
        reference=reader.reference(rows, index) if rows.completion(index) else None,
        **plain[0],
        samples=plain if len(plain) > 1 else None,
    )


def blocks(into: RowLog, numbers: Sequence[int], batch_size: int, console: Console) -> Iterator[range]:
    """Yield the places of each block of rows that a file lacks, which the loop's body appends; show how far it is.
    `numbers` are those of all rows.
    """
    block_rows = BLOCK_BATCHES * batch_size
    if begin := into.resume(numbers, block_rows):
        console.label(into.title, f"{begin:,} of {len(numbers):,} rows are there already, continuing after them")
    with console.work("writing", into.title, len(numbers) - begin) as advance:
        for start in range(begin, len(numbers), block_rows):
            block = range(start, min(start + block_rows, len(numbers)))
            yield block
            advance(len(block))


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3:,} more" if len(places) > 3 else "")
