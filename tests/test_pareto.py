"""Ranking by several metrics: the front against brute force, ties against t-tests; noise puts nobody off the front."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from src.figures import write_png
from src.trials import leaderboard
from src.trials.front_figures import figures
from src.trials.pareto import FrontRow, Goals, dominates, front, front_conclusion, layers, rank_by_several
from src.trials.ranking import Result, rank
from src.trials.significance import seeds_to_tell

EXACT, LOSS = "eval/test/exact_match", "eval/test/loss"
GOALS: Goals = {EXACT: "maximize", LOSS: "minimize"}
Values = dict[str, tuple[Sequence[float], ...]]  # of each setting, by metric the values at seeds 1, 2, …


def trials(values: Values) -> list[Result]:
    found: list[Result] = []
    for setting, by_metric in values.items():
        for seed, point in enumerate(zip(*by_metric, strict=True), 1):
            found.append(Result(len(found), setting, setting, "", (seed, None), "FINISHED", point))
    return found


def ranked(values: Values, goals: Goals = GOALS) -> dict[str, FrontRow]:
    return {row.setting: row for row in rank_by_several(trials(values), goals)}


def places(rows: dict[str, FrontRow]) -> dict[str, tuple[int | None, bool, bool]]:
    return {setting: (row.rank, row.is_reference, row.is_tied) for setting, row in rows.items()}


FAR: Values = {
    "precise": ([0.9, 0.91, 0.92], [0.50, 0.52, 0.51]),
    "sure": ([0.5, 0.51, 0.52], [0.10, 0.12, 0.11]),
    "near": ([0.5, 0.49, 0.51], [0.11, 0.13, 0.11]),
    "bad": ([0.2, 0.21, 0.19], [0.91, 0.93, 0.90]),
}


def test_lost_replicates_put_nobody_on_the_front() -> None:
    level = [0.5, 0.5, 0.5]
    values: Values = {"whole": (level, [1.0, 1.0, 9.0]), "lost": (level[:2], [2.0, 2.1])}
    rows = ranked(values)
    assert {setting: row.is_reference for setting, row in rows.items()} == {"whole": True, "lost": False}
    paired = stats.ttest_rel([1.0, 1.0], [2.0, 2.1]).pvalue
    assert rows["lost"].p_value == pytest.approx(2 * paired)  # by two metrics
    alone = {
        row.setting: row
        for row in rank([replace(one, values=one.values[1:]) for one in trials(values)], direction="minimize")
    }
    assert alone["whole"].is_reference
    assert alone["lost"].p_value == pytest.approx(paired)

    cut = [*trials({"pruned": (level[:2], [0.1, 0.2]), "whole": (level, [1.0, 1.0, 1.1])})]
    cut.append(Result(9, "pruned", "pruned", "", (3, None), "PRUNED", ()))
    assert [row.setting for row in rank_by_several(cut, GOALS) if row.is_reference] == ["whole"]


def test_rows_that_lack_each_others_replicates_come_to_an_end() -> None:
    """On what each two share, each is better than the next: round in a circle."""
    lacking = {
        "a": {1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0},
        "b": {1: 2.0, 2: 2.0, 5: 1.0, 6: 1.0},
        "c": {3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0},
    }
    found = [
        Result(number, setting, setting, "", (seed, None), "FINISHED", (0.5, value))
        for setting, values in lacking.items()
        for number, (seed, value) in enumerate(values.items(), 10 * ord(setting))
    ]
    rows = rank_by_several(found, GOALS)
    assert any(row.is_reference for row in rows)
    assert all(row.rank for row in rows)


def test_the_front_is_first_and_what_is_dominated_for_sure_is_not() -> None:
    rows = ranked(FAR)
    assert places(rows) == {
        "precise": (1, True, False),
        "sure": (1, True, False),
        "near": (1, False, True),
        "bad": (4, False, False),
    }
    assert [one.mean for one in rows["sure"].objectives] == pytest.approx([0.51, 0.11])
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert [rows["sure"].objectives[1].low, rows["sure"].objectives[1].high] == pytest.approx(
        [0.11 - half, 0.11 + half]
    )


def test_p_is_of_the_surest_test_times_the_tests_and_the_rows() -> None:
    rows = ranked(FAR)
    against = [("precise", 0), ("precise", 1), ("sure", 0), ("sure", 1)]
    bad = min(stats.ttest_rel(FAR["bad"][place], FAR[one][place]).pvalue for one, place in against)
    assert rows["bad"].p_value == pytest.approx(2 * (4 * bad), rel=1e-9)  # Holm of two rows, and four tests
    near = min(stats.ttest_rel(FAR["near"][place], FAR["sure"][place]).pvalue for place in (0, 1))
    assert rows["near"].p_value == pytest.approx(2 * near, rel=1e-9)  # the last of Holm's, and two tests
    (row,) = [row for row in ranked({"a": ([3, 2], [0, 0]), "b": ([1, 1], [0, 0])}).values() if row.p_value]
    cauchy = 1 - 2 / math.pi * math.atan(3)  # gaps of 2 and 1: t = 3, and Student's t with one degree of freedom
    assert (row.setting, row.p_value) == ("b", pytest.approx(2 * cauchy))


def test_a_single_seed_never_loses_and_never_takes_a_place_from_others() -> None:
    alone = ranked({"a": ([0.9], [0.1]), "b": ([0.1], [0.9])})
    assert places(alone) == {"a": (1, True, False), "b": (1, False, True)}
    rows = ranked({"lucky": ([0.99], [0.01]), **FAR, "unlucky": ([0.0], [9.0])})
    assert places(rows) == {
        **places(ranked(FAR)),
        "lucky": (1, False, True),
        "unlucky": (1, False, True),
        "bad": (6, False, False),
    }
    assert rows["lucky"].more_seeds == rows["unlucky"].more_seeds == 2
    assert rows["bad"].p_value == ranked(FAR)["bad"].p_value


def test_equal_settings_are_on_the_front_together() -> None:
    rows = ranked({"a": ([1, 2], [3, 4]), "b": ([1, 2], [3, 4]), "c": ([0, 0.5], [3, 4])})
    assert [row.is_reference for row in rows.values()] == [True, True, False]


def random_values(seed: int, num_metrics: int) -> tuple[Values, Goals]:
    """Return settings of few values, so that many are equal, with one to three seeds."""
    draw = np.random.default_rng(seed)
    values = {
        f"s{n}": tuple(draw.integers(0, 4, size=(num_metrics, int(draw.integers(1, 4)))).astype(float).tolist())
        for n in range(int(draw.integers(2, 9)))
    }
    return values, {f"m{n}": ("minimize", "maximize")[int(draw.integers(2))] for n in range(num_metrics)}


@pytest.mark.parametrize("num_metrics", [1, 2, 3])
def test_fronts_are_those_of_their_definition(num_metrics: int) -> None:
    for seed in range(150):
        points = {
            n: tuple(map(float, point))
            for n, point in enumerate(np.random.default_rng(seed).integers(0, 5, size=(12, num_metrics)))
        }
        left, expected = dict(points), []
        while left:
            best = [a for a in left if not any(dominates(left[b], left[a]) for b in left)]
            expected.append(best)
            left = {key: point for key, point in left.items() if key not in best}
        assert front(points) == expected[0]
        assert [sorted(layer) for layer in layers(points)] == expected


@pytest.mark.parametrize("num_metrics", [2, 3])
def test_ranks_depend_on_no_order_and_follow_from_pairs(num_metrics: int) -> None:
    for seed in range(40):
        values, goals = random_values(seed, num_metrics)
        rows = ranked(values, goals)
        for order in itertools.permutations(range(num_metrics)):
            turned = {name: tuple(values[name][place] for place in order) for name in reversed(values)}
            again = ranked(turned, {list(goals)[place]: list(goals.values())[place] for place in order})
            assert places(again) == places(rows)
            assert [again[name].p_value for name in values] == [rows[name].p_value for name in values]
        signs = [1 if one == "minimize" else -1 for one in goals.values()]
        points = {name: tuple(np.mean(of, axis=1) * signs) for name, of in values.items()}
        trusted = [name for name in values if len(values[name][0]) > 1] or list(values)

        def is_better(a: str, b: str, of: Values = values, signs: Sequence[int] = signs) -> bool:
            """Compare on the seeds of both, where one has more than the other."""
            both = min(len(of[a][0]), len(of[b][0]))
            gaps = [s * np.mean(np.subtract(x[:both], y[:both])) for s, x, y in zip(signs, of[a], of[b], strict=True)]
            return both > 1 and len(of[a][0]) != len(of[b][0]) and max(gaps) <= 0 > min(gaps)

        while True:
            on_front = {a for a in trusted if not any(dominates(points[b], points[a]) for b in trusted)}
            out = [a for a in on_front if any(is_better(b, a) for b in trusted)]
            if not out:
                break
            trusted.remove(min(out, key=lambda name: (len(values[name][0]), name)))
        assert {name for name, row in rows.items() if row.is_reference} == on_front
        for name, row in rows.items():
            is_beaten = any(dominates(points[one], points[name]) or is_better(one, name) for one in on_front)
            assert row.rank == 1 or (is_beaten and row.p_value is not None and row.p_value < 0.05)
            assert row.n > 1 or row.rank == 1


def test_noise_puts_a_setting_off_the_front_as_seldom_as_promised() -> None:
    draws = np.random.default_rng(0).normal(size=(700, 2, 2, 3)).tolist()
    lost = sum(any(row.rank != 1 for row in ranked({"a": a, "b": b}).values()) for a, b in draws)
    assert lost / len(draws) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(draws))


def test_the_sentence_says_who_is_on_the_front_and_what_seeds_would_tell() -> None:
    clear = {name: FAR[name] for name in ("precise", "sure", "bad")}
    said = front_conclusion(list(ranked(clear).values()), GOALS, "mine")
    assert said == f"precise and sure are on the Pareto front of {EXACT} and {LOSS}."
    alone = front_conclusion(list(ranked({"a": ([0.9], [0.1]), "b": ([0.1], [0.9])}).values()), GOALS, "mine")
    assert alone == (
        f"a is on the Pareto front of {EXACT} and {LOSS}, and b can't be told from it; "
        "one seed allows no test: the same command with seed=1,2,3 sweep.name=mine."
    )
    tie = ranked({"a": ([0.30, 0.31, 0.32], [1.0, 1.1, 1.2]), "b": ([0.29, 0.29, 0.325], [1.0, 1.1, 1.2])})
    gaps = [0.01, 0.02, -0.005]
    needed = seeds_to_tell(float(np.mean(gaps)), float(np.std(gaps, ddof=1)), level=0.05 / 2)
    assert tie["b"].more_seeds == (needed or 0) - 3 > 0
    assert f"{tie['b'].more_seeds} more seeds would tell b from the front" in front_conclusion(
        list(tie.values()), GOALS
    )
    assert front_conclusion([], GOALS).startswith(f"No trial finished with a value of {EXACT} and {LOSS}")


def test_files_and_table_have_all_of_each_metric(tmp_path: Path) -> None:
    failed = Result(99, "failed", "failed", "", (1, None), "FAILED", ())
    results = [*trials(FAR), failed]
    rows = rank_by_several(results, GOALS)
    leaderboard.write(rows, tmp_path, GOALS, "Said.")
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    assert (content["metric"], content["direction"]) == ([EXACT, LOSS], ["maximize", "minimize"])
    first, last = content["rows"][0], content["rows"][-1]
    assert [one["metric"] for one in first["objectives"]] == [EXACT, LOSS]
    assert first["objectives"][1]["values"][2] == {"seed": 3, "fold": None, "value": 0.51}
    assert "mean" not in first
    assert [one["mean"] for one in last["objectives"]] == [None, None]
    with open(tmp_path / "leaderboard.csv", encoding="utf-8", newline="") as file:
        lines = {line["setting"]: line for line in csv.DictReader(file)}
    assert (lines["sure"]["on_front"], lines["near"]["on_front"], lines["near"]["tied"]) == ("true", "false", "true")
    assert float(lines["sure"][LOSS]) == pytest.approx(0.11)
    assert (lines["sure"][f"{EXACT} values"], lines["failed"][LOSS]) == ("0.5 0.51 0.52", "")
    assert [one.heading for one in leaderboard.columns_of(rows)] == [
        "rank", "setting", "exact_match", "loss", "n", "p", "more",
    ]  # fmt: skip
    same_names = rank_by_several(trials(FAR), {"eval/a/loss": "maximize", "eval/b/loss": "minimize"})
    assert [one.heading for one in leaderboard.columns_of(same_names)][2:4] == ["eval/a/loss", "eval/b/loss"]
    measured = [replace(one, measures={"eval/b/loss": 1.0}) for one in trials(FAR)]
    beside = rank_by_several(measured, {"eval/a/loss": "maximize", "eval/b/chrf": "minimize"})
    headings = [one.heading for one in leaderboard.columns_of(beside)]
    assert (headings[2:4], headings[-1]) == (["eval/a/loss", "chrf"], "eval/b/loss")
    text = (tmp_path / "leaderboard.md").read_text()
    assert f"# {EXACT}, maximized; {LOSS}, minimized" in text
    assert "0.510 ± 0.025 | 0.110 ± 0.025 | 3" in text


def test_the_figure_joins_the_front_by_what_it_dominates(tmp_path: Path) -> None:
    rows = rank_by_several(trials(FAR), GOALS)
    drawn = {figure.key: figure for figure in figures(rows, GOALS, [(0.9, 0.5), (0.5, 0.1)])}
    assert list(drawn) == ["pareto", "settings_1", "settings_2", "history_1", "history_2"]
    series = {one.name: one for one in drawn["pareto"].series}
    steps = series["the front"]
    assert steps.x == pytest.approx([0.91, 0.51, 0.51])
    assert steps.y == pytest.approx([0.51, 0.51, 0.11])
    assert [*series["sure"].x, *series["sure"].y] == pytest.approx([0.51, 0.11])
    spans = series["sure, lowest to highest"]
    assert spans.x == pytest.approx([0.5, 0.52, 0.51, 0.51])
    assert spans.y == pytest.approx([0.11, 0.11, 0.10, 0.12])
    write_png(drawn["pareto"], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    three: Goals = {**GOALS, "tokens_seen": "minimize"}
    more = rank_by_several(trials({name: (*of, [1.0, 1.0, 1.0]) for name, of in FAR.items()}), three)
    pairs = [figure for figure in figures(more, three, []) if figure.key.startswith("pareto")]
    assert [(one.x_label.split(",")[0], one.y_label.split(",")[0]) for one in pairs] == [
        (EXACT, LOSS), (EXACT, "tokens_seen"), (LOSS, "tokens_seen"),
    ]  # fmt: skip
