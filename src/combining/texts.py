"""Ensembles whose result is texts: the consensus of what members predict, and the mean of their probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.combining.consensus import most_alike, similarity_by
from src.combining.members import Member, best_first, rows_seen
from src.combining.record import MEMBERS, PREDICTIONS, MemberScores, Outcome
from src.config.job import Job
from src.data.sources import hash_of
from src.data.trained import RowHashes, without
from src.errors import DamagedFileError, DataError, RunFolderError
from src.evaluation.predicted_set import SAMPLES, PredictedSet, Prediction, score_lines
from src.evaluation.predicting import finish, open_generation, predict_sets
from src.evaluation.predictions import open_sets, predict_rows, row_numbers
from src.metrics import METRICS
from src.runtime.signals import StopRequest
from src.tracking.console import Console
from src.util import in_words

Lines = dict[int, dict[str, Any]]  # predictions by the number of their row


@dataclass(frozen=True)
class UnseenRows:
    """The rows of the test sets that no member was trained on."""

    are_seen: Mapping[str, Sequence[bool]]  # of each row of a set

    def numbers(self, name: str) -> list[int]:
        return [number for number, is_seen in enumerate(self.are_seen[name]) if not is_seen]

    def counts(self, name: str, scored: int) -> dict[str, int]:
        """Return how many rows of a set were scored, and how many were left out: seen, or dropped, by a member."""
        num_left = len(self.numbers(name))
        return {"scored": scored, "left_out": len(self.are_seen[name]) - num_left, "dropped": num_left - scored}


def unseen_tests(members: Sequence[Member], hashes: RowHashes, console: Console) -> UnseenRows:
    """Return the rows to score on; DataError where none is left of a set. Rows that are left out are reported."""
    data = members[0].job.config.data
    sets = data.test_sets()
    if not sets:
        raise DataError("there are no rows to combine texts of: data.test_files=[FILE]")
    seen = rows_seen(members, hashes, console.warn)
    rows = UnseenRows({name: seen.in_files(data, files) for name, files in sets.items()})
    for name in sets:
        report_left_out(name, len(rows.are_seen[name]), len(rows.numbers(name)), console)
    return rows


def report_left_out(name: str, num_rows: int, num_left: int, console: Console, key: str = "data.test_files") -> None:
    """Say how many rows of a set a member has been trained on; DataError where none is left. `key` names the set."""
    if not num_left:
        raise DataError(
            f"{name}: each of its {num_rows:,} rows was trained on by a member, so none of them can judge: name others "
            f"with {key}=[FILE]"
        )
    if num_left < num_rows:
        console.warn(f"{name}: {num_rows - num_left:,} of {num_rows:,} rows are left out: a member was trained on them")


def report_dropped(name: str, num_dropped: int, console: Console) -> None:
    """Say how many rows of a set are not scored because they could not be encoded for every member."""
    if num_dropped:
        are = "row is" if num_dropped == 1 else "rows are"
        console.warn(f"{name}: {num_dropped:,} {are} not scored: a member drops them, as too long, empty or malformed")


def predict_members(
    members: Sequence[Member], rows: UnseenRows, output: Path, stop: StopRequest, console: Console
) -> dict[str, list[Lines]]:
    """Return each member's predictions of the rows to score on, by set; those that are whole somewhere are not made
    again.
    """
    lines: dict[str, list[Lines]] = {name: [] for name in rows.are_seen}
    for number, member in enumerate(members, 1):
        console.label("member", f"{number} of {len(members)}: {member.run_dir}")
        found = _predicted(member) or predict_sets(member.job, output / MEMBERS / str(number), stop, console)
        for name, one in found.items():
            chosen = set(rows.numbers(name))
            lines[name].append({line["row"]: line for line in one.read() if line["row"] in chosen})
    return lines


def _predicted(member: Member) -> dict[str, PredictedSet]:
    """Return what src.predict made of these sets in a run's own folder; nothing unless all of it is there as asked."""
    job = member.job
    try:
        found = open_sets(
            job.run_dir / PREDICTIONS, replace(job.config, force=False), job.frozen, job.run_dir / "model"
        )
    except (RunFolderError, DamagedFileError):  # other predictions, which are left as they are
        return {}
    return found if all(one.is_generated() for one in found.values()) else {}


def combine_consensus(
    members: Sequence[Member], rows: UnseenRows, output: Path, stop: StopRequest, console: Console
) -> Outcome:
    """Write for each row the text most like all others that members predict; of several the best member's."""
    job = _with_metrics_of_one_text(members[0].job)
    similarity = similarity_by(job.entry_section.similarity, job.config.data.answer_pattern)
    order = best_first(members)
    predicted, sets = predict_members(members, rows, output, stop, console), dict[str, PredictedSet]()
    for name, lines in predicted.items():
        common = _common_rows(name, lines)
        sets[name] = one = _open_set(output, name, members)
        if one.resume(common, len(common)) < len(common):
            chosen = []
            with console.work("comparing", name, len(common)) as advance:
                for row in common:
                    candidates = [text for place in order for text in _texts(lines[place][row])]
                    chosen.append(candidates[most_alike([line["answer"] for line in candidates], similarity)])
                    advance()
            one.append([Prediction(**line) for line in chosen])
        finish(one, job, console)
    return _outcome(job, members, rows, predicted, sets, console)


def _texts(line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the line of a row for each text that a member wrote for it: all of its samples."""
    return [line | {SAMPLES: None} | sample for sample in line.get(SAMPLES, [{}])]


def _with_metrics_of_one_text(job: Job) -> Job:
    """Return a job without the metrics that need several samples of a row: a consensus is one text."""
    names = [name for name in job.config.metrics if METRICS[name].min_samples == 1]
    evaluation = replace(job.config.evaluation, metrics=names)
    return replace(job, config=replace(job.config, evaluation=evaluation))


def differing_generation(members: Sequence[Member]) -> str:
    """Return the keys of generation that members have other values of; '' where there is none."""
    first, *others = (vars(member.job.config.generation) for member in members)
    return in_words(f"generation.{key}" for key in first if any(one[key] != first[key] for one in others))


def combine_probabilities(
    members: Sequence[Member], rows: UnseenRows, output: Path, stop: StopRequest, console: Console
) -> Outcome:
    """Generate each row by the mean of the members' probabilities; all of them are in memory at once."""
    job = members[0].job
    num_samples = job.config.generation.num_return_sequences
    if names := differing_generation(members):
        console.warn(f"members generate otherwise ({names}): together they do as {job.run_dir}, or as given on top")
    predicted = predict_members(members, rows, output, stop, console)
    sets = {name: _open_set(output, name, members) for name in rows.are_seen}
    if not all(one.is_generated() for one in sets.values()):
        with open_generation([member.job for member in members], stop, console) as (generator, prompts):
            for name, one in sets.items():
                left = without(prompts.sets[name], [rows.are_seen[name]])
                predict_rows(one, left, generator, job.config.seed, num_samples, console, numbers=row_numbers(left))
    for one in sets.values():
        finish(one, job, console)
    return _outcome(job, members, rows, predicted, sets, console)


def _common_rows(name: str, lines: Sequence[Lines]) -> list[int]:
    common = sorted(set.intersection(*(set(of_member) for of_member in lines)))
    if not common:
        raise DataError(
            f"{name}: no row is left that all members can be asked: each leaves out what is too long for it"
        )
    return common


def _open_set(output: Path, name: str, members: Sequence[Member]) -> PredictedSet:
    """Open a set of the ensemble's predictions; what decides it was compared by ensemble.json."""
    folder = output / PREDICTIONS
    folder.mkdir(exist_ok=True)
    one = PredictedSet(folder, name, {"ensemble": hash_of([member.decided_by() for member in members])})
    if changed := one.claim(force=False):
        raise RunFolderError("\n  ".join([f"{one.lines} holds predictions that something else decided:", *changed]))
    one.check_unchanged()
    return one


def _outcome(
    job: Job,
    members: Sequence[Member],
    rows: UnseenRows,
    predicted: Mapping[str, Sequence[Lines]],
    sets: Mapping[str, PredictedSet],
    console: Console,
) -> Outcome:
    """Score the ensemble and its members on the rows that all of them have predicted, by the metrics of a job."""
    scores: dict[str, float] = {}
    of_members: list[dict[str, float]] = [{} for _ in members]
    counts = {}
    for name, one in sets.items():
        chosen = list(one.read())
        counts[name] = rows.counts(name, len(chosen))
        report_dropped(name, counts[name]["dropped"], console)
        scores |= _scores(name, chosen, job)
        for found, lines in zip(of_members, predicted[name], strict=True):
            found |= _scores(name, [lines[line["row"]] for line in chosen if line["row"] in lines], job)
    return Outcome(scores, [MemberScores(*pair) for pair in zip(members, of_members, strict=True)], counts)


def _scores(name: str, lines: Sequence[Mapping[str, Any]], job: Job) -> dict[str, float]:
    values, _ = score_lines(lines, job.config)
    return {f"eval/{name}/{metric}": value for metric, value in values.items()}
