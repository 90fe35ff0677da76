"""Rows a second from text to ids and labels: Towline beside TRL's SFTTrainer and a plain tokenizer call, in turn.

    python assets/make_bpe_model.py --text train.jsonl --fields question,answer --out models/gsm8k
    python -m benchmarks.preparation --model models/gsm8k --file train.jsonl [--rounds 5] [KEY=VALUE …]
    python -m benchmarks.preparation --model models/gsm8k --file train.jsonl --memory [KEY=VALUE …]

The file is GSM8K's: JSONL with `question` and `answer`, made prompts and completions for both. Towline and TRL start
from that file with an empty cache each round and leave encoded rows on the disk (TRL: Dataset.from_json, then its
`_prepare_dataset`). "TRL in memory" is its best case, `_prepare_dataset` alone, on rows that are in memory, with its
cache off; the plain call encodes all texts as one list and makes no labels. Each runs in a fresh process, warmed up on
a few rows, one after the other, and is given one process; TRL and the plain call let the tokenizer take a thread a core
for a list of texts, Towline has threads of its own.

`--memory` prints the peak of a process that prepares the file's rows, and of one that prepares them ten times over,
beside one that only imports and loads the tokenizer. Not a test: figures differ from machine to machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from src.config.gate import admit
from src.config.schema import RunConfig
from src.data.dataset import build_data
from src.data.tokenizer import load_tokenizer

WARM_UP_ROWS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="other settings, KEY=VALUE as for src.run")
    parser.add_argument("--model", required=True, help="folder with a tokenizer and a config.json")
    parser.add_argument("--file", required=True, type=Path, help="JSONL with question and answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    given = parser.parse_args()
    overrides = [f"model.checkpoint='{given.model}'", *given.overrides]
    if given.memory:
        memory(given.file, overrides)
    else:
        speed(given.file, overrides, given.rounds)


def speed(source: Path, overrides: Sequence[str], rounds: int) -> None:
    """Print rows a second of all, round by round, and the median ratios."""
    contenders = {
        "Towline": _towline_here,
        "TRL": _trl_from_file_here,
        "TRL in memory": _trl_in_memory_here,
        "tokenizer alone": _plain_here,
    }
    ratios: dict[str, list[float]] = {name: [] for name in contenders if name != "Towline"}
    with tempfile.TemporaryDirectory() as folder:
        file = write(pairs(source), Path(folder) / "rows.jsonl")
        few = write(itertools.islice(pairs(source), WARM_UP_ROWS), Path(folder) / "few.jsonl")
        num_rows = sum(1 for _ in pairs(source))
        for number in range(rounds):
            speeds = {
                name: num_rows / in_a_fresh_process(run, few, file, overrides) for name, run in contenders.items()
            }
            for name, values in ratios.items():
                values.append(speeds["Towline"] / speeds[name])
            told = ", ".join(f"{name} {rows:,.0f}" for name, rows in speeds.items())
            print(f"round {number + 1}, rows/s: {told}; Towline / TRL {ratios['TRL'][-1]:.2f}", flush=True)
    for name, values in ratios.items():
        print(f"Towline / {name}, median of {rounds}: {statistics.median(values):.2f}")


def in_a_fresh_process(run: Callable[..., float], *given: Any) -> float:
    """Call a function where no other contender has left anything behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(run, *given).result()


def memory(source: Path, overrides: Sequence[str]) -> None:
    """Print the peak memory of fresh processes.

    A process starts with the peak of the one that started it, so nothing large may be read or imported here.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, long_file = (write(pairs(source, times), Path(folder) / f"rows{times}.jsonl") for times in (1, 10))
        idle = peak_mib(file, overrides, prepares=False)
        once, tenfold = (peak_mib(each, overrides) for each in (file, long_file))
    num_rows = sum(1 for _ in pairs(source))
    print(f"imports and tokenizer only: {idle:,.0f} MiB")
    print(f"{num_rows:,} rows: {once:,.0f} MiB, {once / idle:.2f} times that, {once - idle:,.0f} MiB more")
    print(
        f"{10 * num_rows:,} rows: {tenfold:,.0f} MiB, {tenfold / idle:.2f} times that, {tenfold - idle:,.0f} MiB more"
    )


def pairs(source: Path, times: int = 1) -> Iterator[dict[str, str]]:
    """Give every question and answer as prompt and completion, the whole file `times` times over."""
    for _ in range(times):
        with source.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield {"prompt": row["question"] + "\n", "completion": row["answer"]}


def write(rows: Sequence[dict[str, str]] | Iterator[dict[str, str]], file: Path) -> Path:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return file


def configure(file: Path, cache: Path, overrides: Sequence[str]) -> RunConfig:
    data = ["data=prompt_completion", f"data.train_files=['{file}']", f"data.cache_dir='{cache}'"]
    request = admit(["tracking=none", "tokens=none", *data, *overrides])
    assert request.run is not None
    return request.run.config


def _towline_here(few: Path, file: Path, overrides: Sequence[str]) -> float:
    """Give the seconds that Towline takes, its cache empty before."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as src.run does
    seconds = 0.0
    for rows in (few, file):
        with tempfile.TemporaryDirectory() as cache:
            config = configure(rows, Path(cache), overrides)
            tokenizer, _ = load_tokenizer(config.model, config.tokens)
            started = time.perf_counter()
            build_data(config, tokenizer)
            seconds = time.perf_counter() - started
    return seconds


def _trl_from_file_here(few: Path, file: Path, overrides: Sequence[str]) -> float:
    """Give the seconds that TRL takes to read a file and prepare its rows, both caches empty before."""
    import datasets

    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        prepare = _trl_preparation(few, Path(folder), overrides)
        for rows in (few, file):
            started = time.perf_counter()
            prepare(datasets.Dataset.from_json(str(rows), cache_dir=f"{folder}/{rows.stem}"))
            seconds = time.perf_counter() - started
    return seconds


def _trl_in_memory_here(few: Path, file: Path, overrides: Sequence[str]) -> float:
    """Give the seconds that TRL takes to prepare rows that are in memory, and to keep them there."""
    import datasets

    datasets.disable_caching()
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        prepare = _trl_preparation(few, Path(folder), overrides)
        for rows in (few, file):
            dataset = datasets.Dataset.from_list([json.loads(line) for line in rows.open(encoding="utf-8")])
            started = time.perf_counter()
            prepare(dataset)
            seconds = time.perf_counter() - started
    return seconds


def _trl_preparation(few: Path, folder: Path, overrides: Sequence[str]) -> Callable[[Any], None]:
    """Construct an SFTTrainer, and give its preparation of a data set."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    config = configure(few, folder, overrides)
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    arguments = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        max_length=config.data.max_seq_length,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.checkpoint))
    first = datasets.Dataset.from_json(str(few), cache_dir=f"{folder}/first")
    trainer = SFTTrainer(model, arguments, train_dataset=first, processing_class=tokenizer)
    return lambda rows: trainer._prepare_dataset(rows, tokenizer, arguments, arguments.packing, None, "train")


def _plain_here(few: Path, file: Path, overrides: Sequence[str]) -> float:
    """Give the seconds of one tokenizer call for all texts."""
    config = configure(few, few.parent, overrides)
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    seconds = 0.0
    for rows in (few, file):
        read = [json.loads(line) for line in rows.open(encoding="utf-8")]
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in read]
        started = time.perf_counter()
        tokenizer(texts)
        seconds = time.perf_counter() - started
    return seconds


def peak_mib(file: Path, overrides: Sequence[str], *, prepares: bool = True) -> float:
    """Give the peak resident memory of a fresh process that prepares a file, or only gets ready to."""
    return in_a_fresh_process(_peak_mib_here, file, overrides, prepares)


def _peak_mib_here(file: Path, overrides: Sequence[str], prepares: bool) -> float:
    with tempfile.TemporaryDirectory() as cache:
        config = configure(file, Path(cache), overrides)
        tokenizer, _ = load_tokenizer(config.model, config.tokens)
        if prepares:
            build_data(config, tokenizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main()
