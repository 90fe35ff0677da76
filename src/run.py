"""Train one configuration: `python -m src.run GROUP=OPTION SECTION.KEY=VALUE …`; with -m, one run a combination.

`run` is the table of contents of an experiment: when something happens is decided here, how is decided where it is
called. The command line is answered before what it needs is imported, and torch only for a configuration that is good.
"""

if __name__ == "__main__":
    from src.cli.entry import as_command
    from src.cli.main import main

    as_command(main)

from src.config.job import Job
from src.data.dataset import build_data
from src.data.tokenizer import load_tokenizer
from src.evaluation.evaluate import open_evaluator
from src.evaluation.samples import sample
from src.model.embeddings import check_new_rows
from src.overview import overview
from src.runtime.profiling import profiled
from src.runtime.signals import StopRequest
from src.sweep.pruning import Pruning, end_early
from src.tracking.tracker import Tracker
from src.training.assembly import assemble_model, load_initial_weights, record_provenance, run_warnings, start_session
from src.training.loop import train
from src.training.resume import ResumePoint
from src.training.saving import export_trained, fingerprint_of, open_saver
from src.training.state import build_train_state
from src.training.work_ahead import work_ahead


def run(job: Job, found: ResumePoint, tracker: Tracker, stop: StopRequest) -> dict[str, float]:
    """Train, evaluate and export one job, from the beginning or from a checkpoint, and return its summary.

    TowlineError: the user can fix it, or it went wrong. Interrupted, Pruned: it was asked to stop, and saved if begun.
    """
    with start_session(job, found, stop) as (runtime, job, resume):  # job and checkpoint are the same on every rank
        job = resume.adjust(job, runtime.num_processes, tracker.warn)  # as many rows a step as before
        config, provenance = job.config, record_provenance(tracker, job, runtime)

        tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
        data = build_data(config, tokenizer, tracker.console.working)  # counts what it kept, truncated and dropped
        resume = resume.checked(data, tokenizer, job, runtime.num_processes)  # refused before any weight is read
        tracker.write_file("data_report.json", data.report())
        built = assemble_model(config, tokenizer, new_tokens, data, runtime, tracker.console)  # resized, with adapter
        state = build_train_state(built.model, data.train, config, runtime, new_tokens.ids, *resume.start)
        check_new_rows(state.model, built.initialised)  # bit for bit, after wrapping
        tracker.warn(*load_initial_weights(state, tokenizer, runtime, config))  # init_from
        evaluator = open_evaluator(config, state.loss_model, state.model, data, runtime, tracker.console)
        tracker.warn(*run_warnings(config, data, tokenizer, state, runtime))
        tracker.show_overview(overview(job, state, built, data, runtime), work_ahead(config, data, state))
        samples, num_prompts = data.for_samples(), config.evaluation.sample_prompts
        untrained = resume.untrained or [one.text for one in sample(evaluator, samples, num_prompts, step=0)]
        fingerprint = fingerprint_of(state, data, tokenizer, runtime, config)
        tracker.warn(*resume.restore(state, fingerprint, runtime, config))  # weights, optimizer, counters, generators

        with open_saver(job, resume, state, fingerprint, untrained, runtime, tracker) as saver, stop.deferred():
            pruning = Pruning(job.trial if runtime.is_main else None, job.run_dir, saver.lines, tracker.warn)
            steps = train(state, data.train, config, runtime, evaluator.generator.pad_token_id)
            for step in profiled(steps, job, runtime, tracker.console.label):
                tracker.progress(step, state.num_steps, is_logged=step.is_due(config.training.logging_steps))
                tracker.warn(*step.warnings)
                if saver.is_due(step):
                    saver.save()  # before the evaluation: a run that is stopped in it repeats it
                with tracker.line(step, due=step.is_due(config.training.logging_steps)) as line:
                    if step.is_due(config.evaluation.eval_steps):
                        line.metrics |= evaluator.evaluate(data.validation.values(), new_tokens.ids)
                        line.metrics |= state.token_monitor.metrics()
                        saver.keep_if_best(line.metrics)
                        step = saver.stop_early(step, line.metrics)  # the last one, where patience has run out
                    if step.is_last:
                        saver.load_best_if_asked()
                        line.metrics |= evaluator.evaluate(data.test.values())
                    if step.is_due(config.evaluation.sample_steps):
                        line.samples = sample(evaluator, samples, num_prompts, step.number, untrained)
                if job.trial is not None and step.is_due(config.evaluation.eval_steps) and not step.is_last:
                    end_early(runtime.from_main(pruning.verdict(line.metrics)))
            totals = state.totals()  # merging takes the adapter out of the model
            exported = export_trained(job, state, built, data, provenance, runtime, tracker)
            saver.finish()
            return tracker.finish(totals | {"peak_memory_bytes": runtime.peak_memory_bytes()}, exported, built.base)
