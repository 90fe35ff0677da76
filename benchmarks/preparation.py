"""Rows a second from text to ids and labels: Towline beside TRL's SFTTrainer and a plain tokenizer call, in turn.

    python assets/make_bpe_model.py --text train.jsonl --fields question,answer --out models/gsm8k
    python -m benchmarks.preparation --model models/gsm8k --file train.jsonl [--rounds 5] [KEY=VALUE …]
    python -m benchmarks.preparation --model models/gsm8k --file train.jsonl --memory [KEY=VALUE …]

The file is GSM8K's: JSONL with `question` and `answer`, made prompts and completions for both. Towline starts from a
file and writes its cache into a new folder each round; TRL starts from rows in memory, caches nothing, and is timed in
`_prepare_dataset` alone; the plain call encodes all texts as one list and makes no labels. All are given one process;
the tokenizer takes threads for a list of texts, unless TOKENIZERS_PARALLELISM=false.

`--memory` prints the peak of a process that prepares the file's rows, and of one that prepares them ten times over,
beside one that only imports and loads the tokenizer. Not a test: figures differ from machine to machine.
"""

from __future__ import annotations

import argparse
import json
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
from src.tokens import load_tokenizer


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
    """Print rows a second of the three, round by round, and the median ratios."""
    rows = list(pairs(source))
    with tempfile.TemporaryDirectory() as folder:
        file = write(rows, Path(folder) / "rows.jsonl")
        config = configure(file, Path(folder), overrides)
        tokenizer, _ = load_tokenizer(config.model, config.tokens)
        prepare = trl_preparation(rows, tokenizer, config, folder)
        over_trl, over_tokenizer = [], []
        for number in range(rounds):
            ours = len(rows) / towline(file, tokenizer, overrides)
            theirs = len(rows) / prepare()
            alone = len(rows) / plain(rows, tokenizer)
            over_trl.append(ours / theirs)
            over_tokenizer.append(ours / alone)
            print(
                f"round {number + 1}: Towline {ours:,.0f} rows/s, TRL {theirs:,.0f} rows/s, "
                f"tokenizer alone {alone:,.0f} rows/s, Towline / TRL {over_trl[-1]:.2f}"
            )
    print(f"Towline / TRL, median of {rounds}: {statistics.median(over_trl):.2f}")
    print(f"Towline / tokenizer alone, median of {rounds}: {statistics.median(over_tokenizer):.2f}")


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


def towline(file: Path, tokenizer: Any, overrides: Sequence[str]) -> float:
    """Give the seconds that Towline takes, its cache empty before."""
    with tempfile.TemporaryDirectory() as cache:
        config = configure(file, Path(cache), overrides)
        started = time.perf_counter()
        build_data(config, tokenizer)
        return time.perf_counter() - started


def trl_preparation(rows: list[dict[str, str]], tokenizer: Any, config: RunConfig, folder: str) -> Callable[[], float]:
    """Construct an SFTTrainer, and give what times its preparation of all rows in seconds."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    arguments = SFTConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        max_length=config.data.max_seq_length,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.checkpoint))
    few = datasets.Dataset.from_list(rows[:8])
    trainer = SFTTrainer(model, arguments, train_dataset=few, processing_class=tokenizer)

    def seconds() -> float:
        dataset = datasets.Dataset.from_list(rows)
        started = time.perf_counter()
        trainer._prepare_dataset(dataset, tokenizer, arguments, arguments.packing, None, "train")
        return time.perf_counter() - started

    return seconds


def plain(rows: list[dict[str, str]], tokenizer: Any) -> float:
    """Give the seconds of one call for all texts."""
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    started = time.perf_counter()
    tokenizer(texts)
    return time.perf_counter() - started


def peak_mib(file: Path, overrides: Sequence[str], *, prepares: bool = True) -> float:
    """Give the peak resident memory of a fresh process that prepares a file, or only gets ready to."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_peak_mib_here, file, overrides, prepares).result()


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
