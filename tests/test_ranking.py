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

from src.sweep import leaderboard
from src.sweep.ranking import Result, Row, conclusion, number, rank
from src.sweep.significance import holm, variance_factor

LOSS = "eval/validation/loss"


def trials(values: dict[str, list[Any]], *, folds: bool = False, group: str = "", first: int = 0) -> list[Result]:
    """Give the trials of each setting at seeds (or folds) 1, 2, …: a value, a state instead of one, or "" for none."""
    found: list[Result] = []
    for setting, given in values.items():
        for place, value in enumerate(given, 1):
            if value != "":
                state, number_ = (value, None) if isinstance(value, str) else ("FINISHED", value)
                replicate = (1, place) if folds else (place, None)
                found.append(Result(first + len(found), setting, setting, group, replicate, state, number_))
    return found


def ranked(values: dict[str, list[Any]], **options: Any) -> list[Row]:
    return rank(trials(values, folds="num_folds" in options), **({"direction": "minimize"} | options))


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
    row = ranked({"a": best, "b": ["", "", "", *other]})[1]
    expected = stats.ttest_ind(other, best, equal_var=False)
    span = expected.confidence_interval()
    assert (row.p_value, row.difference_low, row.difference_high) == pytest.approx(
        (expected.pvalue, span.low, span.high)
    )
    assert row.num_pairs == 0
    assert "unpaired" in row.verdict


def test_p_values_are_corrected_for_how_many_there_are() -> None:
    assert holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert holm([]) == []
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
    assert "5 folds" in conclusion(ranked({"a": [1.0] * 5}, num_folds=5), LOSS, "minimize")


def test_one_seed_is_never_a_win() -> None:
    rows = ranked({"a": [0.3], "b": [0.9]})
    assert places(rows) == [("a", 1, True), ("b", 1, True)]
    assert all(row.low is None and row.p_value is None for row in rows)
    assert {row.verdict for row in rows} == {"one seed: no test possible"}
    text = conclusion(rows, LOSS, "minimize")
    assert (
        text == f"One trial per setting: no test is possible; run more seeds, e.g. seed=1,2,3 (lowest {LOSS}: 0.3, a)."
    )


def test_a_lucky_seed_neither_wins_nor_hides_who_does() -> None:
    rows = ranked({"lucky": [0.1], "a": [0.30, 0.32, 0.31], "b": [0.50, 0.53, 0.51]})
    assert places(rows) == [("lucky", 1, True), ("a", 1, True), ("b", 3, False)]
    text = conclusion(rows, LOSS, "minimize")
    assert text.startswith("a is better than b in")
    assert "lucky has one seed: no test is possible." in text


@pytest.mark.parametrize(
    ("a", "b", "is_tied", "verdict"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, "equal"),
        ([1.0, 2.0, 3.0], [1.5, 1.5, 3.0], True, "tie: p 1"),  # the means are equal, the seeds are not
        ([0.1, 0.2, 0.4], [0.2, 0.3, 0.5], False, "worse: p < 0.001"),  # one gap three times, but for how floats round
        ([0.1, 0.2], [0.2, 0.3], True, "the same gap in too few seeds: no test possible"),
    ],
)
def test_differences_that_do_not_vary(a: list[float], b: list[float], is_tied: bool, verdict: str) -> None:
    row = ranked({"a": a, "b": b})[1]
    assert (row.is_tied, row.verdict) == (is_tied, verdict)


def test_means_over_other_seeds_are_compared_on_those_that_both_have() -> None:
    easy, hard = [0.10, 0.12], [0.50, 0.53]
    rows = ranked({"a": [*easy, "FAILED", "FAILED"], "b": [0.08, 0.10, *hard]})
    assert [row.setting for row in rows] == ["b", "a"]  # though the mean of a is lower
    assert (rows[1].difference, rows[1].num_pairs, rows[1].failed) == (pytest.approx(0.02), 2, 2)
    assert "on 2 shared seeds, 2 failed" in rows[1].verdict
    incomplete = ranked({"a": [0.1, 0.11, 0.12, "FAILED"], "b": [0.3, 0.34, 0.33, 0.3]})
    assert incomplete[0].verdict == "best, has 3 of 4 seeds, 1 failed"
    assert "a is not complete: 1 failed." in conclusion(incomplete, LOSS, "minimize")


def test_what_pruning_left_over_wins_nothing() -> None:
    rows = ranked({"a": [0.10, 0.11, 0.12, "PRUNED"], "b": [0.3, 0.34, 0.33, 0.9], "c": [3.0, 3.1, 3.2, 3.3]})
    assert places(rows) == [("a", 1, True), ("b", 1, True), ("c", 3, False)]
    assert "not on equal terms" in rows[0].verdict
    assert "can't be compared on equal terms" in conclusion(rows, LOSS, "minimize")


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
    assert [row.verdict for row in rows[1:]] == ["PRUNED", "UNFINISHED", "FAILED", "FAILED"]
    assert (rows[2].unfinished, rows[4].failed) == (2, 2)
    assert "4 settings have no value." in conclusion(rows, LOSS, "minimize")
    assert conclusion(ranked({"f": ["FAILED"]}), LOSS, "minimize").startswith("No trial finished")
    assert conclusion([], LOSS, "minimize").startswith("No trial finished")


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
    assert conclusion(up, "exact_match", "maximize").startswith("b is better than all others in exact_match (mean 0.7")


def test_noise_wins_as_seldom_as_promised() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 2, 3)).tolist()
    wins = sum(not ranked({"a": a, "b": b})[0].is_tied for a, b in draws)
    assert wins / len(draws) < 0.065  # 5 %, and three standard errors
    assert wins / len(draws) > 0.035


def test_conclusions_in_words() -> None:
    win = ranked({"tokens=tow": [0.30, 0.31, 0.32], "tokens=none": [0.5, 0.52, 0.51], "c": [0.7, 0.72, 0.71]})
    assert conclusion(win, LOSS, "minimize") == (
        f"tokens=tow is better than all others in {LOSS} (mean 0.310, 95 % interval 0.285 to 0.335, 3 seeds)."
    )
    tie = ranked({"tokens=tow": [0.30, 0.35, 0.32], "tokens=none": [0.31, 0.33, 0.36]})
    assert conclusion(tie, LOSS, "minimize") == (
        f"tokens=tow and tokens=none are not significantly different in {LOSS}: difference 0.010, "
        "95 % interval -0.065 to 0.085, 3 pairs."
    )
    many = ranked({"a": [1.0, 2.0], "b": [1.1, 1.9], "c": [1.2, 2.1]})
    assert conclusion(many, LOSS, "minimize").startswith("3 settings are not significantly different")
    (alone,) = rank([Result(1, "h", "", "", (1, None), "FINISHED", 0.5)], direction="minimize")
    assert conclusion([alone], LOSS, "minimize").startswith("One trial (")


def test_models_with_other_tokenizers_have_other_losses() -> None:
    two = trials({"a": [1.0, 2.0]}, group="tiny_llama") + trials({"b": [2.0, 3.1]}, group="tiny_bart", first=2)
    rows = rank(two, direction="minimize")
    assert "share a tokenizer" in conclusion(rows, LOSS, "minimize")
    assert "share a tokenizer" not in conclusion(rows, "eval/validation/exact_match", "minimize")


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
    leaderboard.write(board, tmp_path / "new", LOSS, "minimize", "`a` <b> wins.")
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
    leaderboard.write(board, tmp_path, LOSS, "minimize", "`a` <b> wins.")
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert f"`{AWKWARD.replace('|', chr(92) + '|')}`" in text
    assert text.index("## tiny_llama") < text.index("## tiny_bart")
    assert "\\`a\\` \\<b> wins." in text


def test_a_leaderboard_of_nothing(tmp_path: Path) -> None:
    leaderboard.write([], tmp_path, LOSS, "minimize", "Nothing.")
    assert (tmp_path / "leaderboard.csv").read_text(encoding="utf-8").startswith("rank,tied,setting,mean")
    leaderboard.plot([], tmp_path / "leaderboard.png", LOSS, "minimize")
    leaderboard.plot_history([], tmp_path / "history.png", LOSS, "minimize")


def shown(rows: list[Row], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(leaderboard.table(rows, LOSS, "minimize"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_at_80_columns(board: list[Row]) -> None:
    text = shown(board)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("tiny_llama", "tiny_bart", "0.313 ± 0.038", "best", "PRUNED", "worse: p", "[c]"):
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
    leaderboard.plot(rows, tmp_path / "pictures/leaderboard.png", LOSS, "minimize")
    leaderboard.plot_history([3.0, math.nan, 2.0, 500.0, 1.0], tmp_path / "history.png", LOSS, "minimize")
    for file in (tmp_path / "pictures/leaderboard.png", tmp_path / "history.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["leaderboard.png"]
