"""A set evaluated by views: what is missing of its files is computed, a few batches at a time, and summed up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.config.schema import RunConfig
from src.data.dataset import EvaluatedRows
from src.data.paired import OWN, PairedRows, Tags, View
from src.data.sets import EncodedSet
from src.data.views import answer_mask
from src.errors import DataError, NonFiniteLossError
from src.evaluation.answers import AnswerReader
from src.evaluation.evaluated_set import EvaluatedSet, OwnThoughts
from src.evaluation.generate import Generator
from src.evaluation.predicted_set import score_lines
from src.evaluation.predictions import blocks, predict_rows
from src.evaluation.scores import RowScore, row_score, view_metrics
from src.evaluation.scoring import Scorer, TokenNll, write_thoughts
from src.tracking.console import Console


@dataclass(frozen=True)
class Models:
    """One model: as it is scored, as it answers prompts, and as it writes its thoughts."""

    scorer: Scorer
    generator: Generator
    writer: Generator


def pair_rows(
    rows: EvaluatedRows, name: str, bare: EncodedSet | None, views: Sequence[str], config: RunConfig, tokenizer: Any
) -> PairedRows:
    """Choose the rows of a set that every view has; DataError where none is left."""
    gold, tags = rows.sets[name], config.thought_tags
    opened, closed = (-1, -1) if tags is None else tokenizer.convert_tokens_to_ids(list(tags))
    ends = dict(zip(rows.stop_ids, tokenizer.convert_ids_to_tokens(rows.stop_ids), strict=True))
    most = config.data.max_target_length if gold.is_encoder_decoder else config.data.max_seq_length
    paired = PairedRows(gold, bare, views, Tags(tags, (opened, closed), ends), most)
    paired.left_out.update(rows.reports[name].rows_dropped)
    paired.choose(min(len(gold), config.evaluation.max_samples or len(gold)), config.seed)
    check_left(paired)
    return paired


def check_left(paired: PairedRows) -> None:
    """Raise DataError where every row of a set is left out."""
    if not paired.kept:
        raise DataError(
            f"{paired.gold.name}: every row is left out of the views {', '.join(paired.views)}: {paired.reasons()}; "
            "choose fewer views (evaluate.views=[gold]), or a larger data.max_seq_length"
        )


def evaluate_set(
    files: EvaluatedSet, paired: PairedRows, config: RunConfig, load_models: Callable[[], Models], console: Console
) -> None:
    """Compute what is missing of a set: the model's own thoughts, the scores of each view, and generated answers.

    Interrupted, where a signal asked for it; whole blocks are on the disk.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    if OWN in paired.views:
        if not files.thoughts.is_generated():
            _write_own(files, paired, load_models(), config, console)
        paired.keep({line["row"]: line["ids"] for line in files.thoughts.read()})
        check_left(paired)
    for view in paired.views:
        if not files.views[view].is_generated():
            _score_view(files, View(paired, view), load_models(), console)
    if config.metrics and not files.predictions.is_generated():
        generator, num_samples = load_models().generator, config.num_scored_samples
        predict_rows(files.predictions, paired.gold, generator, config.seed, num_samples, console, paired.kept)


def _write_own(files: EvaluatedSet, paired: PairedRows, models: Models, config: RunConfig, console: Console) -> None:
    """Write the model's own thoughts, each of at most generation.max_thought_tokens; where that is null, of as many as
    the longest thought of the rows has.
    """
    rows, stop_ids, budget = paired.kept, list(paired.tags.ends), config.generation.max_thought_tokens
    budget = paired.longest_thought() if budget is None else budget
    for block in blocks(files.thoughts, rows, models.writer.batch_size, console):
        indices = [rows[place] for place in block]
        written = write_thoughts(paired, indices, models.writer, budget, stop_ids, config.seed)
        files.thoughts.append(
            [
                OwnThoughts(i, paired.gold.place(i), thoughts, num_cut)
                for i, (thoughts, num_cut) in zip(indices, written, strict=True)
            ]
        )


def _score_view(files: EvaluatedSet, view: View, models: Models, console: Console) -> None:
    rows = view.paired.kept
    for block in blocks(files.views[view.name], rows, models.scorer.batch_size, console):
        indices = [rows[place] for place in block]
        scored = models.scorer.score(view, indices)
        reader = models.generator.reader
        assert reader is not None
        lines = [_line(view, i, one, reader) for i, one in zip(indices, scored, strict=True)]
        files.views[view.name].append(lines)


def _line(view: View, index: int, scored: TokenNll, reader: AnswerReader) -> RowScore:
    """Return the line of a row; NonFiniteLossError where its loss is no number."""
    paired, place, is_thought = view.paired, view.paired.gold.place(index), scored.is_thought
    if not np.isfinite(scored.nll).all():
        raise NonFiniteLossError(f"{place}: the loss of this row is not finite: the weights are broken")
    thoughts, num_bytes = None, paired.num_bytes(view.name, index)
    if paired.tags.texts is None and paired.gold.is_rendered(index):  # the template itself may write a thought
        sizes = [stop - start for _, start, stop in view[index].spans.tolist()]
        is_thought, num_thought_bytes = reader.template_thoughts(scored.targets, sizes)
        num_bytes -= num_thought_bytes
    if view.name == OWN:
        thoughts = [reader.encoder.decode(ids[1:-1]) for ids in paired.own[index]]
    is_answer = answer_mask(scored.targets, is_thought, list(paired.tags.ends))
    return row_score(index, place, scored.nll, is_thought, is_answer, num_bytes, thoughts)


def set_metrics(files: EvaluatedSet, views: Sequence[str], config: RunConfig) -> dict[str, float]:
    """Compute the metrics of a set that is whole: `evaluate/<set>/<view>/…`, and of generated answers, which have no
    view, `evaluate/<set>/<metric>`.
    """
    values: dict[str, float] = {}
    for view in views:
        scores = view_metrics(files.views[view].read())
        if view == OWN:
            written = list(files.thoughts.read())
            num_thoughts = sum(len(line["ids"] or []) for line in written)
            scores["thoughts_cut"] = sum(line["num_cut"] for line in written) / max(1, num_thoughts)
            num_tokens = sum(len(thought) - 2 for line in written for thought in line["ids"] or [])  # without the tags
            scores["thought_tokens"] = num_tokens / max(1, num_thoughts)
        values |= {f"evaluate/{files.name}/{view}/{name}": value for name, value in scores.items()}
    if config.metrics:
        generated, _ = score_lines(list(files.predictions.read()), config)
        values |= {f"evaluate/{files.name}/{name}": value for name, value in generated.items()}
    return values
