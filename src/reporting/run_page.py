"""The page of one run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.reporting.curves import run_figures, token_figures
from src.reporting.details import Details, read_details
from src.reporting.page import Block, Figures, Long, Page, Section, Table, Text
from src.reporting.runs import dotted, is_compared, is_number, is_same, when
from src.reporting.views import view_blocks
from src.tracking.live import clock
from src.util import human_bytes, plural

MOST_PROMPTS, MOST_STEPS = 8, 8
"""Prompts whose samples are shown, and steps of each: the first, the last, and some between."""
LONGEST_SAMPLE = 2000
COUNTS = {
    "rows_read": "rows read",
    "rows_kept": "kept",
    "rows_truncated": "truncated",
    "rows_repeated": "repeated",
    "rows_cleaned": "cleaned",
    "tokens": "tokens",
    "supervised_tokens": "supervised",
    "thought_tokens": "of thoughts",
    "control_tokens_as_text": "control tokens as text",
    "rows_changed_by_tokenizer": "changed by the tokenizer",
}
NUMBERS = ("tokens_per_second", "tokens_seen", "examples_seen", "num_parameters", "num_trained_parameters", "steps")


def run_page(folder: Path) -> Page:
    """Return the page of a run's folder."""
    found = read_details(folder)
    facts = found.run.facts
    about = (
        f"{facts['state']}, step {facts['step']}, started {when(facts['started']) or 'at an unknown time'}; {folder}"
    )
    sections = [
        Section("Result", list(_result(found))),
        Section("Training and evaluation", _figures(run_figures(found.lines))),
        Section("What thoughts are worth", list(view_blocks(found.evaluation))),
        Section("New tokens", _figures(token_figures(found.lines))),
        Section("Samples over time", list(samples(found.samples))),
        Section("Data", list(data(found.data))),
        Section("Configuration", list(_configuration(found.run.config))),
        Section("Provenance", list(_provenance(found))),
    ]
    return Page(str(facts["name"] or folder.name), about, sections)


def _figures(figures: Sequence[Any]) -> list[Block]:
    return [Figures(figures)] if figures else []


def _result(found: Details) -> Iterator[Block]:
    yield from (Text(problem, is_warning=True) for problem in found.problems)
    facts, metrics = found.run.facts, found.run.metrics
    if facts["cause"] and facts["state"] != "DAMAGED":
        yield Text(f"Cause: {facts['cause']}", is_warning=facts["state"] == "FAILED")
    rows = [[name, number(value)] for name, value in metrics.items() if name in NUMBERS]
    if is_number(facts["seconds"]):
        rows.insert(0, ["time", clock(facts["seconds"])])
    if is_number(facts["memory"]):
        rows.insert(1, ["peak memory", human_bytes(facts["memory"])])
    if rows:
        yield Table(["", "value"], rows)
    values = [
        [name, number(value), number(metrics.get(f"best/{name}"))]
        for name, value in metrics.items()
        if name.startswith("eval/")
    ]
    if values:
        yield Table(["metric", "last", "best"], values)


def samples(lines: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield a table for each of the first prompts: what was generated for it over time."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(str(line["prompt"]), []).append(line)
    for prompt, those in list(by_prompt.items())[:MOST_PROMPTS]:
        count = min(len(those), MOST_STEPS)
        chosen = [those[round(i * (len(those) - 1) / max(1, count - 1))] for i in range(count)]
        rows = [[f"{one['step']:,}", _cut(one["text"]), _cut(one.get("answer"))] for one in chosen]
        if (untrained := chosen[0].get("untrained")) is not None:
            rows.insert(0, ["untrained", _cut(untrained), ""])
        if (reference := chosen[-1].get("reference")) is not None:
            rows.append(["expected", "", _cut(reference)])
        yield Table(["step", "text", "answer"], rows, title=_cut(prompt))
    if len(by_prompt) > MOST_PROMPTS:
        yield Text(f"{plural(len(by_prompt) - MOST_PROMPTS, 'more prompt')} in samples.jsonl.")


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} …"


def data(report: Mapping[str, Any]) -> Iterator[Block]:
    """Yield what data_report.json says: rows and tokens by set, what was lost and why, how often new tokens occur."""
    sets = {name: one for name, one in report.items() if isinstance(one, Mapping)}
    if not sets:
        return
    known = [key for key in COUNTS if any(one.get(key) for one in sets.values())]
    rows = [
        [name, *(number(one.get(key)) for key in known), _lengths(one.get("lengths"))] for name, one in sets.items()
    ]
    yield Table(["set", *(COUNTS[key] for key in known), "tokens a row"], rows)
    lost = [
        [name, str(reason), number(count), ", ".join(map(str, _mapping(one.get("dropped_places")).get(reason) or ()))]
        for name, one in sets.items()
        for reason, count in _mapping(one.get("rows_dropped")).items()
    ]
    if lost:
        yield Table(["set", "why", "rows", "for example"], lost, title="Rows that were dropped")
    else:
        yield Text("No row was dropped.")
    counts = [
        [name, str(token), number(_mapping(count).get("fed")), number(_mapping(count).get("supervised"))]
        for name, one in sets.items()
        for token, count in _mapping(one.get("new_tokens")).items()
    ]
    if counts:
        yield Table(["set", "token", "fed", "supervised"], counts, title="New tokens")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _lengths(value: Any) -> str:
    lengths = _mapping(value)
    return ", ".join(f"{name} {number(count)}" for name, count in lengths.items())


def _configuration(config: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the keys that differ from the default run's, then all."""
    if not config:
        return
    default, missing = default_config(), object()
    others = {key for key in filter(is_compared, config) if not is_same(config[key], default.get(key, missing))}
    rows = [[key, shown(config[key]), shown(default[key]) if key in default else "(no such key)"] for key in config]
    if others:
        those = [row for row in rows if row[0] in others]
        yield Table(["key", "this run", "default run"], those, title="What differs from the default run")
    else:
        yield Text("It is the default run.")
    marked = frozenset(number for number, row in enumerate(rows) if row[0] in others)
    yield Table(["key", "value"], [row[:2] for row in rows], f"All {len(rows):,} keys", marked, is_folded=True)


def default_config() -> dict[str, Any]:
    """Return the configuration of `python -m src.run`, by dotted keys."""
    from src.config.command_line import read_command_line
    from src.config.compose import compose

    line = read_command_line([])
    return dotted(compose(line.forced, line).stored)


def _provenance(found: Details) -> Iterator[Block]:
    if found.starts:
        rows = [[when(one["time"]), " ".join(map(str, one["command"]))] for one in found.starts]
        yield Table(["started", "command"], rows)
    known = dict(found.provenance)
    git = _mapping(known.pop("git", None))
    diff = git.get("diff")
    if git.get("commit"):
        yield Text(f"Commit {git['commit']}{', with changes' if git.get('dirty') else ', nothing changed'}.")
    if diff:
        yield Long("Changes since that commit", str(diff))
    for key, title in (("versions", "library"), ("hardware", "hardware"), ("data", "file"), ("plugins", "plugin")):
        if values := _mapping(known.get(key)):
            rows = [
                [str(name), value if isinstance(value, str) else json.dumps(value)] for name, value in values.items()
            ]
            yield Table([title, "version" if key == "versions" else "SHA-256" if key == "data" else "value"], rows)


def number(value: Any) -> str:
    """Return a number for people; other values as JSON has them, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e9 or value == 0 else f"{value:.4g}"
    return f"{value:,}" if is_number(value) else str(value)


def shown(value: Any) -> str:
    """Return a value of a configuration."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
