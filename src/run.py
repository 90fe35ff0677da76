"""Train one configuration: `python -m src.run GROUP=OPTION SECTION.KEY=VALUE …`; with -m one run a combination.

`run` is the table of contents of an experiment. Nothing heavy is imported before the configuration has been found good.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.config.compose import CONF, PROJECT_ROOT
from src.config.gate import Admitted, Request, admit, parse
from src.errors import Interrupted, TowlineError
from src.runtime.signals import stop_on_signals

if "OMP_WAIT_POLICY" not in os.environ:
    # threads that wait spin for a while; beside other work on the same cores the default is up to seven times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # docs/decisions/0007
for switch in ("HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(switch, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of our own, each with its chunk, are faster


def run(admitted: Admitted) -> dict[str, float]:
    """Run one admitted configuration to its end and give its summary.

    Raises:
        TowlineError: what the user can mend, or that the run went wrong.
        Interrupted: where a signal asked it to stop; what was logged is kept.
    """
    from src.tracking.console import Console
    from src.tracking.tracker import open_tracking

    config, run_dir = admitted.config, admitted.run_dir
    console = Console()
    console.label("run", f"{config.name} → {run_dir}")
    with (
        stop_on_signals() as stop,
        open_tracking(config.tracking, run_dir, admitted.frozen, console, force=config.force) as tracking,
    ):
        # imported here: torch takes seconds, and a folder that is in use or a typo should be told at once
        from src.checkpoint.best import BestWeights
        from src.data.dataset import build_data, file_hashes
        from src.evaluation.evaluate import open_evaluation
        from src.evaluation.samples import sample
        from src.model.adapters import add_adapter
        from src.model.build import build_model, set_generation
        from src.model.card import model_card
        from src.model.export import export
        from src.overview import overview
        from src.runtime.session import start_runtime
        from src.tokens import check_new_rows, embedding_matrices, grow_embeddings, load_tokenizer
        from src.tracking.provenance import provenance
        from src.training.loop import train
        from src.training.state import prepare

        with start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime:
            made = provenance(admitted.frozen, file_hashes(config.data), runtime.description, PROJECT_ROOT)
            tracking.record("provenance.json", made)
            tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
            data = build_data(config, tokenizer, console.working)
            tracking.record("data_report.json", data.report())
            model = build_model(config, runtime.device)
            set_generation(model, config.generation, tokenizer, data.stop_ids, data.encoder.target_prefix)
            started = grow_embeddings(model, tokenizer, new_tokens, config.tokens, config.seed)
            matrices = [matrix.module for matrix in embedding_matrices(model)]
            new_ids = list(started.ids.values())
            adapter = add_adapter(model, config.adapter, config.model, new_ids, matrices, is_merged=config.export.merge)
            state = prepare(model, data.train, config, runtime, new_tokens.ids)
            check_new_rows(state.model, started)
            evaluation = open_evaluation(config, state.scored, state.model, data, runtime)
            best = BestWeights(config.checkpoint, run_dir)
            samples_of = data.for_samples()
            tracking.warn(data.reports["train"].unlearned(config.thought_tags))
            tracking.describe(overview(config, state, tokenizer, new_tokens, started, data, runtime))
            untrained = sample(evaluation, samples_of, config.evaluation.sample_prompts, 0)

            stop.is_deferred = True  # from here on there is something to end properly
            for step in train(state, data.train, config, runtime, evaluation.pad_token_id):
                tracking.progress(step, state.num_steps, config.training.logging_steps)
                with tracking.line(step, due=step.is_due(config.training.logging_steps) or step.is_last) as metrics:
                    if step.is_due(config.evaluation.eval_steps) or step.is_last:
                        metrics |= evaluation.evaluate(data.validation.values(), new_tokens.ids)
                        metrics |= state.new_rows.telemetry()
                        best.consider(step.number, metrics, state.model)
                    if step.is_last:
                        best.restore(state.model)  # from here on it is the model that is exported
                        metrics |= evaluation.evaluate(data.test.values())
                if step.is_due(config.evaluation.sample_steps) or step.is_last:
                    samples = sample(evaluation, samples_of, config.evaluation.sample_prompts, step.number, untrained)
                    tracking.samples(samples)

            if config.data.streaming:
                tracking.record("data_report.json", data.report())  # what was read is known only now
            card = model_card(admitted.frozen, data.report(), tracking.latest, made, new_tokens.ids)
            alone = model_card(
                admitted.frozen | {"export": {"merge": False}}, data.report(), tracking.latest, made, new_tokens.ids
            )
            totals = state.totals()  # merging takes the adapter out of the model
            export(state.model, adapter, tokenizer, run_dir / "model", config, card, alone)
            return tracking.finish(totals | {"peak_memory_bytes": runtime.peak_memory_bytes()})


def finished_before(admitted: Admitted) -> bool:
    """Leave a folder whose run is finished as it is; what MLflow has not got of it is delivered."""
    from src.tracking.console import Console
    from src.tracking.journal import is_finished, last_config_hash
    from src.tracking.provenance import config_hash
    from src.tracking.tracker import deliver_pending

    if admitted.config.force or not is_finished(admitted.run_dir):
        return False
    console = Console()
    console.label("run", f"{admitted.run_dir} is finished and left as it is (force=true starts it again)")
    if last_config_hash(admitted.run_dir) != config_hash(admitted.frozen):
        console.warn("the configuration given here is not the one that this run was made with (its config.yaml)")
    deliver_pending(admitted.config.tracking, admitted.run_dir, console)
    return True


def guarded(admitted: Admitted) -> int:
    """Run, and turn every way it can end into an exit code: 0, 1 (it went wrong), 2 (yours to mend), 75 (stopped)."""
    try:
        if not finished_before(admitted):
            run(admitted)
    except TowlineError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"\nStopped by {str(stop) or 'Ctrl-C'}. What was logged is in {admitted.run_dir}", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"\nThe disk is full: {error}. What was logged is in {admitted.run_dir}", file=sys.stderr)
        return 1
    return 0


def sweep(request: Request) -> int:
    """Hand a command line that was admitted to Hydra's own main: sweeps, --cfg, --help."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    codes = []

    def job(cfg: DictConfig) -> None:
        sections: Any = OmegaConf.to_container(cfg, resolve=True)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        codes.append(guarded(Admitted(parse(sections), sections, run_dir)))
        if codes[-1] == Interrupted.exit_code:
            sys.exit(Interrupted.exit_code)  # a stopped run stops the sweep; one that failed does not

    sys.argv = [sys.argv[0], *request.line.hydra_argv]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    if failed := [str(number) for number, code in enumerate(codes) if code]:
        print(f"\n{len(failed)} of {len(codes)} runs failed: number {', '.join(failed)} of the sweep", file=sys.stderr)
    return max(codes, default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then run it."""
    try:
        request = admit(sys.argv[1:] if argv is None else argv)
    except TowlineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    return sweep(request) if request.run is None else guarded(request.run)


if __name__ == "__main__":
    sys.exit(main())
