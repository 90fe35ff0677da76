"""Ensembles whose result is a model: the mean of members' weights, of all of them or of those that make it better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.checkpoint.exported import MODEL, exported_digests
from src.combining.members import Member, rows_seen
from src.combining.record import MemberScores, Outcome
from src.combining.soup import WeightSum
from src.combining.texts import report_dropped, report_left_out
from src.config.frozen import config_hash, read_config, read_status
from src.config.options import PROJECT_ROOT
from src.config.rules.checkpoint import DEFAULT_METRIC
from src.config.schema import EnsembleConfig, EnsembleMethod
from src.data.dataset import EvaluatedRows, build_evaluated, file_hashes
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.data.trained import RowHashes, without
from src.errors import DataError
from src.evaluation.answers import AnswerReader
from src.evaluation.evaluate import Evaluator
from src.evaluation.generate import Generator, check_generation
from src.evaluation.thoughts import thought_rule
from src.markdown import inline, table
from src.metrics import greater_is_better
from src.model.build import set_generation
from src.model.card import model_card
from src.model.export import export, load_exported, load_exported_adapter
from src.model.merging import merge, probe_ids
from src.records import read_json
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import StopRequest
from src.tracking.console import Console
from src.tracking.provenance import provenance
from src.tracking.run_folder import DATA_REPORT, PROVENANCE, SUMMARY, Start, open_run_folder
from src.training.head import ModelWithLoss
from src.util import plural

Scores = dict[str, float]


@dataclass(frozen=True)
class MemberScorer:
    """Loads members and scores models; `sets` are the rows that no member was trained on, where there are some."""

    members: Sequence[Member]
    tokenizer: Any
    rows: EvaluatedRows
    sets: Mapping[str, EncodedSet]
    runtime: Runtime
    console: Console

    @property
    def validation(self) -> dict[str, EncodedSet]:
        names = self.members[0].job.config.data.validation_names()
        return {name: rows for name, rows in self.sets.items() if name in names}

    @property
    def metric(self) -> str:
        """What greedy soup makes better."""
        job = self.members[0].job
        return job.entry_section.metric or job.config.checkpoint.metric_for_best_model

    @property
    def rises(self) -> bool:
        """Whether a higher value of that is better."""
        checkpoint = self.members[0].job.config.checkpoint
        if self.metric == checkpoint.metric_for_best_model and checkpoint.greater_is_better is not None:
            return checkpoint.greater_is_better
        return greater_is_better(self.metric)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many rows of each set are scored, and how many are left out: seen by a member, or dropped."""
        return {
            name: {
                "scored": len(rows),
                "left_out": len(self.rows.sets[name]) - len(rows),
                "dropped": self.rows.reports[name].rows_dropped.total(),
            }
            for name, rows in self.sets.items()
        }

    def is_new(self, name: str) -> bool:
        """Whether no member was trained on any row of a set."""
        return name in self.sets and len(self.sets[name]) == len(self.rows.sets[name])

    def load(self, member: Member) -> Any:
        """Load a member's whole model; an adapter is merged into its base first, as the mean of products is not the
        product of means.
        """
        self.runtime.check_stop()
        config, folder = member.job.config, member.run_dir / MODEL
        with self.console.work("loading", str(folder)):
            if not member.has_adapter:
                return load_exported(member.run_dir, config)
            ids = probe_ids(self.tokenizer, config.tokens.additional_special_tokens)
            return merge(load_exported_adapter(folder, config, self.runtime.device), folder, ids)

    def score(self, model: Any, sets: Mapping[str, EncodedSet]) -> Scores:
        """Return the losses and metrics of a model on sets, as a run has them."""
        config, encoder = self.members[0].job.config, self.rows.encoder
        model.to(self.runtime.device)
        set_generation(model, config.generation, self.tokenizer, self.rows.stop_ids, encoder.target_prefix)
        for one in sets.values() if config.metrics else ():
            check_generation(one, model, encoder.target_prefix, config.generation.max_new_tokens)
        loss_model = ModelWithLoss(model).to(self.runtime.device)
        loss_model.probe_head()
        reader, rule = (
            AnswerReader(encoder, config.thought_tags, self.rows.frame),
            thought_rule(encoder, config.generation),
        )
        size, pattern = config.training.per_device_eval_batch_size, config.data.answer_pattern
        prefix, shown = encoder.target_prefix, self.console
        generator = Generator(model, self.runtime, size, prefix, reader, rule, progress=shown)
        scored = (config.metrics, pattern, None, config.num_scored_samples, shown)
        return Evaluator(loss_model, generator, reader, self.runtime, *scored).evaluate(sets.values())


def combine_weights(
    members: Sequence[Member], hashes: RowHashes, output: Path, stop: StopRequest, console: Console
) -> Outcome:
    """Write the mean of members' weights as a finished run's folder, and score it and them.

    Members are loaded one after another; the sum takes eight bytes a weight besides. DataError where there is nothing
    to score on; ModelError where the weights don't fit.
    """
    job = members[0].job
    section: EnsembleConfig = job.entry_section
    precision, seed = job.config.training.mixed_precision, job.config.seed
    with start_runtime(job.config.runtime, precision, seed, stop) as runtime:
        scorer = _open_scorer(members, hashes, runtime, console)
        if is_greedy := section.method is EnsembleMethod.greedy_soup:
            _check_validation(scorer)
        scores = []
        for number, member in enumerate(members, 1):
            console.label("member", f"{number} of {len(members)}: {member.run_dir}")
            scores.append(scorer.score(scorer.load(member), scorer.sets))
        chosen = _greedy(scorer, scores) if is_greedy else list(range(len(members)))
        model = _mean(scorer, chosen)
        of_members = [MemberScores(member, scores[i], i in chosen) for i, member in enumerate(members)]
        outcome = Outcome(scorer.score(model, scorer.sets), of_members, scorer.counts())
        _write_run(scorer, model, output, outcome)
    return outcome


def _mean(scorer: MemberScorer, chosen: Sequence[int]) -> Any:
    """Return a model with the mean of members' weights."""
    total = WeightSum()
    for i in chosen:
        model = scorer.load(scorer.members[i])
        total.add(model)
    total.put_mean(model)
    return model


def _check_validation(scorer: MemberScorer) -> None:
    """Check that there are rows to choose members by; DataError names the sets, or says that all were trained on."""
    known, parts = scorer.members[0].job.config.data.validation_names(), scorer.metric.split("/")
    name = parts[1] if len(parts) == 3 else ""
    if name not in known:
        sets = ", ".join(known) or "none: data.validation_files=[FILE]"
        raise DataError(f"{scorer.metric} (ensemble.metric) is of no validation set; these are {sets}")
    if name not in scorer.sets:
        report_left_out(name, len(scorer.rows.sets[name]), 0, scorer.console, "data.validation_files")


def _greedy(scorer: MemberScorer, scores: Sequence[Scores]) -> list[int]:
    """Return the members whose mean is the best found on validation: added from the best one on, if that is better.

    DataError where the metric has no value. Source: Wortsman et al. 2022, recipe 1; here a member that changes nothing
    is left out.
    """
    metric, sign = scorer.metric, 1 if scorer.rises else -1
    if metric not in scores[0]:
        raise DataError(f"{metric} (ensemble.metric) has no value; there are {', '.join(scores[0])}")
    first, *others = sorted(range(len(scores)), key=lambda i: -sign * scores[i][metric])
    chosen, best, total = [first], scores[first][metric], WeightSum()
    total.add(scorer.load(scorer.members[first]))
    for i in others:
        model = scorer.load(scorer.members[i])
        total.put_mean(model, with_it=True)
        value = scorer.score(model, scorer.validation)[metric]
        is_better = sign * value > sign * best
        verdict = "added" if is_better else "left out"
        scorer.console.label("", f"{metric} {value:.6g} with {scorer.members[i].name}: {verdict}")
        if is_better:
            best = value
            chosen.append(i)
            total.add(scorer.load(scorer.members[i]))
    return chosen


def _open_scorer(members: Sequence[Member], hashes: RowHashes, runtime: Runtime, console: Console) -> MemberScorer:
    config = members[0].job.config
    tests, validations = config.data.test_sets(), config.data.validation_names()
    tokenizer, _ = load_tokenizer(config.model.pretrained_at(members[0].run_dir / MODEL), config.tokens)
    rows = build_evaluated(config, tokenizer, [*validations, *tests], console.working)
    sets, seen = dict[str, EncodedSet](), rows_seen(members, hashes, console.warn)
    for name, one in rows.sets.items():
        if name in tests:
            sets[name] = without(one, [seen.in_files(config.data, tests[name])])
            report_left_out(name, len(one), len(sets[name]), console)
        elif len(left := without(one, seen.in_validation(config.data, name))):
            sets[name] = left
            report_left_out(name, len(one), len(left), console, "data.validation_files")
    for name in sets:
        report_dropped(name, rows.reports[name].rows_dropped.total(), console)
    if not sets:
        raise DataError("nothing to score on that no member was trained on: name rows with data.test_files=[FILE]")
    return MemberScorer(members, tokenizer, rows, sets, runtime, console)


def _write_run(scorer: MemberScorer, model: Any, output: Path, outcome: Outcome) -> None:
    """Write and verify model/, and what else makes the folder a finished run's."""
    first, method = scorer.members[0], scorer.members[0].job.entry_section.method.value
    config, frozen = first.job.config, read_config(first.run_dir)
    frozen["name"] += f"-{method}"
    _drop_seen_validation(frozen, scorer)
    if first.has_adapter:
        frozen["export"]["merge"] = True  # its weights are whole now
    of_data = read_json(first.run_dir / DATA_REPORT) if (first.run_dir / DATA_REPORT).is_file() else {}
    made_of = provenance(frozen, file_hashes(config.data), scorer.runtime.description, PROJECT_ROOT)
    vocabulary = scorer.tokenizer.get_vocab()
    new_tokens = {token: vocabulary[token] for token in config.tokens.additional_special_tokens}
    count = sum(one.is_in for one in outcome.members)
    about = f"These weights are the mean of {plural(count, 'run')}, listed below; all else is said of the first one."
    card = model_card(frozen, of_data, outcome.scores, made_of, new_tokens, about=about) + _members_in_card(outcome)
    with open_run_folder(output, frozen, config_hash(frozen), Start()) as folder:
        folder.step = read_status(first.run_dir)["step"]  # so that no run is begun where it is finished
        folder.write_json(DATA_REPORT, of_data)
        folder.write_json(PROVENANCE, made_of)
        for warning in export(model.to("cpu"), None, scorer.tokenizer, output / MODEL, config, card):
            scorer.console.warn(warning)
        folder.write_json(SUMMARY, outcome.scores)
        folder.set_status(model=exported_digests(output / MODEL))


def _drop_seen_validation(frozen: dict[str, Any], scorer: MemberScorer) -> None:
    """Leave in a soup's configuration only the validation sets of which no member was trained on any row.

    What its first member held out of train, the others were trained on: nobody is to evaluate a soup on it.
    """
    data = scorer.members[0].job.config.data
    files = {name: list(files) for name, files in data.validation_sets().items() if scorer.is_new(name)}
    split = data.validation_split if data.has_hub_validation and scorer.is_new("validation") else None
    held_out = {"num_folds": None, "fold": None, "group_column": None, "validation_fraction": 0.0}
    frozen["data"] |= held_out | {"validation_files": files or None, "validation_split": split}
    if data.is_held_out or not all(map(scorer.is_new, data.validation_names())):  # what chose the best of a run by them
        frozen["training"] |= {"early_stopping_patience": None}
        frozen["checkpoint"] |= {"metric_for_best_model": DEFAULT_METRIC, "load_best_model_at_end": False}


def _members_in_card(outcome: Outcome) -> str:
    """Return the part of a model card that lists members with their scores."""
    names = list(outcome.scores)
    rows = [
        [
            inline(Path(one.member.name).name),
            "yes" if one.is_in else "no",
            *(f"{one.scores[name]:.4g}" for name in names),
        ]
        for one in outcome.members
    ]
    count = sum(one.is_in for one in outcome.members)
    about = f"The weights are the mean of {plural(count, 'run')}, scored on rows that none of them was trained on."
    return f"\n## Members\n\n{about}\n\n{table(['run', 'is in it', *map(inline, names)], rows)}\n"
