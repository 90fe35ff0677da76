"""Ask a finished run's model the tasks of lm-evaluation-harness: `python -m src.benchmark run=DIR benchmark.tasks=[…]`.

benchmark.tasks names tasks, groups and tags of the harness, or of benchmark.task_dir, a folder with YAML files of your
own. The run's frozen config.yaml counts, with single keys on top: benchmark.…, generation.…, seed, runtime.…,
model.dtype, model.attn_implementation, training.mixed_precision. force=true does the tasks named here anew.

- Prompts are encoded as in training. The chat template is applied where the run was trained on chats, with its system
  prompt, and only there.
- What a task says of generation counts (until, max_gen_toks, do_sample, temperature, …), and the run's generation.… for
  all else. Thoughts between the run's tags are taken off what was generated, before the task's stop texts and filters;
  they take none of its max_gen_toks, but generation.max_new_tokens more.
- Where a text is scored, no thought is before it.

A task is <task>.jsonl, with a line for each document and filter, and <task>.json, with its scores, their standard
errors, and what decided them. Both are written when it is done, so the same command continues with the next task where
one was stopped. A task that is done is left as it is; one that something else decided is refused. Results in the run's
folder are in its summary.json too, and in its tracker, as benchmark/<task>/<metric>.

Exit code 0, 1 where it went wrong, 2 where the user can fix it, 75 where a signal stopped it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.gate import admit_finished
from src.config.job import Job
from src.runtime.collector import collect_from_here
from src.runtime.signals import StopRequest, stop_on_signals
from src.util import plural

if TYPE_CHECKING:
    from src.harness.model import LoadedRun
    from src.harness.results import TaskResult
    from src.harness.tasks import Tasks
    from src.tracking.console import Console


def benchmark(job: Job) -> int:
    """Do what is missing of every task; return the exit code.

    TowlineError says what the user can fix; Interrupted, that a signal asked it to stop: tasks that are done are kept.
    """
    from src.checkpoint.exported import check_exported, with_base_model
    from src.harness.results import open_results
    from src.harness.tasks import load_tasks
    from src.tracking.console import Console
    from src.tracking.lock import hold

    job = replace(job, config=with_base_model(job.run_dir, job.config))
    run_dir, own, output = job.run_dir, job.entry_section, job.entry_section.folder(job.run_dir)
    console = Console()
    console.label("benchmark", f"{run_dir} → {output}")
    check_exported(run_dir, job.config.model.checkpoint)
    tasks = load_tasks(own.tasks, own.task_dir, own.num_fewshot, console.warn)
    output.mkdir(parents=True, exist_ok=True)
    with stop_on_signals() as stop, hold(output):
        results = open_results(output, tasks, job)
        missing = [result for result in results.values() if not result.is_done()]
        for result in results.values():
            if result not in missing:
                console.label("task", f"{result.name}: done and left as it is (benchmark.output=DIR does it elsewhere)")
                finish(result.metrics(), job, console)
        if missing:
            with open_model(job, stop, console) as run:
                for result in missing:
                    do_task(result, tasks.single[result.name], run, job, console)
                    finish(result.metrics(), job, console)
        finish_groups(tasks, results, job, console)
    return 0


@contextmanager
def open_model(job: Job, stop: StopRequest, console: Console) -> Iterator[LoadedRun]:
    """Load what the run exported, and what encodes its prompts."""
    # imported here: torch takes seconds, and a task that is not known or holds another result is refused at once
    from src.data.dataset import build_encoder, is_chat
    from src.data.tokenizer import load_tokenizer
    from src.evaluation.predicting import load_model
    from src.harness.model import LoadedRun
    from src.runtime.session import start_runtime

    collect_from_here()
    config = job.config
    batch_size = job.entry_section.batch_size or config.training.per_device_eval_batch_size
    with start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime:
        tokenizer, _ = load_tokenizer(config.model.pretrained_at(job.run_dir / "model"), config.tokens)
        prompts = build_encoder(config, tokenizer)
        model = load_model(job, tokenizer, prompts.stop_ids, runtime, console)
        chat = is_chat(config.data)
        how = "by the run's chat template" if chat else "as plain text, as the run was trained: no chat template"
        console.label("prompts", how)
        with stop.deferred():  # from here on it is followed between two tokens, or batches
            yield LoadedRun(model, tokenizer, prompts, config, runtime, batch_size, chat)


def do_task(result: TaskResult, task: Any, run: LoadedRun, job: Job, console: Console) -> None:
    """Ask the model one task, and write the result."""
    from src.harness.model import RunModel
    from src.harness.tasks import ask

    begins_turn = not task.get_config("gen_prefix")
    model = RunModel(run, begins_turn=begins_turn, name=result.name, progress=console)
    system_prompt = run.config.data.system_prompt if run.is_chat else None
    answered = ask(task, model, job.entry_section.limit, system_prompt, is_chat=run.is_chat)
    result.write(answered, model.texts, model.num_truncated)
    console.label("task", f"{result.name}: {result.lines}, and {result.file.name}")
    if model.num_truncated:
        cut = plural(model.num_truncated, "request")
        console.warn(f"{result.name}: the model has no room for {cut} with all of the prompt; its beginning was cut")


def finish_groups(tasks: Tasks, results: Mapping[str, TaskResult], job: Job, console: Console) -> None:
    """Compute the scores of groups; deliver to the run's tracker what it does not have."""
    from src.harness.results import group_metrics
    from src.tracking.tracker import deliver_late

    for name, group in tasks.groups.items():
        console.label("group", f"{name}: of its tasks")
        finish(group_metrics(group, results), job, console)
    if job.entry_section.output is None:
        deliver_late(job.run_dir, console)


def finish(metrics: Mapping[str, float], job: Job, console: Console) -> None:
    """Show scores; those of results in the run's folder get into its summary."""
    from src.tracking.late_metrics import add_to_summary

    if job.entry_section.output is None:
        add_to_summary(job.run_dir, metrics)
    if metrics:
        console.table(metrics)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then do the tasks; return the exit code."""

    def do(arguments: list[str]) -> int:
        from src.harness.tasks import check_installed

        job = admit_finished(arguments, "benchmark")
        check_installed()
        where = f"The tasks that are done are in {job.entry_section.folder(job.run_dir)}:"
        again = "the same command without force=true" if job.config.force else "the same command"
        return guarded(
            lambda: benchmark(job),
            when_stopped=f"{where} {again} does the others.",
            when_full=f"{where} make room, and the same command does the others.",
        )

    return answer("benchmark", __doc__, argv, do)


if __name__ == "__main__":
    as_command(main)
