"""Generate with a finished run: `python -m src.predict run=DIR data.test_files=[FILE,…] KEY=VALUE …`.

The run's frozen config.yaml counts, with single keys on top: data.…, generation.…, seed, evaluation.metrics, runtime.…,
model.dtype, model.attn_implementation, training.mixed_precision, and keys of its own: predict.batch_size=N and
predict.output=DIR. force=true starts the sets named here anew.

Prompts are exactly those of training, made of all rows of data.test_files (a list, or name: list; where none are given
the run's own), unless data.limit is given here.
- A row needs no answer: where it is missing or empty the reference is null, and its set gets no metrics.
- Of a chat the assistant's last message is predicted; a chat may also end with the user.
- An answer takes no room: a row is too long where its prompt alone fills data.max_seq_length. Then its start is cut
  (data.overflow=truncate, truncate_prompt), or the row is left out (drop) or refused (error), and a message says so.
- A prompt that leaves the model no room for generation.max_new_tokens is refused before anything is generated.

A set is <set>.jsonl with row (from 0), source (file:line), prompt, text (with thoughts), answer (without), reference
and stop_reason (eos or length); with generation.num_return_sequences above 1 these are of the first sample, and samples
has all of them. Once it is whole, <set>.csv has the same without samples, and metrics.json has eval/<set>/…. Rows are
written a few batches at a time: the same command continues the same file where one was stopped, in whatever way. A
whole set is left as it is. A set that another configuration, other rows or another model decided is not continued;
<set>.json says what did.

Exit code 0, 1 where it went wrong, 2 where the user can fix it, 75 where a signal stopped it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.gate import admit_finished
from src.config.job import Job
from src.runtime.collector import collect_from_here
from src.runtime.signals import StopRequest, stop_on_signals

if TYPE_CHECKING:
    from src.data.dataset import Prompts
    from src.evaluation.generate import Generator
    from src.evaluation.predicted_set import PredictedSet
    from src.tracking.console import Console


def predict(job: Job) -> int:
    """Generate what is missing of every set, and score it; return the exit code.

    TowlineError says what the user can fix; Interrupted, that a signal asked it to stop: what was written is kept.
    """
    from src.checkpoint.exported import check_exported, with_base_model
    from src.evaluation.predictions import open_sets, predict_rows
    from src.tracking.console import Console
    from src.tracking.lock import hold

    job = replace(job, config=with_base_model(job.run_dir, job.config))
    config, run_dir, output = job.config, job.run_dir, job.entry_section.folder(job.run_dir)
    console = Console()
    console.label("predict", f"{run_dir} → {output}")
    check_exported(run_dir, config.model.checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    with stop_on_signals() as stop, hold(output):
        sets = open_sets(output, config, job.frozen, run_dir / "model")
        unfinished = {name: one for name, one in sets.items() if not one.is_generated()}
        for name, one in sets.items():
            if name not in unfinished:
                console.label(name, "finished and left as it is (predict.output=DIR predicts elsewhere)")
                finish(one, job, console)
        if not unfinished:
            return 0
        with open_generation(job, stop, console) as (generator, prompts):
            for name, one in unfinished.items():
                rows, num_samples = prompts.sets[name], config.generation.num_return_sequences
                (part,) = rows.shards
                numbers = part.ordinals.tolist()
                predict_rows(one, rows, generator, config.seed, num_samples, console, numbers=numbers)
                finish(one, job, console)
    return 0


@contextmanager
def open_generation(job: Job, stop: StopRequest, console: Console) -> Iterator[tuple[Generator, Prompts]]:
    """Load what the run exported, and the rows to predict."""
    # imported here: torch takes seconds, and a folder that is in use or holds other predictions is refused at once
    from src.data.advice import about_template
    from src.data.dataset import build_prompts
    from src.data.tokenizer import load_tokenizer
    from src.evaluation.answers import AnswerReader
    from src.evaluation.generate import Generator, check_room
    from src.evaluation.predictions import describe_rows
    from src.evaluation.thoughts import thought_rule
    from src.model.build import set_generation
    from src.model.export import load_exported
    from src.runtime.session import start_runtime

    collect_from_here()
    config, run_dir = job.config, job.run_dir
    batch_size = job.entry_section.batch_size or config.training.per_device_eval_batch_size
    with start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime:
        tokenizer, _ = load_tokenizer(config.model.pretrained_at(run_dir / "model"), config.tokens)
        prompts = build_prompts(config, tokenizer, console.working)
        model = load_exported(run_dir, config, runtime.device)
        if not getattr(model, "is_quantized", False):  # quantised weights lie on the device already
            model.to(runtime.device)
        set_generation(model, config.generation, tokenizer, prompts.stop_ids)
        for rows in prompts.sets.values():
            check_room(rows, model, prompts.encoder.target_prefix, config.generation.max_new_tokens)
        console.label("model", f"{type(model).__name__} of {run_dir / 'model'}, {runtime.description}")
        for name, rows in prompts.sets.items():
            console.label(name, describe_rows(rows))
            for finding in about_template(name, *rows.count_lines("changes")):
                console.warn(finding.text)
        reader = AnswerReader(prompts.encoder, config.thought_tags, prompts.frame)
        with stop.deferred():  # from here on it is followed between two tokens
            rule = thought_rule(prompts.encoder, config.generation)
            yield Generator(model, runtime, batch_size, prompts.encoder.target_prefix, reader, rule), prompts


def finish(one: PredictedSet, job: Job, console: Console) -> None:
    """Write the table of a set that is generated, and its metrics; say where they are."""
    one.write_table()
    values, lacking = one.score(job.config)
    console.label(one.name, f"{one.lines}, and {one.table.name}")
    if lacking and job.config.metrics:
        console.label("", f"no metrics: {lacking:,} row{'s have' if lacking > 1 else ' has'} no reference")
    elif values:
        console.table(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then generate; return the exit code."""

    def generate(arguments: list[str]) -> int:
        job = admit_finished(arguments, "predict")
        again = "the same command without force=true" if job.config.force else "the same command"
        where = f"What was predicted is in {job.entry_section.folder(job.run_dir)}:"
        return guarded(
            lambda: predict(job),
            when_stopped=f"{where} {again} resumes there.",
            when_full=f"{where} make room, and the same command resumes there.",
        )

    return answer("predict", __doc__, argv, generate)


if __name__ == "__main__":
    as_command(main)
