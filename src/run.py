"""Train one configuration: `python -m src.run GROUP=OPTION SECTION.KEY=VALUE …`; with -m one run a combination.

`run` is the table of contents of an experiment. Nothing heavy is imported before the configuration has been found good.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config.compose import CONF, PROJECT_ROOT, Composed, resolve_sections
from src.config.gate import Job, Request, admit, parse
from src.config.quoting import shell_override
from src.config.show import shown_config
from src.config.source import install
from src.errors import (
    Interrupted,
    Pruned,
    TowlineError,
    TrainingError,
    is_disk_full,
    report,
    show,
    show_libraries_visibly,
    visible,
)
from src.runtime.collector import collect_from_here, rest_while_importing
from src.runtime.launch import copy_output, follow_parent, is_launched, launch, num_processes, place_of
from src.runtime.signals import StopRequest, stop_on_signals
from src.secrets import as_variables, clean
from src.terminal import columns_of, wrapped

if TYPE_CHECKING:
    from src.checkpoint.locate import Origin
    from src.sweep.sweeper import SweepRequest
    from src.tracking.console import Console
    from src.tracking.run_folder import Start
    from src.tracking.tracker import Tracker

if "OMP_WAIT_POLICY" not in os.environ:
    # threads that wait spin for a while; beside other work on the same cores the default is up to seven times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # docs/decisions/0007
for switch in ("HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(switch, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of our own, each with its chunk, are faster

FROZEN = "--frozen"
"""In front of a frozen configuration's file and the run's folder: this is one of several processes."""


def run(admitted: Job, stop: StopRequest) -> dict[str, float]:
    """Run one admitted configuration to its end, from the beginning or where it was stopped, and give its summary.

    Raises:
        TowlineError: what the user can mend, or that the run went wrong.
        Interrupted: where something asked it to stop; it is saved then, if it had begun to train.
    """
    from src.checkpoint.locate import check_best, find_origin
    from src.tracking.console import Console
    from src.tracking.run_folder import hold, metrics_at
    from src.tracking.tracker import NullTracker, open_tracking

    config, run_dir = admitted.config, admitted.run_dir
    console = Console()
    stop.is_deferred = False
    stop.check()
    stop.allow(config.training.max_seconds)
    place = place_of()
    if place is not None and not place.is_main:
        return train_and_export(admitted, None, NullTracker(console), console, stop)
    console.label("run", f"{config.name} → {run_dir}")
    with nullcontext() if admitted.is_held else hold(run_dir):
        origin = find_origin(config.checkpoint, admitted.frozen, run_dir, force=config.force)
        check_best(config.checkpoint, origin, run_dir, metrics_at(run_dir, origin.own_step))
        with open_tracking(config.tracking, run_dir, admitted.frozen, console, start_of(admitted, origin)) as tracking:
            return train_and_export(admitted, origin, tracking, console, stop)


def train_and_export(
    admitted: Job, found: Origin | None, tracking: Tracker, console: Console, stop: StopRequest
) -> dict[str, float]:
    """Do all of a run but what holds its folder; see `run`."""
    # imported here: torch takes seconds, and a folder that is in use or a typo should be told at once
    from src.checkpoint.exported import base_digests, exported_digests, starting_model
    from src.checkpoint.locate import Origin, written_weights
    from src.checkpoint.store import open_checkpoints
    from src.data.advice import Level, advice
    from src.data.dataset import build_data, file_hashes
    from src.data.tokenizer import load_tokenizer
    from src.evaluation.evaluate import open_evaluation
    from src.evaluation.samples import sample
    from src.model.adapters import add_adapter
    from src.model.build import build_model, set_generation, with_zero_sizes
    from src.model.card import model_card
    from src.model.embeddings import as_they_are, check_new_rows, embedding_matrices, resize_and_initialise
    from src.model.export import export
    from src.model.unlearned import unlearned_tokens
    from src.overview import overview
    from src.runtime.session import start_runtime
    from src.runtime.sharding import deepspeed_settings, gather_on_cpu, unsharded_models
    from src.sweep.pruning import Pruning, end_early
    from src.tracking.provenance import provenance
    from src.training.loop import train
    from src.training.optim import cannot_learn
    from src.training.resume import (
        beginning,
        ended_there,
        fingerprint_of,
        first_comparable,
        resume,
        same_step,
        start_from_adapter,
        start_from_checkpoint,
    )
    from src.training.state import prepare

    collect_from_here()
    asked = admitted.config
    sharing = deepspeed_settings(with_zero_sizes(asked), num_processes())
    with (
        start_runtime(asked.runtime, asked.training.mixed_precision, asked.seed, stop, sharing) as runtime,
        ExitStack() as until_the_end,
    ):
        # what the first process composed and found is what counts, in all of them
        frozen, run_dir, origin = runtime.from_main((admitted.frozen, admitted.run_dir, found or Origin()))
        given = asked if frozen is admitted.frozen else parse(frozen)
        config, warnings = same_step(starting_model(given), origin, runtime.num_processes)
        if origin.checkpoint is not None:
            tracking.describe({"resumed": f"behind step {origin.step}, from {origin.checkpoint}"})
        tracking.warn([*origin.warnings, *warnings])
        checkpoints = until_the_end.enter_context(
            open_checkpoints(config.checkpoint, run_dir, tracking.sync, writes=runtime.is_main)
        )
        tracking.warn(checkpoints.warnings)
        made = provenance(frozen, file_hashes(config.data), runtime.description, PROJECT_ROOT)
        tracking.record_once("provenance.json", made)
        if config.data.cache_dir is None:
            folder = until_the_end.enter_context(runtime.shared_folder())
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(folder)))
        tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
        data = build_data(config, tokenizer, console.working)
        begin = beginning(origin, data, tokenizer, config, frozen)
        tracking.record("data_report.json", data.report())
        if (settings := deepspeed_settings(with_zero_sizes(config), runtime.num_processes)) is not None:
            tracking.record("deepspeed.json", settings)
        base = None if config.adapter.type == "none" or not runtime.is_main else base_digests(config.model.checkpoint)
        model = build_model(config, runtime.device)
        set_generation(model, config.generation, tokenizer, data.stop_ids, data.encoder.target_prefix)
        unlearned = unlearned_tokens(model, tokenizer, new_tokens, config.model)
        started = resize_and_initialise(model, tokenizer, new_tokens, config.tokens, config.seed, unlearned)
        matrices = [matrix.module for matrix in embedding_matrices(model)]
        new_ids = list(started.ids.values())
        adapter = add_adapter(model, config.adapter, config.model, new_ids, matrices, is_merged=config.export.merge)
        if start_from_adapter(adapter, tokenizer, config):
            started = as_they_are(model, started)
        state = prepare(model, data.train, config, runtime, new_tokens.ids, begin)
        check_new_rows(state.model, started)
        tracking.warn(start_from_checkpoint(state, tokenizer, runtime, config))
        evaluation = open_evaluation(config, state.scored, state.model, data, runtime)
        samples_of = data.for_samples()
        tracking.warn([one.text for one in advice(config, data, tokenizer) if one.level is not Level.note])
        tracking.warn(cannot_learn(config.scheduler, state.num_steps))
        tracking.describe(overview(config, state, tokenizer, new_tokens, started, data, runtime, run_dir))
        untrained = begin.untrained or [
            one.text for one in sample(evaluation, samples_of, config.evaluation.sample_prompts, 0)
        ]
        facts = fingerprint_of(state, data, tokenizer, runtime, config)
        tracking.warn(resume(state, origin, begin, facts, runtime, config))
        if origin.own_step is not None:
            tracking.warn(checkpoints.discard_after(origin.own_step))
        tracking.expect(state.num_steps, state.steps_per_epoch)
        is_end = state.step >= state.num_steps or ended_there(origin)
        lines, again = runtime.from_main((tracking.rewind_to(state.step, is_end=is_end), tracking.cut_line))
        state.mark_complete(is_over=any(line["step"] == state.step for line in lines))
        comparable_from = first_comparable(origin, facts, state)
        evaluated = [*(origin.state.get("best", ()) if origin.is_own else ()), *lines]
        if again is not None and state.evaluates_again(config.evaluation.eval_steps):
            evaluated.append(again)
        comparable = {line["step"]: line for line in evaluated if line["step"] >= comparable_from}
        tracking.warn(checkpoints.load_index(comparable.values(), origin.own_step, written_weights(origin)))

        def beside() -> dict[str, Any]:
            now = dataclasses.replace(facts, step=state.step).as_dict()
            return {
                "config": frozen,
                "facts": now,
                "comparable_from": comparable_from,
                "best": checkpoints.best_evaluations,
                "journal": tracking.journal_before(state.step),
                "untrained": untrained,
                "tracker_run_id": tracking.tracker_run_id,
            }

        def save() -> None:
            checkpoints.save(state.step, lambda: state.snapshot(runtime, beside()))

        pruning = Pruning(admitted.trial if runtime.is_main else None, lines, console.warn)
        every, takes_best = config.checkpoint.checkpointing_steps, config.checkpoint.load_best_model_at_end
        runtime.wait()
        stop.is_deferred = True  # from here on there is something to end properly
        try:
            for step in train(state, data.train, config, runtime, evaluation.pad_token_id):
                tracking.progress(step, state.num_steps, config.training.logging_steps)
                tracking.warn(step.warnings)
                if step.is_due(every) or (step.is_last and (every is not None or takes_best)):
                    save()  # before the evaluation: a run that is stopped there does it again
                with tracking.line(step, due=step.is_due(config.training.logging_steps) or step.is_last) as line:
                    if step.is_due(config.evaluation.eval_steps) or step.is_last:
                        line.metrics |= evaluation.evaluate(data.validation.values(), new_tokens.ids)
                        line.metrics |= state.new_rows.telemetry()
                        checkpoints.keep_if_best(
                            step.number, line.metrics, lambda: state.only_weights(runtime, beside())
                        )
                    if step.is_last:
                        if takes_best and checkpoints.best not in (None, step.number):
                            checkpoints.wait()
                            runtime.wait()
                            state.restore_weights(checkpoints.best_weights(), runtime)
                        line.metrics |= evaluation.evaluate(data.test.values())
                    if step.is_due(config.evaluation.sample_steps) or step.is_last:
                        prompts = config.evaluation.sample_prompts
                        line.samples = sample(evaluation, samples_of, prompts, step.number, untrained)
                if admitted.trial is not None and step.is_due(config.evaluation.eval_steps) and not step.is_last:
                    end_early(runtime.from_main(pruning.verdict(line.metrics)))
        except (Interrupted, Pruned):
            save()
            checkpoints.wait()
            runtime.wait()  # a launcher may end all once the first has left
            raise

        if config.data.streaming:
            tracking.record("data_report.json", data.report())  # what was read is known only now
        card = model_card(frozen, data.report(), tracking.latest, made, new_tokens.ids)
        alone = model_card(frozen | {"export": {"merge": False}}, data.report(), tracking.latest, made, new_tokens.ids)
        totals = state.totals()  # merging takes the adapter out of the model
        gather_on_cpu(state.model, keeps=runtime.is_main)
        if runtime.is_main:
            with unsharded_models():
                tracking.warn(export(state.model, adapter, tokenizer, run_dir / "model", config, card, alone))
        checkpoints.finish(was_due=state.last is not None and state.last.is_due(config.evaluation.eval_steps))
        exported = exported_digests(run_dir / "model") if runtime.is_main else None
        return tracking.finish(totals | {"peak_memory_bytes": runtime.peak_memory_bytes()}, exported, base)


def start_of(admitted: Job, origin: Origin) -> Start:
    """Say how the run's folder begins: behind which step, and with which keys other than its frozen config.yaml."""
    from src.checkpoint.compatibility import compare_configs
    from src.config.frozen import CONFIG, read_config
    from src.tracking.run_folder import Start

    config, frozen = admitted.config, admitted.frozen
    is_there = not config.force and os.path.lexists(admitted.run_dir / CONFIG)
    first = read_config(admitted.run_dir) if is_there else frozen
    changes = [] if origin.step is None else compare_configs(first, frozen)
    return Start(
        step=origin.step,
        changed={change.key: change.now for change in changes if change.key not in ("force", "rerun")},
        may_begin_again=config.checkpoint.resume != "never",
        is_own=origin.is_own,
        force=config.force,
        journal=origin.state.get("journal", {}) if origin.is_own else {},
        allow_changed=config.checkpoint.allow_changed,
    )


def finished_before(admitted: Job) -> bool:
    """Leave a folder whose run is finished as it is, unless more steps are asked of it; deliver what MLflow lacks.

    Raises:
        RunFolderError, CheckpointError: where it is asked for more and can't go on.
    """
    from src.checkpoint.longer import check_longer, how_to_go_on_for_longer, is_asked_for_more
    from src.config.frozen import config_hash, is_finished, read_starts
    from src.tracking.console import Console
    from src.tracking.tracker import deliver_pending

    config, run_dir = admitted.config, admitted.run_dir
    if config.force or not is_finished(run_dir):
        return False
    if is_asked_for_more(config.training, run_dir):
        check_longer(config.checkpoint, run_dir)
        return False
    console = Console()
    console.label(
        "run",
        f"{run_dir} is finished and left as it is; {how_to_go_on_for_longer(config.training, run_dir)} (force=true "
        "removes it and starts again)",
    )
    if config_hash(admitted.frozen) not in {start["config_hash"] for start in read_starts(run_dir)}:
        console.warn(
            "the configuration given here is not the one that this run was made with (its config.yaml); for another "
            "run choose another hydra.run.dir"
        )
    deliver_pending(config.tracking, run_dir, console)
    return True


def guarded(admitted: Job, stop: StopRequest) -> int:
    """Run, and turn every way it can end into an exit code: 0, 1 (it went wrong), 2 (yours to mend), 75 (stopped)."""
    run_dir = admitted.run_dir
    show_libraries_visibly()
    try:
        if finished_before(admitted):
            return 0
        if is_launched(admitted.config.runtime):
            return run_as_many(admitted, stop)
        run(admitted, stop)
    except TowlineError as error:
        report(f"\n{error}")
        return error.exit_code
    except Pruned as reason:
        print(wrapped(visible(f"\nEnded early: {reason}"), columns_of(sys.stdout)))
        return Pruned.exit_code
    except (Interrupted, KeyboardInterrupt) as reason:
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}. {_how_to_go_on(run_dir)}")
        return Interrupted.exit_code
    except OSError as error:
        if error.errno is None and not is_disk_full(error):  # a library's own
            report(traceback.format_exc(), wraps=False)
        report(f"{_what_failed(error)} {_how_to_go_on(run_dir)}")
        return 1
    except Exception as error:
        if place_of() is not None and "by peer" in str(error):  # who started us says which one, and why
            report("\nAnother process of this run has ended, so this one can't go on.")
            return 1
        report(traceback.format_exc(), wraps=False)
        report(f"A fault of the program, or too little memory. {_how_to_go_on(run_dir)}")
        return 1
    return 0


def run_as_many(admitted: Job, stop: StopRequest) -> int:
    """Run in several processes, which get the configuration as it was composed here; gives their exit code.

    Raises:
        TowlineError: where the folder or its checkpoints can't be used, or a process ended in failure.
    """
    from src.checkpoint.locate import find_origin
    from src.tracking.run_folder import hold, note_end

    collect_from_here()
    config, run_dir = admitted.config, admitted.run_dir
    is_first = config.runtime.machine_rank == 0
    with hold(run_dir) if is_first else nullcontext() as lock:
        find_origin(config.checkpoint, admitted.frozen, run_dir, force=config.force)  # refused before anything starts
        run_dir.mkdir(parents=True, exist_ok=True)
        frozen = run_dir / f".frozen-{config.runtime.machine_rank}.json"
        frozen.write_text(json.dumps({"config": admitted.frozen, "trial": admitted.trial}), encoding="utf-8")
        stop.is_deferred = True  # it is passed on
        try:
            command = [sys.executable, "-m", "src.run", FROZEN, str(frozen), str(run_dir)]
            return launch(config.runtime, command, run_dir, stop, [] if lock is None else [lock])
        except (TrainingError, Interrupted, KeyboardInterrupt) as reason:
            if is_first:
                note_end(run_dir, reason)
            raise
        finally:
            frozen.unlink()


def as_frozen(file: str, run_dir: str) -> Job:
    """Take the configuration that the starting process froze."""
    given = json.loads(Path(file).read_text(encoding="utf-8"))
    return Job(parse(given["config"]), given["config"], Path(run_dir), is_held=True, trial=given["trial"])


def _what_failed(error: OSError) -> str:
    """Tell what the operating system refused, or a library, whose own error has no number."""
    if is_disk_full(error):
        return f"\nThe disk is full: {error}."
    if error.errno is None:
        return f"A file could not be used: {error}."
    return f"\nThe operating system refused a file: {error}."


def _how_to_go_on(run_dir: Path) -> str:
    from src.checkpoint.manifest import newest_resumable
    from src.config.places import CHECKPOINTS

    if not run_dir.is_dir():
        return f"{run_dir} is not there any more: it was moved or removed. What was saved is where it was moved to."
    try:
        step = newest_resumable(run_dir / CHECKPOINTS)
    except (OSError, TowlineError) as error:
        return f"What was saved in {run_dir} can't be looked at now: {error}"
    if step is None:
        return f"Nothing was saved yet; what was logged is in {run_dir}"
    here = shell_override("hydra.run.dir", str(run_dir))
    return f"Step {step} is saved: make resume run={shlex.quote(str(run_dir))}, or the same command with {here}"


def run_trial(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    """Be a trial of a sweep: run a frozen configuration; gives the exit code."""
    try:
        with stop_on_signals() as stop:
            follow_parent()
            return guarded(Job(parse(config), config, Path(run_dir), trial=link), stop)
    except (Interrupted, KeyboardInterrupt):  # before there was anything to end
        return Interrupted.exit_code


def by_hydra(request: Request, stop: StopRequest) -> int:
    """Hand a command line that was admitted to Hydra's own main: sweeps and --info.

    Raises:
        TowlineError: where a sweep is refused, before anything of it starts.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf, flag_override

    codes, process = [], os.getpid()

    def job(cfg: DictConfig) -> None:
        """Run a point of a sweep of another sweeper's (hydra/sweeper=…)."""
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        point = Composed({}, run_dir, {})
        sections: Any = OmegaConf.to_container(cfg)
        with flag_override(cfg, ["readonly", "struct"], [False, False]):
            cfg.merge_with(as_variables(sections))  # a launcher composes again where it runs, and pickles what it has
        resolve_sections(OmegaConf.create(sections), point)
        codes.append(guarded(Job(parse(point.sections), point.stored, run_dir), stop))
        if codes[-1] and os.getpid() != process:  # what is counted here is not seen there
            raise TrainingError(f"the run in {run_dir} ended with exit code {codes[-1]}")
        if codes[-1] == Interrupted.exit_code:
            sys.exit(Interrupted.exit_code)  # a stopped run stops the sweep; one that failed does not

    is_sweep = request.line.flags.multirun and not request.line.asks_hydra_only
    asked = own_sweep(request, stop) if is_sweep else None
    if asked is not None:
        setattr(job, asked.ATTRIBUTE, asked)
    sys.argv = [sys.argv[0], *as_variables(request.line.hydra_argv)]
    install(hides_credentials=True)
    shown = io.StringIO()
    try:
        with redirect_stdout(shown) if request.line.asks_hydra_only else nullcontext():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except (Interrupted, KeyboardInterrupt) as reason:  # before the first run, or between two
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}")
        return Interrupted.exit_code
    finally:  # Hydra exits by itself behind what it shows
        show(clean(shown.getvalue()), end="")
    if asked is not None:
        return asked.code
    if failed := [str(number) for number, code in enumerate(codes) if code]:
        report(f"\n{len(failed)} of {len(codes)} runs failed: number {', '.join(failed)} of the sweep")
    return max(codes, default=0)


def own_sweep(request: Request, stop: StopRequest) -> SweepRequest | None:
    """Compose and check every point of a sweep, and get ready for it; None where another sweeper will run it.

    Raises:
        ConfigError: with all problems of all points.
    """
    from src.run import run_trial as by_name  # other processes find it there, not in __main__
    from src.sweep.sweeper import request_sweep

    collect_from_here()  # composing leaves many cycles
    return request_sweep(request.line, stop, by_name)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then run it; one of several processes ends here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with stop_on_signals() as stop:
        if arguments[:1] == [FROZEN]:
            follow_parent()
            if (place := place_of()) is not None and place.is_main:
                copy_output(Path(arguments[2]))
            code = guarded(as_frozen(*arguments[1:]), stop)
        else:
            code = admit_and_run(arguments, stop)
        if place_of() is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # threads of the libraries that connect processes may abort one that takes itself down
    return code


def admit_and_run(arguments: Sequence[str], stop: StopRequest) -> int:
    """Check a command line, then run it; gives the exit code."""
    try:
        request = admit(arguments)
        if request.shown is not None and request.line.flags.cfg:
            show(shown_config(request.shown, request.line), end="")
            return 0
        if request.shown is not None and request.line.flags.help:
            from src.config.help import help_of_run

            return help_of_run(request.shown, request.line)
        return by_hydra(request, stop) if request.run is None else guarded(request.run, stop)
    except TowlineError as error:
        report(error)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        return Interrupted.exit_code


if __name__ == "__main__":
    rest_while_importing()
    sys.exit(main())
