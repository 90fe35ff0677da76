"""Ranking: against numbers worked out by hand and scipy's own tests; noise is no win; the files can be read back."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from src.figures import write_png
from src.trials import leaderboard
from src.trials.ranking import MEMORY, SECONDS, Result, Row, conclusion, number, rank
from src.trials.significance import SIGNIFICANCE, holm, seeds_to_tell, variance_factor

LOSS = "eval/validation/loss"


def trials(values: dict[str, list[Any]], *, folds: bool = False, group: str = "", first: int = 0) -> list[Result]:
    """Give the trials of each setting at seeds (or folds) 1, 2, …: a value, a state instead of one, or "" for none."""
    found: list[Result] = []
    for setting, given in values.items():
        for place, value in enumerate(given, 1):
            if value != "":
                state, numbers = (value, ()) if isinstance(value, str) else ("FINISHED", (value,))
                replicate = (1, place) if folds else (place, None)
                found.append(Result(first + len(found), setting, setting, group, replicate, state, numbers))
    return found


def ranked(values: dict[str, list[Any]], **options: Any) -> list[Row]:
    return rank(trials(values, folds="num_folds" in options), **({"direction": "minimize"} | options))


def cells(rows: list[Row], heading: str) -> list[str]:
    (column,) = (one for one in leaderboard.columns_of(rows) if one.heading == heading)
    return [column.cell(row) for row in rows]


def places(rows: list[Row]) -> list[tuple[str, int | None, bool]]:
    return [(row.setting, row.rank, row.is_tied) for row in rows]


def test_interval_is_students_t() -> None:
    (row,) = ranked({"a": [1.0, 2.0, 3.0]})
    half = 4.302653 / math.sqrt(3)
    assert (row.mean, row.low, row.high) == pytest.approx((2, 2 - half, 2 + half))
    assert (row.rank, row.is_tied, row.n, row.best_trial) == (1, False, 3, 0)


def test_comparison_is_paired_where_seeds_match() -> None:
    best, other = [0.30, 0.50, 0.41, 0.36], [0.34, 0.55, 0.44, 0.42]
    first, second = ranked({"b": other, "a": best})
    expected = stats.ttest_rel(other, best)
    assert places([first, second]) == [("a", 1, False), ("b", 2, False)]
    assert (second.p_value, second.difference, second.num_pairs) == pytest.approx((expected.pvalue, 0.045, 4))
    span = expected.confidence_interval()
    assert (second.difference_low, second.difference_high) == pytest.approx((span.low, span.high))
    assert stats.ttest_ind(other, best).pvalue > 0.3  # unpaired, the seeds' noise would hide it


def test_comparison_is_welchs_where_they_do_not() -> None:
    best, other = [1.0, 1.1, 1.3], [2.0, 2.6, 2.1, 2.2]
    rows = ranked({"a": best, "b": ["", "", "", *other]})
    row = rows[1]
    expected = stats.ttest_ind(other, best, equal_var=False)
    span = expected.confidence_interval()
    assert (row.p_value, row.difference_low, row.difference_high) == pytest.approx(
        (expected.pvalue, span.low, span.high)
    )
    assert row.num_pairs == 0
    assert "unpaired" in cells(rows, "p")[1]


def test_p_values_are_corrected_for_how_many_there_are() -> None:
    assert holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert holm([None, 0.04, None, 0.03]) == [None, 0.06, None, 0.06]
    best, b, c = [1.0, 2.0, 3.0], [1.4, 2.5, 3.3], [1.7, 2.5, 3.6]
    rows = {row.setting: row for row in ranked({"a": best, "b": b, "c": c})}
    smaller, larger = sorted(float(stats.ttest_rel(other, best).pvalue) for other in (b, c))
    assert sorted(row.p_value or 0 for row in rows.values())[1:] == pytest.approx(
        sorted([2 * smaller, max(2 * smaller, larger)])
    )


def test_folds_share_their_training_rows() -> None:
    keys = [(1, fold) for fold in range(5)]
    assert variance_factor(keys, 5) == pytest.approx(1 / 5 + 1 / 4)
    assert variance_factor(keys, None) == pytest.approx(1 / 5)
    assert variance_factor([(seed, 0) for seed in range(5)], 5) == pytest.approx(1 / 5)  # one fold, five seeds
    plain = ranked({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.5, 2.4, 3.8, 4.5, 5.6]})[1]
    folds = ranked({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.5, 2.4, 3.8, 4.5, 5.6]}, num_folds=5)[1]
    wider = math.sqrt((1 / 5 + 1 / 4) / (1 / 5))
    for low, high in (("low", "high"), ("difference_low", "difference_high")):
        assert getattr(folds, high) - getattr(folds, low) == pytest.approx(
            wider * (getattr(plain, high) - getattr(plain, low))
        )
    differences = [0.5, 0.4, 0.8, 0.5, 0.6]
    t = np.mean(differences) / (np.std(differences, ddof=1) * math.sqrt(1 / 5 + 1 / 4))
    assert folds.p_value == pytest.approx(2 * stats.t.sf(t, 4))
    assert "5 folds" in conclusion(ranked({"a": [1.0] * 5}, num_folds=5), LOSS)


def test_one_seed_is_never_a_win() -> None:
    rows = ranked({"a": [0.3], "b": [0.9]})
    assert places(rows) == [("a", 1, True), ("b", 1, True)]
    assert all(row.low is None and row.p_value is None for row in rows)
    assert cells(rows, "more") == ["+2", "+2"]
    assert conclusion(rows, LOSS, "mine") == (
        f"a and b are tied in {LOSS}; one seed allows no test: the same command with seed=1,2,3 sweep.name=mine."
    )
    assert "the best of them" in conclusion(ranked({name: [1.0] for name in "abcd"}), LOSS, "mine")
    (alone,) = ranked({"a": [0.3]})
    assert conclusion([alone], LOSS).endswith("run it as a grid with seed=1,2,3.")


def test_a_lucky_seed_neither_wins_nor_hides_who_does() -> None:
    rows = ranked({"lucky": [0.1], "a": [0.30, 0.32, 0.31], "b": [0.50, 0.53, 0.51]})
    assert places(rows) == [("lucky", 1, True), ("a", 1, True), ("b", 3, False)]
    text = conclusion(rows, LOSS, "mine")
    assert text.startswith("lucky and a are tied")
    assert "2 more seeds" in text
    assert "seed=1,2,3 " in text  # those that the others have


@pytest.mark.parametrize(
    ("a", "b", "is_tied", "p", "more"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, "1", "> 30"),
        ([1.0, 2.0, 3.0], [1.5, 1.5, 3.0], True, "1", "> 30"),  # the means are equal, the seeds are not
        ([0.1, 0.2, 0.4], [0.2, 0.3, 0.5], False, "< 0.001", "–"),  # one gap three times, but for how floats round
        ([0.1, 0.2], [0.2, 0.3], True, "–", "+1"),
    ],
)
def test_differences_that_do_not_vary(a: list[float], b: list[float], is_tied: bool, p: str, more: str) -> None:
    rows = ranked({"a": a, "b": b})
    assert (rows[1].is_tied, cells(rows, "p")[1], cells(rows, "more")[1]) == (is_tied, p, more)


def test_means_over_other_seeds_are_compared_on_those_that_both_have() -> None:
    easy, hard = [0.10, 0.12], [0.50, 0.53]
    rows = ranked({"a": [*easy, "FAILED", "FAILED"], "b": [0.08, 0.10, *hard]})
    assert [row.setting for row in rows] == ["b", "a"]  # though the mean of a is lower
    assert (rows[1].difference, rows[1].num_pairs, rows[1].failed) == (pytest.approx(0.02), 2, 2)
    assert "2 pairs" in cells(rows, "p")[1]
    assert cells(rows, "n") == ["4", "2 (2 failed)"]


def test_what_pruning_left_over_wins_nothing() -> None:
    rows = ranked({"a": [0.10, 0.11, 0.12, "PRUNED"], "b": [0.3, 0.34, 0.33, 0.9], "c": [3.0, 3.1, 3.2, 3.3]})
    assert places(rows) == [("a", 1, True), ("b", 1, True), ("c", 3, False)]
    text = conclusion(rows, LOSS, "mine")
    assert "equal terms" in text
    assert "1 pruned" in text


def test_settings_without_a_value_come_last() -> None:
    given: dict[str, list[Any]] = {
        "f": ["FAILED"],
        "p": ["PRUNED"],
        "w": ["WAITING", "RUNNING"],
        "nan": [math.nan, math.inf],
        "a": [1.0],
    }
    rows = ranked(given)
    assert [(row.setting, row.rank, row.mean) for row in rows][1:] == [(s, None, None) for s in ("p", "w", "f", "nan")]
    assert cells(rows, "n")[1:] == ["0 (1 pruned)", "0 (2 unfinished)", "0 (1 failed)", "0 (2 failed)"]
    assert (rows[2].unfinished, rows[4].failed) == (2, 2)
    assert conclusion(ranked({"f": ["FAILED"]}), LOSS).startswith("No trial finished")
    assert conclusion([], LOSS).startswith("No trial finished")


def test_a_trial_done_again_counts_once() -> None:
    results = trials({"a": [1.0]}) + trials({"a": [1.0]}, first=1) + trials({"a": ["", "FAILED"]}, first=2)
    again = trials({"a": ["", 3.0]}, first=3)
    (row,) = rank(results + again, direction="maximize")
    assert (row.n, row.mean, row.failed, row.trials, row.best_trial) == (2, 2, 0, (0, 1, 2, 3), 3)


def test_maximize_turns_it_round() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61, 0.70, 0.82], "c": [0.1, 0.2, 0.3]}
    up = ranked(values, direction="maximize")
    down = ranked({name: [-value for value in given] for name, given in values.items()})
    assert places(up) == places(down) == [("b", 1, False), ("a", 2, False), ("c", 3, False)]
    assert [row.difference for row in up[1:]] == pytest.approx([-(row.difference or 0) for row in down[1:]])
    assert conclusion(up, "exact_match").startswith("b is first in exact_match (0.7")


def test_noise_wins_as_seldom_as_promised() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 2, 3)).tolist()
    wins = sum(not ranked({"a": a, "b": b})[0].is_tied for a, b in draws)
    assert wins / len(draws) < 0.065  # 5 %, and three standard errors
    assert wins / len(draws) > 0.035


def test_conclusion_says_who_is_first_or_what_to_run() -> None:
    win = ranked({"tokens=tow": [0.30, 0.31, 0.32], "tokens=none": [0.5, 0.52, 0.51], "c": [0.7, 0.72, 0.71]})
    assert conclusion(win, LOSS, "mine") == f"tokens=tow is first in {LOSS} (0.310 ± 0.025, 3 seeds)."
    tie = ranked({"tokens=tow": [0.30, 0.35, 0.32], "tokens=none": [0.31, 0.37, 0.32]})
    more = (seeds_to_tell(0.01, 0.01) or 0) - 3
    assert cells(tie, "more") == ["–", f"+{more}"]
    assert conclusion(tie, LOSS, "my sweep") == (
        f"tokens=tow and tokens=none are tied in {LOSS}; {more} more seeds would tell them apart: "
        "the same command with seed=1,2,3,4,5,6,7,8,9,10 sweep.name='my sweep'."
    )
    noise = ranked({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.1, 1.0], "c": [3.0, 1.0, 2.2]})
    assert "too little to matter" in conclusion(noise, LOSS, "mine")


def test_costs_and_other_metrics_stand_beside_the_score() -> None:
    of_each = [{SECONDS: 60.0 * n, MEMORY: 2.0**30 * n, f"eval/test/{n}": 1.0, "eval/test/rougeL": n} for n in (1, 2)]
    results = [Result(n, "a", "a", "", (n, None), "FINISHED", (1.0 + n,), of_each[n - 1]) for n in (1, 2)]
    rows = rank(results, direction="minimize")
    assert [column.heading for column in leaderboard.columns_of(rows)][4:] == ["time", "memory", "rougeL"]
    assert [cells(rows, heading) for heading in ("time", "memory", "rougeL")] == [["1:30"], ["2.0 GiB"], ["1.5"]]


@pytest.mark.parametrize(("difference", "seeds"), [(2.0, 5), (1.0, 10), (0.8, 15), (0.6, 24), (0.5, None), (0.0, None)])
def test_seeds_to_tell_are_those_of_the_tables(difference: float, seeds: int | None) -> None:
    assert seeds_to_tell(difference, 1.0) == seeds  # of Cohen and G*Power, a paired test at 0.05 with power 0.8


@pytest.mark.parametrize(("difference", "level"), [(1.2, 0.05), (-0.9, 0.05), (1.5, 0.01)])
def test_seeds_to_tell_suffice_and_one_less_does_not(difference: float, level: float) -> None:
    seeds = seeds_to_tell(difference, 1.0, level=level) or 0
    gaps = np.random.default_rng(0).normal(difference, 1.0, size=(20_000, seeds))
    share = [np.mean(stats.ttest_1samp(gaps[:, :n], 0, axis=1).pvalue < level) for n in (seeds - 1, seeds)]
    assert share[0] < 0.8 < share[1] + 0.01


def test_more_seeds_of_the_same_folds_may_not_suffice() -> None:
    num_folds, difference = 5, 1.5
    seeds = seeds_to_tell(difference, 1.0, num_folds=num_folds) or 0
    normal, count = np.random.default_rng(0), seeds * num_folds
    common = normal.normal(difference, math.sqrt(1 / (num_folds - 1)), size=20_000)  # the rows that all folds share
    own = normal.normal(size=(20_000, count))
    t = (common + own.mean(1)) / (own.std(1, ddof=1) * math.sqrt(1 / count + 1 / (num_folds - 1)))
    assert np.mean(2 * stats.t.sf(abs(t), count - 1) < SIGNIFICANCE) == pytest.approx(0.8, abs=0.03)
    assert seeds_to_tell(1.3, 1.0, num_folds=num_folds) is None


def test_models_with_other_tokenizers_have_other_losses() -> None:
    two = trials({"a": [1.0, 2.0]}, group="tiny_llama") + trials({"b": [2.0, 3.1]}, group="tiny_bart", first=2)
    rows = rank(two, direction="minimize")
    assert "share a tokenizer" in conclusion(rows, LOSS)
    assert "share a tokenizer" not in conclusion(rows, "eval/validation/exact_match")


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.00031234, 0.0001, "0.00031"),
        (12.3456, 3.2, "12.3"),
        (1234.5, 250, "1,234"),
        (3.21e-9, 2e-10, "3.21e-09"),
        (1e30, 1e29, "1.00e+30"),
        (0.123456, None, "0.1235"),
    ],
)
def test_numbers_have_the_digits_that_matter(value: float, spread: float | None, text: str) -> None:
    assert number(value, spread) == text


AWKWARD = "data.train_files=['<a>|b,[c]']"


@pytest.fixture(scope="module")
def board() -> list[Row]:
    llama = trials({AWKWARD: [0.30, 0.31, 0.33], "tokens=none": [0.6, "FAILED", 0.65]}, group="tiny_llama")
    bart = trials({"tokens=tow": [0.9, 0.92, 0.95], "tokens=hcot": ["PRUNED"]}, group="tiny_bart", first=6)
    return rank(llama + bart, direction="minimize")


def test_files_can_be_read_back(board: list[Row], tmp_path: Path) -> None:
    leaderboard.write(board, tmp_path / "new", {LOSS: "minimize"}, "`a` <b> wins.")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        f"leaderboard.{kind}" for kind in ("csv", "json", "md")
    }
    with open(tmp_path / "new/leaderboard.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["setting"] for line in lines] == [row.label for row in board]
    assert (lines[0]["model"], lines[0]["seeds"], lines[0]["values"]) == ("tiny_llama", "1 2 3", "0.3 0.31 0.33")
    assert (lines[-1]["rank"], lines[-1]["mean"], lines[-1]["pruned"]) == ("", "", "1")
    assert [float(line["mean"]) for line in lines[:-1]] == [row.mean for row in board[:-1]]
    content = json.loads((tmp_path / "new/leaderboard.json").read_text(encoding="utf-8"))
    assert (content["metric"], content["direction"], content["conclusion"]) == (LOSS, "minimize", "`a` <b> wins.")
    assert content["rows"][0]["values"][1] == {"seed": 2, "fold": None, "value": 0.31}
    assert [line["rank"] for line in content["rows"]] == [row.rank for row in board]


def test_markdown_keeps_its_columns(board: list[Row], tmp_path: Path) -> None:
    leaderboard.write(board, tmp_path, {LOSS: "minimize"}, "`a` <b> wins.")
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert f"`{AWKWARD.replace('|', chr(92) + '|')}`" in text
    assert text.index("## tiny_llama") < text.index("## tiny_bart")
    assert "\\`a\\` \\<b> wins." in text


def test_a_leaderboard_of_nothing(tmp_path: Path) -> None:
    leaderboard.write([], tmp_path, {LOSS: "minimize"}, "Nothing.")
    assert (tmp_path / "leaderboard.csv").read_text(encoding="utf-8").startswith("rank,tied,setting,mean")
    write_png(leaderboard.settings_figure([], LOSS), tmp_path / "leaderboard.png")
    write_png(leaderboard.history_figure([], LOSS, "minimize"), tmp_path / "history.png")


def shown(rows: list[Row], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(leaderboard.table(rows, LOSS, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_at_80_columns(board: list[Row]) -> None:
    text = shown(board)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("tiny_llama", "tiny_bart", "0.313 ± 0.038", "1 pruned", "2 pairs", "[c]"):
        assert words in text
    tie = shown(ranked({"a": [1.0, 2.0], "b": [1.1, 2.2]}))
    assert tie.count("1 tie") == 2
    assert "+0.15 ± 0.64" in tie


@pytest.mark.parametrize("width", [60, 80, 120])
def test_table_loses_nothing_of_long_labels(width: int) -> None:
    label = "optimizer.lr=1e-5, model.dtype=bfloat16, tokens.init.method=description, data.train_files=['[a]<b>.jsonl']"
    lines = shown(ranked({label: [1.0, 1.2, 1.1], "b": [3.0, 3.3, 3.4]}), width).splitlines()
    start, stop = lines[2].index("setting"), lines[2].index("mean")
    assert max(map(len, lines)) <= width
    assert label.replace(" ", "") in "".join(line[start:stop] for line in lines[3:]).replace(" ", "")


@pytest.mark.parametrize("num_settings", [2, 40, 100])
def test_pictures_are_drawn(num_settings: int, tmp_path: Path) -> None:
    rows = ranked({f"$lr={10.0 ** (n % 5)}$ 질문": [10.0 ** (n % 5), 1.0 + n, 2.0] for n in range(num_settings)})
    write_png(leaderboard.settings_figure(rows, LOSS), tmp_path / "pictures/leaderboard.png")
    write_png(leaderboard.history_figure([3.0, math.nan, 2.0, 500.0, 1.0], LOSS, "minimize"), tmp_path / "history.png")
    for file in (tmp_path / "pictures/leaderboard.png", tmp_path / "history.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["leaderboard.png"]
