"""Generating with what runs exported: the sets that are asked for, into a folder that this process holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config.job import Job
from src.evaluation.predicted_set import PredictedSet
from src.evaluation.predictions import describe_rows, open_sets, predict_rows, row_numbers
from src.runtime.collector import collect_from_here
from src.runtime.signals import StopRequest
from src.tracking.console import Console

if TYPE_CHECKING:
    from src.data.dataset import Prompts
    from src.evaluation.generate import Generator
    from src.runtime.session import Runtime


def predict_sets(
    job: Job, output: Path, stop: StopRequest, console: Console, batch_size: int | None = None
) -> dict[str, PredictedSet]:
    """Generate what is missing of every set, and score it; return the sets. Raises as `open_sets`."""
    output.mkdir(parents=True, exist_ok=True)
    sets = open_sets(output, job.config, job.frozen, job.run_dir / "model")
    unfinished = {name: one for name, one in sets.items() if not one.is_generated()}
    for name, one in sets.items():
        if name not in unfinished:
            console.label(name, f"finished in {output}, and left as it is")
            finish(one, job, console)
    if unfinished:
        with open_generation([job], stop, console, batch_size) as (generator, prompts):
            for name, one in unfinished.items():
                rows, num_samples = prompts.sets[name], job.config.generation.num_return_sequences
                predict_rows(one, rows, generator, job.config.seed, num_samples, console, numbers=row_numbers(rows))
                finish(one, job, console)
    return sets


@contextmanager
def open_generation(
    jobs: Sequence[Job], stop: StopRequest, console: Console, batch_size: int | None = None
) -> Iterator[tuple[Generator, Prompts]]:
    """Load what runs exported, to generate by the mean of their probabilities, and the rows to predict.

    All are in memory at once. The first one's configuration counts. ModelError where another one is fed other ids.
    """
    # imported here: torch takes seconds, and a folder that is in use or holds other predictions is refused at once
    from src.data.advice import about_template
    from src.data.dataset import build_prompts
    from src.data.tokenizer import load_tokenizer
    from src.evaluation.answers import AnswerReader
    from src.evaluation.generate import Generator, check_room
    from src.evaluation.thoughts import thought_rule
    from src.runtime.session import start_runtime

    collect_from_here()
    job, config = jobs[0], jobs[0].config
    with start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime:
        tokenizer, _ = load_tokenizer(config.model.pretrained_at(job.run_dir / "model"), config.tokens)
        prompts = build_prompts(config, tokenizer, console.working)
        for other in jobs[1:]:
            _check_prompts(other, build_prompts(other.config, tokenizer, console.working), job, prompts)
        models = [load_model(one, tokenizer, prompts.stop_ids, runtime, console) for one in jobs]
        for name, rows in prompts.sets.items():
            for model in models:
                check_room(rows, model, prompts.encoder.target_prefix, config.generation.max_new_tokens)
            console.label(name, describe_rows(rows))
            for finding in about_template(name, *rows.count_lines("changes")):
                console.warn(finding.text)
        reader = AnswerReader(prompts.encoder, config.thought_tags, prompts.frame)
        size = batch_size or config.training.per_device_eval_batch_size
        rule = thought_rule(prompts.encoder, config.generation)
        with stop.deferred():  # from here on it is followed between two tokens
            prefix, others = prompts.encoder.target_prefix, models[1:]
            yield Generator(models[0], runtime, size, prefix, reader, rule, others, console), prompts


def _check_prompts(other: Job, prompts: Prompts, job: Job, expected: Prompts) -> None:
    from src.errors import ModelError

    for name, rows in expected.sets.items():
        if prompts.sets[name].digest() != rows.digest() or prompts.stop_ids != expected.stop_ids:
            raise ModelError(
                f"{other.run_dir} and {job.run_dir} make other prompts of the rows of {name}, or end at other ids, as "
                "their data or tokens are configured otherwise: ensemble.method=consensus compares their texts"
            )


def load_model(job: Job, tokenizer: Any, stop_ids: Sequence[int], runtime: Runtime, console: Console) -> Any:
    """Load the model of a finished run onto the device; it generates as configured, up to one of `stop_ids`."""
    from src.model.build import set_generation
    from src.model.export import load_exported

    with console.work("loading", str(job.run_dir / "model")):
        model = load_exported(job.run_dir, job.config, runtime.device)
        if not getattr(model, "is_quantized", False):  # quantised weights lie on the device already
            model.to(runtime.device)
    set_generation(model, job.config.generation, tokenizer, stop_ids)
    console.label("model", f"{type(model).__name__} of {job.run_dir / 'model'}, {runtime.description}")
    return model


def finish(one: PredictedSet, job: Job, console: Console) -> None:
    """Write the table of a set that is generated, and its metrics; say where they are."""
    one.write_table()
    values, lacking = one.score(job.config)
    console.label(one.name, f"{one.lines}, and {one.table.name}")
    if lacking and job.config.metrics:
        console.label("", f"answers are not scored: {lacking:,} row{'s have' if lacking > 1 else ' has'} no reference")
    if values:
        console.table(values)
