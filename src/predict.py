"""Generate with a finished run: `python -m src.predict run=DIR data.test_files=[FILE,…] KEY=VALUE …`.

The run's frozen config.yaml counts, with single keys on top: data.…, generation.…, seed, evaluation.metrics, runtime.…,
model.dtype, model.attn_implementation, training.mixed_precision, and keys of its own: predict.batch_size=N and
predict.output=DIR. force=true starts the sets named here anew.

Prompts are exactly those of training, made of all rows of data.test_files (a list, or name: list; where none are given
the run's own), unless data.limit is given here.
- A row needs no answer: where it is missing or empty the reference is null, and its answers are not scored.
- Where data.malformed_thoughts is error or drop, so is a row whose own answer has such thoughts: refused or left out.
- Of a chat the assistant's last message is predicted; a chat may also end with the user.
- An answer takes no room: a row is too long where its prompt alone fills data.max_seq_length. Then its start is cut
  (data.overflow=truncate, truncate_prompt), or the row is left out (drop) or refused (error), and a message says so.
- A prompt that leaves the model no room for generation.max_new_tokens is refused before anything is generated.

A set is <set>.jsonl with row (from 0), source (file:line), prompt, text (with thoughts), answer (without), reference
and stop_reason (eos or length), and with thought tags thoughts (num_tokens and is_closed of each); with
generation.num_return_sequences above 1 these are of the first sample, and samples has all of them. Once it is whole,
<set>.csv has the same without samples and thoughts, and metrics.json has eval/<set>/…. Rows are written a few batches
at a time: the same command continues the same file where one was stopped, in whatever way. A whole set is left as it
is. A set that another configuration, other rows or another model decided is not continued; <set>.json says what did.

Exit code 0, 1 where it went wrong, 2 where the user can fix it, 75 where a signal stopped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from src.cli.entry import answer, as_command
from src.cli.exits import guarded_in_folder
from src.config.gate import admit_finished
from src.config.job import Job
from src.runtime.signals import stop_on_signals


def predict(job: Job) -> int:
    """Generate what is missing of every set, and score it; return the exit code.

    TowlineError says what the user can fix; Interrupted, that a signal asked it to stop: what was written is kept.
    """
    from src.checkpoint.exported import check_exported, with_base_model
    from src.evaluation.predicting import predict_sets
    from src.tracking.console import Console
    from src.tracking.lock import hold

    job = replace(job, config=with_base_model(job.run_dir, job.config))
    run_dir, output = job.run_dir, job.entry_section.folder(job.run_dir)
    console = Console()
    console.label("predict", f"{run_dir} → {output}")
    check_exported(run_dir, job.config.model.checkpoint)
    with stop_on_signals() as stop, hold(output):
        predict_sets(job, output, stop, console, job.entry_section.batch_size)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then generate; return the exit code."""

    def generate(arguments: list[str]) -> int:
        job = admit_finished(arguments, "predict")
        folder = job.entry_section.folder(job.run_dir)
        return guarded_in_folder(job, lambda: predict(job), f"What was predicted is in {folder}")

    return answer("predict", __doc__, argv, generate)


if __name__ == "__main__":
    as_command(main)
