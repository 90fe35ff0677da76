"""`python -m src.report dir=…`: one page that tells a run, whatever its texts are, as a browser shows it."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.config.frozen import config_hash
from src.figures import COLOURS, styled
from src.metrics import PART_LOSSES
from src.report import main
from src.reporting.drawing import write_files
from src.reporting.figures import MOST_POINTS, thinned
from src.reporting.page import Figures, Table, rendered
from src.reporting.run_page import run_page
from tests.browser import CHROMIUM, Browser
from tests.conftest import ROWS, read_lines, towline

HOSTILE = [
    "<script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "$$x^2$$ \\(y\\)",
    "@x $name @{y}{safe} {{ 7 * 7 }} {% x %}",
    "\u05d0\u05d1 \u202eevil",
    "👩‍👩‍👧 😀",
    "a\x00b\x1b[31m",
    "L" * 400,
    "\ud800",
]
OF_THOUGHTS = (
    "Loss of the parts of thoughts, training",
    "Loss of the parts of thoughts, evaluation",
    "Generated texts with a thought, and thoughts that were closed",
    "Thoughts in a generated text",
    "Length of generated thoughts",
)
LARGEST = 3_000_000  # bytes of a page


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    done = towline("debug=smoke", "tracking=none", f"data.cache_dir={ROWS}", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model", "checkpoints", "lock"))
    return tmp_path / "run"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (the Debian package chromium)")
    with Browser(tmp_path / "profile") as opened:
        yield opened


def write_ascii(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write lines of JSON whose texts need not be ones that UTF-8 can hold."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def make_hostile(run: Path) -> None:
    """Put hostile names and texts wherever a user or the data may have put some."""
    lines = read_lines(run / "metrics.jsonl")
    for line in lines:
        line |= {f"tokens/{bad}/norm": line["step"] + i for i, bad in enumerate(HOSTILE)}
        line |= {f"eval/{bad}/loss": line["step"] + i for i, bad in enumerate(HOSTILE)}
        line |= {"eval/huge/perplexity": 1e300 / line["step"], "eval/small/perplexity": 1e-300}
    write_ascii(run / "metrics.jsonl", lines)
    texts = ("prompt", "text", "answer", "reference", "untrained")
    write_ascii(run / "samples.jsonl", [{"step": 1, **dict.fromkeys(texts, bad)} for bad in HOSTILE])
    counts = {bad: {"fed": 1, "supervised": 1} for bad in HOSTILE}
    report = {"rows_dropped": dict.fromkeys(HOSTILE, 1), "dropped_places": dict.fromkeys(HOSTILE, HOSTILE)}
    (run / "data_report.json").write_text(json.dumps(dict.fromkeys(HOSTILE, report | {"new_tokens": counts})))
    git = {"commit": HOSTILE[0], "dirty": True, "diff": "\n".join(HOSTILE)}
    (run / "provenance.json").write_text(json.dumps({"git": git, "versions": dict.fromkeys(HOSTILE, HOSTILE[0])}))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | {"name": HOSTILE[1]}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (start, *_) = read_lines(run / "starts.jsonl")
    write_ascii(run / "starts.jsonl", [start | {"command": HOSTILE, "config_hash": config_hash(config)}])


def test_a_thinned_curve_keeps_its_ends_and_its_extremes() -> None:
    draw = random.Random(1)
    x, y = list(range(10_001)), [draw.gauss(0, 1) for _ in range(10_001)]
    y[4_321], y[7_777] = 9.0, -9.0
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) == len(kept_y) <= MOST_POINTS
    assert list(kept_x) == sorted(set(kept_x))
    assert [kept_x[0], kept_x[-1]] == [0, 10_000]
    assert all(y[at] == value for at, value in zip(kept_x, kept_y, strict=True))
    assert {(4_321, 9.0), (7_777, -9.0)} <= set(zip(kept_x, kept_y, strict=True))
    assert thinned(x[:MOST_POINTS], y[:MOST_POINTS]) == (x[:MOST_POINTS], y[:MOST_POINTS])


def test_a_run_is_one_page_with_its_figures_beside_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"dir={run}"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < LARGEST
    assert str(run / "report.html") in capsys.readouterr().out
    titles = re.findall(r'<h3 dir="auto">(.*?)</h3>\n<div class="legend">', page)
    first = ["Loss", "Loss of thoughts and answers", *OF_THOUGHTS, "Learning rate", "Norm of the gradient", "Speed",
             "Memory"]  # fmt: skip
    assert titles[: len(first)] == first
    assert {"Norm of the embedding", "Cosine of the embedding to its start"} < set(titles)
    assert {file.suffix for file in (run / "report_figures").iterdir()} == {".csv", ".png"}
    assert (
        len(list((run / "report_figures").glob("*.png")))
        == len(titles)
        == len(list((run / "report_figures").glob("*.csv")))
    )
    with open(run / "report_figures" / "loss.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = read_lines(run / "metrics.jsonl")
    logged = [
        (name, str(line["step"]), str(line[name]))
        for name in ("train/loss", "eval/validation/loss", "eval/test/loss")
        for line in lines
        if name in line
    ]
    assert [(row["series"], row["step"], row["nats per token"]) for row in rows] == logged
    with open(run / "report_figures" / "memory.csv", encoding="utf-8") as file:
        memory = [(row["series"], float(row["MiB"])) for row in csv.DictReader(file)]
    names = ("perf/memory_bytes", "perf/peak_memory_bytes")
    assert memory == [(name, line[name] / 2**20) for name in names for line in lines]
    for figure, kinds in {"parts_train": ["train"], "parts_eval": ["eval/validation", "eval/test"]}.items():
        losses = {f"{kind}/{part}" for kind in kinds for part in PART_LOSSES}
        assert series_in(run / "report_figures" / f"{figure}.csv") == losses
    shares = {f"eval/{name}/{one}" for name in ("validation", "test") for one in ("thoughts_opened", "thoughts_closed")}
    assert series_in(run / "report_figures" / "thoughts.csv") == shares
    (table,) = re.findall(r"What differs from the default run</h3>(.*?)</table>", page, flags=re.DOTALL)
    differing = dict(re.findall(r'<tr><td dir="auto">(.*?)</td><td dir="auto">(.*?)</td>', table))
    assert (differing["training.max_train_steps"], differing["data.limit"]) == ("4", "16")
    assert not {key for key in differing if key.startswith(("optimizer", "model", "tokens", "tracking"))}


def series_in(file: Path) -> set[str]:
    with open(file, encoding="utf-8") as opened:
        return {row["series"] for row in csv.DictReader(opened)}


BITS = {"gold": 0.5, "none": 4.0, "shuffled": 3.0, "own": 0.75}


def write_evaluation(run: Path, *names: str) -> None:
    """Write what src.evaluate finds of sets of 20 rows each, with BITS."""
    metrics = {f"evaluate/{name}/{view}/bits_per_byte": bits for name in names for view, bits in BITS.items()}
    metrics |= {f"evaluate/{name}/exact_match": 0.9 for name in names}
    compared = [
        {"view": view, "baseline": baseline, "bits_per_byte_saved": saved, "low": saved - 0.25, "high": saved + 0.5,
         "p_value": 0.0002, "num_rows": 20}
        for baseline in ("none", "gold")
        for view, bits in BITS.items()
        if view not in (baseline, "none") and (saved := BITS[baseline] - bits) is not None
    ]  # fmt: skip
    (run / "evaluations").mkdir()
    content = {"metrics": metrics, "rows": {}, "comparisons": dict.fromkeys(names, compared), "against": {}}
    (run / "evaluations" / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def test_what_thoughts_are_worth_is_drawn_with_intervals(run: Path) -> None:
    write_evaluation(run, "a/b", "test")
    page = run_page(run)
    section = next(one for one in page.sections if one.title == "What thoughts are worth")
    bits, saved = next(block.figures for block in section.blocks if isinstance(block, Figures))
    assert bits.x_ticks == {1: "gold", 2: "own", 3: "shuffled", 4: "none"}
    assert [(one.name, [*one.y]) for one in bits.series] == [(name, [0.5, 0.75, 3, 4]) for name in ("a/b", "test")]
    assert saved.x_ticks == {1: "gold", 2: "own", 3: "shuffled"}
    assert saved.title.endswith("against no thoughts")
    found = [(one.name, one.kind, [*one.y]) for one in saved.series[2:]]
    assert found == [
        ("test", "points", [3.5, 3.25, 1.0]),
        ("test: 95 % interval", "intervals", [3.25, 4.0, 3.0, 3.75, 0.75, 1.5]),
    ]
    places = [[round(x) for x in one.x] for one in saved.series]
    assert places == [[1, 2, 3], [1, 1, 2, 2, 3, 3]] * 2
    assert len({x for one in saved.series[::2] for x in one.x}) == 6  # no set hides another
    assert [colour for _, colour, _ in styled(saved)] == [COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1]]
    write_files(saved, run / "saved")
    with open(run / "saved.csv", encoding="utf-8") as file:
        rows = [(row["series"], row["thoughts"], float(row["bits per byte saved"])) for row in csv.DictReader(file)]
    assert rows[-2:] == [("test: 95 % interval", "shuffled", 0.75), ("test: 95 % interval", "shuffled", 1.5)]
    compared = next(block for block in section.blocks if isinstance(block, Table) and "p" in block.headings)
    assert ["test", "own", "gold", "-0.2500", "-0.5000 to 0.2500", "< 0.001", "20"] in compared.rows


@pytest.mark.parametrize(
    "names", [["metrics.jsonl", "provenance.json"], ["summary.json", "config.yaml", "evaluations/evaluation.json"]]
)
def test_a_damaged_file_is_said_and_the_rest_is_shown(run: Path, names: list[str]) -> None:
    write_evaluation(run)
    for name in names:
        (run / name).write_text("[1\n", encoding="utf-8")
    page = rendered(run_page(run))
    assert all(f"{name} is damaged" in page for name in names)
    assert "Samples over time" in page


def test_the_page_is_shown_without_a_complaint_whatever_its_texts_are(run: Path, browser: Browser) -> None:
    make_hostile(run)
    write_evaluation(run, *(bad for bad in HOSTILE if bad.isprintable()))
    assert main([f"dir={run}"]) == 0
    for width, is_dark in ((390, False), (1440, True)):
        browser.open(run / "report.html", width, is_dark=is_dark)
        assert browser.complaints() == []
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value("document.title") == HOSTILE[1]
    assert browser.value("document.querySelectorAll('.plot').length") == len(
        list((run / "report_figures").glob("*.png"))
    )
    shown = browser.value("document.body.innerText")
    assert all(bad in shown for bad in HOSTILE if bad.isprintable())
    assert "a\\x00b\\x1b[31m" in shown
    assert tooltips(browser) >= {HOSTILE[0]}
    assert browser.value("window.hacked") is None
    assert browser.complaints() == []


def tooltips(browser: Browser) -> set[Any]:
    """Return the names that are shown where the mouse is over the points of the first series of tokens."""
    place = browser.value(
        "(() => { const plot = [...document.querySelectorAll('.figure')].find("
        "one => one.textContent.trim().startsWith('Norm of the embedding')).querySelector('.plot');"
        "plot.scrollIntoView({block: 'center'}); const {x, y, width, height} = plot.getBoundingClientRect();"
        "return [x, y, width, height]; })()"
    )
    names = (
        "(() => { const found = []; const walk = node => { if (node.matches?.('.bk-tooltip-row-value'))"
        "found.push(node.textContent.trim()); for (const one of node.children ?? []) walk(one);"
        "if (node.shadowRoot) walk(node.shadowRoot); }; walk(document.body); return found; })()"
    )
    left, top, width, height = place
    seen: set[Any] = set()
    for part in range(60):
        for share in (0.1, 0.35, 0.6, 0.8):
            y = top + height * (part + 0.5) / 60
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width * share, y=y)
        seen |= set(browser.value(names))
    return seen
