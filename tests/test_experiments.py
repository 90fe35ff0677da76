"""The arms of the sweeps in conf/: each differs from the first one in what it is named for, and in nothing else."""

from __future__ import annotations

from typing import Any

from src.config.command_line import read_command_line
from src.config.identity import new_identity
from src.config.keys import all_keys
from src.sweep.plan import plan_sweep
from src.util import value_at

NO_TOKENS = {
    "tokens.additional_special_tokens": [],
    "tokens.thought_open": None,
    "tokens.thought_close": None,
    "tokens.init.descriptions": {},
}


def arms(*arguments: str) -> dict[str, dict[str, Any]]:
    """Return the keys in which each arm of a sweep differs from the first one, by its name; check its seeds."""
    new_identity()
    trials = plan_sweep(read_command_line(["-m", "tracking=none", *arguments])).trials
    keys = [key for key in all_keys() if key not in ("name", "seed")]
    first = {key: value_at(trials[0].config, key) for key in keys}
    found: dict[str, dict[str, Any]] = {}
    seeds: dict[str, list[int]] = {}
    for trial in trials:
        arm = trial.setting_label.removeprefix("experiment=")
        different = {key: value for key in keys if (value := value_at(trial.config, key)) != first[key]}
        assert found.setdefault(arm, different) == different
        seeds.setdefault(arm, []).append(trial.seed)
    assert set(map(tuple, seeds.values())) == {(1, 2, 3)}
    return found


def test_what_the_arms_on_a_pretrained_model_differ_in() -> None:
    assert arms("sweep=smollm2_thoughts") == {
        "smollm2_thoughts": {},
        "smollm2_without_thoughts": NO_TOKENS,
        "smollm2_without_thoughts_3x": NO_TOKENS | {"data.limit": 3 * 200},
        "smollm2_thoughts_faded": {"data.thought_schedule": {"tokens_per_epoch": 3}},
        "smollm2_thoughts_mean": {"tokens.init.method": "mean"},
        "smollm2_thoughts_random": {"tokens.init.method": "random"},
    }


def test_what_the_arms_of_the_default_runs_ablation_differ_in() -> None:
    assert arms("sweep=thoughts_faded") == {
        "null": {},
        "without_thoughts": NO_TOKENS,
        "thoughts_faded": {
            "data.thought_schedule": {"tokens_per_epoch": 3},
            "checkpoint.metric_for_best_model": "eval/validation/exact_match",
        },
    }
