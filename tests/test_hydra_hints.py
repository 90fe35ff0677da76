"""Keys and options of Hydra's own section that there are none of: told with what was meant, which is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.config.gate import admit
from src.sweep.plan import plan_sweep
from tests.test_gate import refusal
from tests.test_hints import suggestions

SWEEP = ("-m", "seed=1,2")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["hydra.runn.dir=outputs/x"], "hydra has no runn; did you mean hydra.run.dir?"),
        (["hydra.run.dirr=outputs/x"], "hydra.run has no dirr; did you mean hydra.run.dir?"),
        (["hydra.job.nam=x"], "hydra.job has no nam; did you mean hydra.job.name?"),
        (["hydra.verbos=true"], "hydra has no verbos; it has "),
        (["hydra.serchpath=[]"], "hydra has no serchpath; did you mean hydra.searchpath?"),
        (["hydra/lancher=basic"], "no group of Hydra's; did you mean hydra/launcher?"),
        ([*SWEEP, "hydra/swepeer=basic"], "no group of Hydra's; did you mean hydra/sweeper?"),
        (["hydra/x=none"], "hydra/x   no group of Hydra's"),
        (["hydra.launcher.foo=1"], "hydra/launcher=basic has no foo; it has no keys; trials run several at a time by"),
        ([*SWEEP, "hydra.launcher.n_jobs=2"], "basic has no n_jobs; did you mean sweep.n_jobs=2?"),
        ([*SWEEP, "hydra.sweeper.n_trials=3"], "towline has no n_trials; did you mean sweep.n_trials=3?"),
        ([*SWEEP, "hydra/launcher=joblib"], "no such option; one of basic, submitit_local, submitit_slurm; trials run"),
        ([*SWEEP, "hydra/launcher=basc"], "no such option; one of basic, submitit_local, submitit_slurm; did you mean"),
        ([*SWEEP, "hydra/sweeper=optuna"], "one of basic, towline; settings are searched by sweep=tpe or sweep=asha"),
    ],
)
def test_what_hydra_lacks(overrides: list[str], told: str) -> None:
    message = refusal("tracking=none", *overrides)
    assert told in message
    assert message.count("\n") == 2  # one problem
    for (one,) in suggestions(message):
        value = overrides[-1].partition("=")[2]
        if "/" in overrides[-1].partition("=")[0]:
            one = f"{one}={value}" if one.startswith("hydra/") else f"{overrides[-1].partition('=')[0]}={one}"
        request = admit(["tracking=none", *overrides[:-1], one if "=" in one else f"{one}={value}"])
        assert plan_sweep(request.line).trials if request.line.flags.multirun else request.run


def test_options_of_the_users_own_count(tmp_path: Path) -> None:
    assert "no such option; one of default\n" in refusal("hydra/help=mine")
    file = tmp_path / "hydra" / "help" / "ours.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("app_name: x\n")
    message = refusal("--config-dir", str(tmp_path), "hydra/help=our")
    assert "no such option; one of default, ours; did you mean ours?" in message


def test_other_problems_are_told_too() -> None:
    message = refusal("hydra.job.nam=x", "hydra/launcher=joblib", "seed=-1")
    for words in ("3 problems", "did you mean hydra.job.name?", "submitit_local", "seed = -1"):
        assert words in message
