"""Score a finished run, or any model, by views: `python -m src.evaluate run=DIR KEY=VALUE …`.

Scored are the validation and test sets of the run's frozen config.yaml, exactly the rows that it evaluated, or those of
data.validation_files and data.test_files (a list, or name: list); evaluate.sets=[NAME] picks some. Without run= the
command is composed like that of src.run, and the model is scored as it is: model.checkpoint=DIR data=… . Its folder is
then outputs/<name>/evaluations-HASH, by the configuration.

A view is a row with other thoughts before its answer, evaluate.views=[gold,none,shuffled,own]:
- gold: the thoughts as the data has them; its loss is that of training.
- none: no thoughts; the text is written as data.thoughts=drop writes it.
- shuffled: those of another row that has as many, by seed.
- own: those that the model writes itself. After the opening tag it writes its likeliest tokens up to the closing tag,
  at most generation.max_thought_tokens (null: as many as the longest thought of the rows has), then the text up to the
  next thought is given, and so on.

A row that is too long in one view, or has no partner to exchange thoughts with, is left out of all: every view has the
same rows. By default rows with thoughts have all views, others only gold.

bits_per_byte is what the answers cost: the nats of their tokens (thoughts, tags and ends of turns left out) / ln 2 /
UTF-8 bytes of the answers without thoughts. So it can be compared between tokenizers. What a view saves is tested by a
paired bootstrap, 10,000 draws of rows: with a 95 % interval and p. evaluate.against=DIR compares with the evaluation of
another run on the rows that both have.

<set>/<view>.jsonl has a line a row, evaluation.json the metrics, evaluate/<set>/<view>/…, how many rows were left out
and why, and the comparisons. Rows are written a few batches at a time: the same command continues where one was
stopped, in whatever way. What another configuration, other rows or another model decided is not continued;
evaluate.output=DIR evaluates elsewhere, force=true starts the sets named here anew.

Exit code 0, 1 where it went wrong, 2 where the user can fix it, 75 where a signal stopped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cli.entry import answer, as_command
from src.cli.exits import guarded_in_folder
from src.config.frozen import config_hash
from src.config.gate import admit_finished
from src.config.identity import is_named_by_start
from src.config.job import Job
from src.config.schema import RunConfig
from src.config.schema.entries import VIEWS
from src.errors import ConfigError
from src.runtime.collector import collect_from_here
from src.runtime.signals import StopRequest, stop_on_signals
from src.util import plural

if TYPE_CHECKING:
    from src.data.dataset import EvaluatedRows
    from src.data.paired import PairedRows
    from src.evaluation.by_views import Models
    from src.evaluation.comparison import OtherEvaluation
    from src.evaluation.evaluated_set import EvaluatedSet
    from src.evaluation.evaluation_file import EvaluationFile
    from src.runtime.session import Runtime
    from src.tracking.console import Console


def evaluate(job: Job) -> int:
    """Compute what is missing of every set, and compare; return the exit code.

    TowlineError says what the user can fix; Interrupted, that a signal asked it to stop: what was written is kept.
    """
    from src.checkpoint.exported import check_exported, with_base_model
    from src.evaluation.comparison import read_other
    from src.evaluation.evaluated_set import open_evaluated
    from src.evaluation.evaluation_file import EvaluationFile
    from src.tracking.console import Console
    from src.tracking.lock import hold

    own, names = job.entry_section, set_names(job)
    config = with_base_model(job.run_dir, job.config) if job.is_finished else plain_model(job.config)
    job, output, console = replace(job, config=config), output_folder(job), Console()
    console.label("evaluate", f"{job.run_dir if job.is_finished else config.model.checkpoint} → {output}")
    if job.is_finished:
        check_exported(job.run_dir, config.model.checkpoint)
    other = None if own.against is None else read_other(Path(own.against))
    with stop_on_signals() as stop, hold(output):
        file = EvaluationFile(output)
        model = job.run_dir / "model" if job.is_finished else None
        sets = open_evaluated(output, config, job.frozen, own.views, names, model)
        score(job, sets, file, other, stop, console)
    return 0


def output_folder(job: Job) -> Path:
    """Return the folder of the evaluation, the same for the same command; that of a model without a run's folder is
    named by its configuration.
    """
    from src.data.sources import hash_of

    own = job.entry_section
    if job.is_finished or own.output is not None or not is_named_by_start(job.run_dir):
        return own.folder(job.run_dir)
    decided_by = hash_of(config_hash(job.frozen), own.views)
    return job.run_dir.with_name(f"evaluations-{decided_by[:12]}")


def set_names(job: Job) -> list[str]:
    """Return the names of the sets to evaluate; ConfigError where there is none, or what is asked for can't be done."""
    from src.evaluation.evaluated_set import OTHER_NAMES

    data, own, problems = job.config.data, job.entry_section, list[str]()
    known = [*data.validation_names(), *data.test_sets()]
    names = known if own.sets is None else [name for name in known if name in own.sets]
    if not known:
        problems.append("nothing to evaluate: give data.validation_files=[FILE] or data.test_files=[FILE]")
    elif unknown := [name for name in own.sets or () if name not in known]:
        problems.append(f"evaluate.sets: no set is called {', '.join(unknown)}; there are {', '.join(known)}")
    if data.is_held_out and not data.has_train:
        problems.append("the validation set is held out of train, and there is none: give data.train_files=[FILE]")
    if job.config.thought_tags is None and (needing := [view for view in own.views or () if view != "gold"]):
        problems.append(
            f"evaluate.views = {', '.join(needing)}: the rows have no thoughts, because no tags are written "
            "(data.thoughts, tokens.thought_open); evaluate.views=[gold]"
        )
    if taken := [name for name in names if name in OTHER_NAMES]:
        problems.append(f"a set can't be called {', '.join(taken)} here; choose another name")
    if problems:
        raise ConfigError("\n".join(problems))
    return names


def plain_model(config: RunConfig) -> RunConfig:
    """Return the configuration of a model that no run has trained; ConfigError where it starts from a checkpoint."""
    from src.checkpoint.exported import init_from_folder, with_init_from_model
    from src.runtime.precision import with_precision

    if config.init_from is not None and init_from_folder(config) is None:
        raise ConfigError(
            f"init_from = {config.init_from}: a checkpoint for training; export it first (python -m src.export "
            "run=DIR export.checkpoint=step-N), then model.checkpoint=FOLDER"
        )
    return with_precision(with_init_from_model(config))


def score(
    job: Job,
    sets: dict[str, EvaluatedSet],
    file: EvaluationFile,
    other: OtherEvaluation | None,
    stop: StopRequest,
    console: Console,
) -> None:
    """Score what is missing of every set, and write what follows from it."""
    # imported here: torch takes seconds, and a folder that is in use or holds another evaluation is refused at once
    from src.data.dataset import build_evaluated, without_thoughts
    from src.data.tokenizer import load_tokenizer
    from src.evaluation.by_views import evaluate_set, pair_rows
    from src.runtime.session import start_runtime

    collect_from_here()
    config, own = job.config, job.entry_section
    with start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime:
        model = config.model.pretrained_at(job.run_dir / "model") if job.is_finished else config.model
        tokenizer, new_tokens = load_tokenizer(model, config.tokens)
        rows = build_evaluated(config, tokenizer, list(sets), console.working)
        views = {name: own.views or (VIEWS if rows.reports[name].thought_tokens else ["gold"]) for name in sets}
        bare = {}
        if named := [name for name in sets if "none" in views[name]]:
            bare = build_evaluated(without_thoughts(config), tokenizer, named, console.working).sets
        paired = {name: pair_rows(rows, name, bare.get(name), views[name], config, tokenizer) for name in sets}
        if other is not None:
            other.check_common({name: one.places() for name, one in paired.items()}, sets, views)
        load = cache(lambda: load_models(job, rows, tokenizer, new_tokens, runtime, console))
        with stop.deferred():  # from here on it is followed between two batches or tokens
            for name, one in sets.items():
                evaluate_set(one, paired[name], config, load, console)
                finish(one, paired[name], file, other, job, console)


def load_models(
    job: Job, rows: EvaluatedRows, tokenizer: Any, new_tokens: Any, runtime: Runtime, console: Console
) -> Models:
    """Load what the run exported, or the model of the configuration with its new tokens."""
    from src.evaluation.answers import AnswerReader
    from src.evaluation.by_views import Models
    from src.evaluation.generate import Generator, check_generation
    from src.evaluation.predicting import load_model
    from src.evaluation.scoring import Scorer
    from src.evaluation.thoughts import thought_rule
    from src.training.assembly import assemble_model
    from src.training.head import ModelWithLoss

    config, prefix = job.config, rows.encoder.target_prefix
    if job.is_finished:
        model = load_model(job, tokenizer, rows.stop_ids, runtime, console)
    else:
        model = assemble_model(config, tokenizer, new_tokens, rows, runtime, console).model
        if not getattr(model, "is_quantized", False):  # quantised weights lie on the device already
            model.to(runtime.device)
        console.label("model", f"{type(model).__name__}, {runtime.description}")
    model.eval()
    for one in rows.sets.values() if config.metrics else ():
        check_generation(one, model, prefix, config.generation.max_new_tokens)
    loss_model = ModelWithLoss(model)
    loss_model.probe_head()
    size = config.training.per_device_eval_batch_size
    reader = AnswerReader(rows.encoder, config.thought_tags, rows.frame)
    rule = thought_rule(rows.encoder, config.generation)
    generator = Generator(model, runtime, size, prefix, reader, rule, progress=console)
    scorer = Scorer(loss_model, runtime, size, generator.pad_token_id)
    return Models(scorer, generator, writer=Generator(model, runtime, size, [], progress=console))


def finish(
    files: EvaluatedSet,
    paired: PairedRows,
    file: EvaluationFile,
    other: OtherEvaluation | None,
    job: Job,
    console: Console,
) -> None:
    """Sum a set up, compare its views, write both, and print them."""
    from src.evaluation.by_views import set_metrics
    from src.evaluation.comparison import between_views, comparison_table, score_table

    seed, views = job.config.seed, paired.views
    metrics = set_metrics(files, views, job.config)
    lines = {view: list(files.views[view].read()) for view in views}
    comparisons = between_views(lines, seed)
    against = None if other is None else other.compare(lines, files.hashes, seed)
    rows = {"scored": len(paired.kept), "left_out": dict(+paired.left_out)}
    file.put(files.name, metrics, rows, comparisons, against)
    left_out = f"; left out: {paired.reasons()}" if paired.reasons() else ""
    console.label(files.name, f"{plural(len(paired.kept), 'row')} scored{left_out}; {files.folder}")
    for line in [*score_table(metrics, files.name, views), *comparison_table([*comparisons, *(against or ())])]:
        console.say(f"  {line}")
    if generated := {key: value for key, value in metrics.items() if key.count("/") == 2}:
        console.table(generated)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then evaluate; return the exit code."""

    def begin(arguments: list[str]) -> int:
        job = admit_finished(arguments, "evaluate")
        return guarded_in_folder(job, lambda: evaluate(job), f"What was evaluated is in {output_folder(job)}")

    return answer("evaluate", __doc__, argv, begin)


if __name__ == "__main__":
    as_command(main)
