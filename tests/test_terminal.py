"""What is printed on a terminal fits its lines: indents stay, and no number is broken."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.console import Console as Terminal

from src import preflight
from src.config.gate import admit
from src.config.problems import Problem, refuse
from src.errors import ConfigError, report
from src.evaluation.samples import Sample
from src.progress import TimeLeft
from src.runtime.launch import CopiedStream
from src.sweep.progress import ProgressTable, TableRow
from src.terminal import columns_of, cut_to, filled, shortened, width, wrapped
from src.tracking import console as console_module
from src.tracking.console import Console
from src.tracking.end_summary import MetricHistory, changes
from src.tracking.live import Work
from src.training.work_ahead import Occasion, WorkAhead
from src.trials.folder import TrialStatus
from src.trials.trial import Trial
from tests.conftest import ROOT, read_lines

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:[.:]\d+)*(?:e[+-]?\d+)?")


class Screen(io.StringIO):
    """A terminal of 80 columns that remembers what was written."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What stays on it."""
        return screen_of(self.getvalue())

    @property
    def drawn(self) -> list[str]:
        """Every line that was to be seen at some time, those that are drawn in place too."""
        return lines_drawn(self.getvalue())


CONTROL = re.compile(r"\n|\r|\x1b\[(?:2K|\d*A|\?25[lh]|[\d;]*m)")


def screen_of(written: str) -> list[str]:
    """Return the lines of a terminal after a text with rich's controls was written to it."""
    lines, row, at = [""], 0, 0
    for found in [*CONTROL.finditer(written), None]:
        lines[row] += written[at : found.start() if found else len(written)]
        if found is None:
            break
        at, control = found.end(), found.group()
        if control == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control.endswith("A"):
            row -= 1
        elif control.endswith("K"):
            lines[row] = ""
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def lines_drawn(written: str) -> list[str]:
    plain = re.sub(r"\x1b\[\?25[lh]|\x1b\[\d*A|\x1b\[[\d;]*m", "", written)
    return [line for line in re.split(r"\n|\r|\x1b\[2K", plain) if line]


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("one two three four five six", 20, ["one two three four", "five six"]),
        ("  keeps its indent, 12,345.678 too", 24, ["  keeps its indent,", "  12,345.678 too"]),
        ("up to 21.9 MiB for it, 76.7 GiB free", 30, ["up to 21.9 MiB for it,", "76.7 GiB free"]),
        ("weights   2.7 MiB   707,456 weights", 30, ["weights   2.7 MiB   707,456", " " * 20 + "weights"]),
        ("- of a list of some words and more", 20, ["- of a list of some", "  words and more"]),
        ("[" + "0123456789," * 3 + "]", 24, ["[0123456789,0123456789,", "0123456789,]"]),
        ("0123456789" * 3, 20, ["0123456789" * 3]),
        ("a path /with/some/folders/and/a/name.txt", 24, ["a path /with/some/", "folders/and/a/name.txt"]),
        ("do `make sync run=DIR` now, please", 22, ["do `make sync run=DIR`", "now, please"]),
        # commands are not divided: they go to the left as far as it takes, and beyond the right edge where it must be
        ("run `a command longer than a line` now", 20, ["run", "`a command longer than a line`", "now"]),
        ("      give it whole: `key=[data/some]` now", 23,
         ["      give it whole:", "      `key=[data/some]`", "      now"]),
        ("          give it whole: `key=[data/some]`, or", 22,
         ["          give it", "          whole:", "    `key=[data/some]`,", "          or"]),
        ("a text   quote it: 'key=\"a, b\"' (here)", 26,
         ["a text   quote it:", "         'key=\"a, b\"'", "         (here)"]),
        ("quote it: 'key=\"a, it'\"'\"'s b\"', or so", 24, ["quote it:", "'key=\"a, it'\"'\"'s b\"',", "or so"]),
        ("did you mean a=b 'c=d e' f.g=h? or", 22, ["did you mean", "a=b 'c=d e' f.g=h? or"]),
        ("did you mean a=b 'c=d e' f.g=h i=j?", 20, ["did you mean a=b", "'c=d e' f.g=h i=j?"]),
        ("so do make sync run='/a b/c d/e f/g' now", 20, ["so do", "make sync run='/a b/c d/e f/g'", "now"]),
        ("the users' own and the others' are words", 20, ["the users' own and", "the others' are", "words"]),
        ("한국어 문장은 두 칸을 차지합니다", 20, ["한국어 문장은 두", "칸을 차지합니다"]),
        ("質問に答える文章はとても長い", 20, ["質問に答える文章はと", "ても長い"]),
        ("\x1b[1mpainted words take\x1b[0m no room", 22, ["\x1b[1mpainted words take\x1b[0m no", "room"]),
        ("", 20, [""]),
        ("below the narrowest nothing is done", 19, ["below the narrowest nothing is done"]),
    ],
)  # fmt: skip
def test_lines_end_between_words(text: str, columns: int, lines: list[str]) -> None:
    assert wrapped(text, columns).split("\n") == lines
    assert wrapped(text, None) == text


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    some.lists(some.text("ab .,/:;-e1234567890 <>", min_size=1, max_size=60), min_size=1, max_size=3),
    some.integers(20, 70),
)
def test_nothing_is_lost_and_no_number_broken(parts: list[str], columns: int) -> None:
    text = "\n".join(parts)
    shown = wrapped(text, columns)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    assert NUMBER.findall(shown) == NUMBER.findall(text)
    for line in shown.split("\n"):
        assert width(line.rstrip()) <= columns or max(map(len, NUMBER.findall(line))) > columns // 4


def test_items_are_not_divided() -> None:
    begin, items = "  evaluated: test", ["loss 0.1234", "perplexity 1.1234", "exact match 0.5"]
    assert filled(begin, items, 38, hang=6).split("\n") == [
        "  evaluated: test  loss 0.1234",
        "      perplexity 1.1234",
        "      exact match 0.5",
    ]
    assert filled(begin, items, None, hang=6) == f"{begin}  {'  '.join(items)}"


def test_a_text_is_cut_between_words_and_beside_numbers() -> None:
    assert cut_to("rows: 12,345 prepared so far", 20) == "rows: 12,345 …"
    assert cut_to("rows: 12,345", 20) == "rows: 12,345"
    assert shortened("a" * 10, 10) == "a" * 10
    assert shortened("one two 123456789", 14) == "one two …"
    assert shortened("x" * 400, 300) == "x" * 298 + " …"
    assert shortened("1234567890" * 7, 60, "…") == "a number of 70 digits"
    assert Problem("seed", "", 10**70).given == "seed = a number of 71 digits"
    assert Problem("name", "", "[1, 22, " + "3" * 60).given == "name = [1, 22,…"


def test_how_wide_a_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert columns_of(io.StringIO()) is None
    assert columns_of(Screen()) == 80
    monkeypatch.setenv("COLUMNS", "66")
    assert (columns_of(Screen()), columns_of(io.StringIO())) == (66, None)


# What a run says


def sample_of(text: str, answer: str, reference: str = "15201") -> Sample:
    return Sample(3, "7311+7890=", text, answer, reference, "eos", 0, 0, text)


def test_samples_show_their_parts_apart_and_equal_ones_once() -> None:
    screen = Screen()
    console = Console(screen)
    console.samples([sample_of("<ToW>1+0+0=01</ToW>15201", "15201"), sample_of("15201", "15201"), sample_of("", "")])
    assert screen.lines == [
        "  prompt      7311+7890=",
        "    text      <ToW>1+0+0=01</ToW>15201   [eos]",
        "    answer    15201",
        "    expected  15201",
        "  prompt      7311+7890=",
        "    answer    15201   [eos]",
        "    expected  15201",
        "  prompt      7311+7890=",
        "    answer    (nothing)   [eos]",
        "    expected  15201",
    ]


def test_long_samples_stay_in_their_column() -> None:
    screen = Screen()
    thoughts = "".join(f"<ToW>{i}+{i + 1}+0={2 * i + 1:02}</ToW>" for i in range(1000, 1020))
    Console(screen).samples([sample_of(f"{thoughts}15201", "15201", "a word and another, " * 9)])
    assert max(map(len, screen.lines)) <= 80
    assert {line[14:15] != " " and line[:14].strip() for line in screen.lines} == {
        "prompt",
        "text",
        "answer",
        "expected",
        "",
    }
    shown = "".join(line[14:] for line in screen.lines[1:6])
    assert shown.startswith(thoughts[:250])


def test_progress_fits_into_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    details = ["loss 1.5000", "lr 2.0e-05", "1,234,567 tokens/s"]
    for columns, num_shown in ((110, 3), (80, 2), (60, 1), (40, 0)):
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = Screen()
        console = Console(screen)
        console.progress(100_000, 100_000, 1.5, 2e-5, 1_234_567.0, TimeLeft(75, is_lower_bound=True), logged=True)
        line = screen.drawn[-1]
        assert width(line) < columns
        assert (line.startswith("step 100,000/100,000"), line.endswith("over 1:15 left")) == (True, True)
        assert [detail for detail in details if detail in line] == details[:num_shown]
        console.close()
        console.working("word " * 40)
        assert width(screen.drawn[-1]) < columns
        console.close()
        assert screen.lines == [""]


def test_work_within_a_run_is_drawn_below_it_and_gone_when_it_ends() -> None:
    screen = Screen()
    console = Console(screen)
    console.begin_training(3, 9)
    with console.work("evaluating", "validation", 8) as advance:
        advance(6)
        console.say("a line that stays")
        said, step, evaluating = screen.lines
        assert (said, step[:10]) == ("a line that stays", "step 3/9 ━")
        assert re.fullmatch(r"evaluating validation 6/8 rows [━╸╺]+ 0:00 left", evaluating)
        advance(6)  # what another process does is counted by this one, and may be less
    console.say("another one")
    assert [line[:10] for line in screen.lines] == ["a line tha", "another on", "step 3/9 ━"]
    assert console.pace["evaluating"] < 1
    with pytest.raises(ZeroDivisionError), console.work("failing", total=3):
        raise ZeroDivisionError
    console.close()
    assert ("failing" in console.pace, screen.lines) == (False, ["a line that stays", "another one"])


def test_a_copy_of_what_is_printed_has_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, log = Screen(), io.StringIO()
    stream = CopiedStream(screen, log)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console()
    console.say("\x1b[1mbold\x1b[0m", is_painted=True)
    console.begin_training(3, 9)
    with console.work("evaluating", "validation", 8) as advance:
        advance(6)
        console.say("a line that stays")
        print("what a library writes", file=sys.stderr)
        assert any("evaluating validation 6/8" in line for line in screen.lines)
    console.close()
    assert log.getvalue() == "bold\na line that stays\nwhat a library writes\n"
    assert [line for line in screen.lines if line] == log.getvalue().splitlines()


def test_long_work_is_a_line_now_and_then_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    for seconds, num_lines in ((3600.0, 0), (0.0, 10)):
        monkeypatch.setattr(console_module, "QUIET_SECONDS", seconds)
        with Console(log).work("evaluating", "validation", 100) as advance:
            for _ in range(10):
                advance(10)
        assert len(log.getvalue().splitlines()) == num_lines
    line = r"evaluating validation: \d+ of 100 rows  0:00 left"
    assert all(re.fullmatch(line, shown) for shown in log.getvalue().splitlines())


@pytest.mark.parametrize("terminal", [False, True])
def test_work_that_says_nothing_is_shown_too(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread shows that it is under way: in a log as soon as a line is due, on a terminal again and again."""
    monkeypatch.setattr(console_module, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(console_module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(console_module, "REFRESH_SECONDS", 0.0)
    stream = Screen() if terminal else io.StringIO()
    console = Console(stream)
    with console.work("exporting", "the model"):
        while stream.getvalue().count("exporting the model") < 3:
            threading.Event().wait(0.01)
    log = io.StringIO()
    console = Console(log)
    while not log.getvalue():  # rows that are prepared, one notice after another
        console.working("train: 16 rows prepared")
    assert log.getvalue() == "train: 16 rows prepared\n"


def test_a_run_that_resumes_judges_by_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    Console(screen).begin_training(9_000, 10_000)
    assert screen.lines[-1].endswith("? left")
    work = Work("step", 10_000, done=9_000)
    work.begun -= 10
    work.advance(500)
    assert work.left_seconds == pytest.approx(10, rel=0.01)
    monkeypatch.setenv("TERM", "dumb")  # rich draws nothing there
    dumb = Screen()
    Console(dumb).progress(1, 4, 1.0, 0.1, 10.0, None, logged=True)
    assert dumb.getvalue() == "step 1/4  loss 1.0000  lr 1.0e-01       10 tokens/s  ? left\n"


def test_the_time_left_counts_what_is_still_to_come() -> None:
    each_20 = Occasion(20, {"evaluating": 100, "generating": 100})
    at_end, samples = Occasion(None, {"evaluating": 50, "generating": 50}), Occasion("epoch", {"generating": 3})
    ahead = WorkAhead(50, 25, 8.0, (each_20, at_end, samples, Occasion(30, {"saving": 1}, at_end=False)))
    pace = {"evaluating": 0.1, "generating": 1.0, "saving": 7.0}
    # after step 10: evaluations at 20, 40 and 50; the test set; samples at 25 and 50; a checkpoint at 30
    expected = 40 * 2.0 + 3 * (10 + 100) + (5 + 50) + 2 * 3 + 7
    assert ahead.time_left(10, 2.0, pace) == (pytest.approx(expected), False)
    assert ahead.time_left(20, 2.0, pace).seconds == pytest.approx(expected - 20)  # its own evaluation is to come
    assert ahead.time_left(21, 2.0, pace).seconds == pytest.approx(expected - 22 - 110)
    assert ahead.time_left(50, 2.0, pace).seconds == pytest.approx(110 + 55 + 3)
    streamed = WorkAhead(50, None, 8.0, (Occasion("epoch", {"evaluating": 10}),))
    assert streamed.time_left(40, 2.0, pace) == (21.0, True)  # how many epochs that are is not known
    # a row's loss is a third of its training, until it was timed; nothing says how long a text will take
    seconds = 40 * 2.0 + 350 * 2.0 / 8 / 3
    assert ahead.time_left(10, 2.0, {}) == (pytest.approx(seconds), True)
    no_texts = WorkAhead(50, 50, 8.0, (Occasion("epoch", {"evaluating": 100, "generating": 0}),))
    assert no_texts.time_left(50, 2.0, {}) == (pytest.approx(100 * 2.0 / 8 / 3), False)


def test_a_run_says_at_its_end_what_changed() -> None:
    history = MetricHistory()
    history.add(10, {"train/loss": 3.0, "train/lr": 0.1, "eval/validation/loss": 2.5, "eval/validation/rouge1": 0.1})
    history.add(20, {"train/loss": 2.0, "eval/validation/loss": 1.0, "eval/validation/rouge1": 0.75})
    last = {"train/loss": 1.5, "eval/validation/loss": 1.25, "eval/validation/rouge1": 0.75, "eval/test/loss": 1.125}
    history.add(30, last)
    assert [line.split() for line in changes(history, last)] == [
        ["first", "last", "best"],
        ["train/loss", "3.0000", "(step", "10)", "1.5000"],
        ["eval/validation/loss", "2.5000", "(step", "10)", "1.2500", "1.0000", "(step", "20)"],
        ["eval/validation/rouge1", "0.1000", "(step", "10)", "0.7500", "0.7500", "(step", "20)"],
        ["eval/test/loss", "1.1250"],
    ]
    assert history.best_metrics()["best/eval/validation/loss"] == 1.0
    narrow = changes(history, last, 60)
    assert (narrow[2].split(), max(map(len, narrow)) <= 60) == (
        ["eval/validation/loss", "2.5000", "1.2500", "1.0000"],
        True,
    )
    assert changes(MetricHistory(), {}) == []
    history.add_step(1, 5.0)
    history.add_step(2, 4.0)
    assert changes(history, last)[1].split() == ["train/loss", "5.0000", "(untrained)", "1.5000"]


def test_errors_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    problem = Problem("optimizer.lrr", "unknown key; did you mean optimizer.lr?", 0.0001, where="from the command line")
    report(refuse([problem, Problem("training.mixed_precision", "not one of no, bf16, fp16", "fp8")]))
    assert screen.lines[1:3] == [
        "  optimizer.lrr = 0.0001           unknown key; did you mean optimizer.lr?",
        "                                   (from the command line)",
    ]


def test_what_may_be_pasted_is_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Add the two numbers, please, and write down every step of it, as you would on paper."
    for arguments, typed in (
        ([f"data.system_prompt={text}"], f"'data.system_prompt=\"{text}\"'"),
        (["data.system_prompt=Add, please."], "'data.system_prompt=\"Add, please.\"'"),
        (["loss.momentum=0.9"], "optimizer=sgd optimizer.momentum=0.9?"),
        (["datasets=[{path: a}]"], "`data.train_files=[data/tow_addition]`"),
    ):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with pytest.raises(ConfigError) as refused:
            admit(arguments)
        report(refused.value)
        assert any(typed in line for line in screen.lines), screen.getvalue()
        assert all(width(line) <= 80 for line in screen.lines if typed not in line)


def test_the_table_of_a_sweep_breaks_no_number() -> None:
    overrides = (
        "optimizer.lr=0.0001235",
        "training.per_device_train_batch_size=16",
        "data.train_files=[/a/20261121/b-105749.jsonl]",
    )
    trial = Trial(12, 12, overrides, "a", "b", 1, None, {})
    board = ProgressTable("a sweep", ["eval/validation/thought_loss"])
    terminal = Terminal(file=io.StringIO(), width=80)
    running = TrialStatus("RUNNING", last=(0.123456,), step=1200, num_steps=12_000, elapsed_seconds=500)
    terminal.print(board._table([TableRow(trial, running)], "3 of 12345 trials done, 1 running, about 1:12:33 left"))
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    for number in ("0.0001235", "16", "20261121", "105749", "1200/12000", "0.1235", "1:15:00", "12345", "1:12:33"):
        assert number in text
    assert max(map(len, text.splitlines())) <= 80


def test_preflight_at_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen, file = Screen(), io.StringIO()
    for stream in (screen, file):
        monkeypatch.setattr(sys, "stdout", stream)
        assert preflight.main(["tracking=none", "debug=smoke", f"data.cache_dir='{tmp_path}'", "preflight.rows=1"]) == 0
    lines = screen.lines
    assert max(map(len, lines)) <= 80 < max(map(len, file.getvalue().splitlines()))
    held = r"(?:data|total) +[\d.]+ [KMG]iB"
    timed = re.compile(rf"\d+:\d+|[\d.]+e[+-]\d+|[\d.]+ [KMG]iB free|{held}")  # of this moment
    narrow, wide = (NUMBER.findall(timed.sub("", text)) for text in ("\n".join(lines), file.getvalue()))
    assert narrow == wide


def test_a_run_on_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """A real terminal of 80 columns: no line is longer, those that are continued are indented, numbers are whole."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "src.run", "debug=smoke", "training.max_train_steps=2", "tracking=none",
        f"hydra.run.dir={run}", f"data.cache_dir={tmp_path}/rows"]  # fmt: skip
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, stdout=follower, stderr=follower, stdin=follower)
    os.close(follower)
    written = b""
    while True:
        try:
            written += os.read(leader, 2**16)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert process.wait() == 0
    text = written.decode().replace("\r\n", "\n")
    assert max(width(line) for line in lines_drawn(text) if "python -m" not in line) <= 80  # no command is divided
    lines = screen_of(text)
    assert next(i for i, line in enumerate(lines) if line.startswith("device ")) < 24
    said = "\n".join(lines)
    last = read_lines(run / "metrics.jsonl")[-1]
    for name in ("loss", "perplexity", "thought_loss", "answer_loss"):
        assert f"{name} {last[f'eval/validation/{name}']:.4f}" in said
    train = json.loads((run / "data_report.json").read_text())["train"]
    assert re.search(rf"{train['supervised_tokens']:,} of {train['tokens']:,} tokens\s+supervised", said)
    assert re.search(
        r"^data        train: 16 of 16 rows .*\n {12}supervised\n {12}validation: ", said, flags=re.MULTILINE
    )
    assert re.search(r"^  evaluated at step 2: test .*\n {6}\w+ ", said, flags=re.MULTILINE)
