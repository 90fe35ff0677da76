"""Findings on the prepared data, each with a level. An error means: do not train on this."""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np

from src.config.schema import Batching, RunConfig
from src.data.advice import Finding, Level, advice
from src.data.batching_choice import padding
from src.data.chat_render import CHANGED, MISSING, squeezed
from src.data.dataset import Data
from src.data.encoding import IGNORE_INDEX, Encoder
from src.data.report import changed_rows
from src.data.sets import EncodedSet, LabelledRow
from src.evaluation.answers import AnswerReader, cut_at
from src.metrics import METRICS, is_full_marks
from src.model.embeddings import InitialisedRows
from src.patterns import at
from src.tokens import ConfiguredTokens
from src.training.optim import warmup_warnings
from src.training.state import build_batch_sampler
from src.util import plural

MOST_CHECKED_ROWS = 50_000
"""The first rows of a set, which are decoded and encoded again to check its mask."""

ROWS_AT_ONCE = 2000  # that are decoded in one batch

MANY_TRUNCATED = 0.05  # share of rows
MUCH_PADDING = 0.2  # share of positions
FEW_STEPS = 20


@dataclass
class Proof:
    """What decoding and encoding the rows again found.

    `unlike` are the rows whose ids do not decode to their text, `wrong_mask` those whose supervised ids do not decode
    to the text that is to be supervised (in a chat: of every turn), `seams` those that tokenise otherwise in one piece,
    `altered` those of whose messages the chat template leaves out or changes one. `low_scoring` are rows whose own
    answer, decoded from what they teach and cut where generation stops, gets less than full marks against their
    reference, with the metric, that answer and the reference; `unscorable` counts the references by metrics that can't
    score them. Cut rows are not looked at.
    """

    num_checked: int
    num_cut: int = 0
    unlike: list[int] = field(default_factory=list)
    wrong_mask: list[int] = field(default_factory=list)
    seams: list[int] = field(default_factory=list)
    altered: list[int] = field(default_factory=list)
    low_scoring: list[tuple[int, str, str, str]] = field(default_factory=list)
    unscorable: Counter[str] = field(default_factory=Counter)
    num_with_end: int = 0  # rows in which a token that ends generation is supervised


@dataclass(frozen=True)
class AnswerScorer:
    """How answers are read and scored, and where generation stops."""

    reader: AnswerReader
    stop_ids: list[int]
    metrics: Sequence[str]
    answer_pattern: str | None


def answer_scorer(config: RunConfig, data: Data) -> AnswerScorer:
    """Return how a run scores answers; one without metrics is scored by exact match of the whole answer."""
    reader = AnswerReader(data.encoder, config.thought_tags, data.frame)
    pattern = config.data.answer_pattern if config.metrics else None
    return AnswerScorer(reader, data.stop_ids, config.metrics or ["exact_match"], pattern)


class SupervisedIds(NamedTuple):
    """The ids of a row, or of an encoder-decoder's target, and where the supervised ones are."""

    ids: list[int]
    parts: list[tuple[int, int]]  # [start, stop) of supervised ids that follow one another

    @classmethod
    def of(cls, row: LabelledRow, num_prompt_ids: int) -> Self:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row.labels != IGNORE_INDEX, [False]]).astype(np.int8)))
        if len(edges) and row.target_ids is None and not num_prompt_ids:
            edges[0] = 0  # no id comes before the first to predict it from: it has no label
        parts = [(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]
        return cls((row.input_ids if row.target_ids is None else row.target_ids).tolist(), parts)

    @property
    def last(self) -> list[int]:
        """The last supervised ids: what a model should generate for the row."""
        return self.ids[slice(*self.parts[-1])] if self.parts else []


def prove(rows: EncodedSet, scorer: AnswerScorer) -> Proof:
    """Check that rows decode to their text and their answers to their references, and that their text, encoded in one
    piece, has their ids."""
    encoder, stop_ids = scorer.reader.encoder, set(scorer.stop_ids)
    proof, prompt_lengths = Proof(min(len(rows), MOST_CHECKED_ROWS)), rows.prompt_lengths().tolist()
    for start in range(0, proof.num_checked, ROWS_AT_ONCE):
        indices = range(start, min(start + ROWS_AT_ONCE, proof.num_checked))
        each = {i: rows[i] for i in indices}
        supervised = {i: SupervisedIds.of(row, prompt_lengths[i]) for i, row in each.items()}
        proof.num_with_end += sum(not stop_ids.isdisjoint(row.last) for row in supervised.values())
        complete = [i for i in indices if not rows.is_truncated(i)]
        proof.num_cut += len(indices) - len(complete)
        unlike = set(changed_rows(rows, complete, encoder))
        proof.unlike += sorted(unlike)
        learned = [i for i in complete if each[i].weight]  # of a row of weight 0 nothing is supervised
        same = [i for i in learned if i not in unlike]
        decoded = zip(same, decode_supervised([supervised[i] for i in same], encoder), strict=True)
        proof.wrong_mask += [i for i, text in decoded if not _matches_supervised_text(text, rows, i, encoder.eos_token)]
        if not rows.is_encoder_decoder:
            proof.seams += _seams(rows, complete, encoder)
        proof.altered += [i for i in indices if any(text.endswith((MISSING, CHANGED)) for text in rows.changes(i))]
        _score_answers(rows, {i: supervised[i].last for i in learned}, scorer, proof)
    return proof


def _matches_supervised_text(text: str, rows: EncodedSet, index: int, eos: str) -> bool:
    """Return whether a decoded text is what should be supervised in a row; in a chat, white space may differ."""
    wanted = rows.supervised_text(index)
    if text in (wanted, wanted + eos):
        return True
    return rows.is_rendered(index) and squeezed(text) in (squeezed(wanted), squeezed(wanted) + eos)


def _score_answers(rows: EncodedSet, supervised: Mapping[int, list[int]], scorer: AnswerScorer, proof: Proof) -> None:
    """Score what rows teach, cut where generation would stop, against their references."""
    reader, pattern = scorer.reader, scorer.answer_pattern
    cut = [reader.cut(cut_at(ids, scorer.stop_ids)) for ids in supervised.values()]
    texts = reader.encoder.decode_batch([one.ids for one in cut])
    for i, text in zip(supervised, texts, strict=True):
        answer, reference = reader.answer(rows, i, text), reader.plain_reference(rows, i)
        if answer != reference:
            reference = reader.reference(rows, i)
        with at(rows.place, i):
            for metric in scorer.metrics:
                if is_full_marks(metric, answer, reference, pattern):
                    continue
                if METRICS[metric].can_score(reference, pattern):
                    proof.low_scoring.append((i, metric, answer, reference))
                    break
                proof.unscorable[metric] += 1


def decode_supervised(rows: Sequence[SupervisedIds], encoder: Encoder) -> list[str]:
    """Decode what is supervised in each row, EOS included.

    Each part is what the ids up to its end say, less what those up to its beginning say, since some tokenizers decode a
    text otherwise where it begins.
    """
    before = encoder.decode_batch([ids[:start] for ids, parts in rows for start, _ in parts], with_control=True)
    until = encoder.decode_batch([ids[:stop] for ids, parts in rows for _, stop in parts], with_control=True)
    texts = iter(end.removeprefix(begin) for begin, end in zip(before, until, strict=True))
    return ["".join(islice(texts, len(row.parts))) for row in rows]


def _seams(rows: EncodedSet, indices: Sequence[int], encoder: Encoder) -> list[int]:
    """Return the rows that are other tokens when their text is tokenised in one piece."""
    found = []
    for is_rendered in (False, True):
        some = [i for i in indices if rows.is_rendered(i) == is_rendered]
        texts = [rows.prompt(i) + rows.completion(i) for i in some]
        for i, together in zip(some, encoder.encode_texts(texts, is_rendered=is_rendered), strict=True):
            ids = rows[i].input_ids.tolist()
            if together not in (ids[: len(together)], ids[1 : 1 + len(together)]):  # with BOS in the text, or before it
                found.append(i)
    return sorted(found)


def findings(
    config: RunConfig, data: Data, tokenizer: Any, train: EncodedSet, proofs: Mapping[str, Proof], num_steps: int
) -> list[Finding]:
    """Return everything worth knowing before this is trained."""
    sets = {"train": train, **data.validation, **data.test}
    return [
        *_about_masks(sets, proofs),
        *_about_answers(sets, proofs),
        *advice(config, data, tokenizer),
        *(Finding(Level.warning, text) for text in warmup_warnings(config.scheduler, num_steps)),
        *_about_control_tokens(data),
        *_about_rows(config, data, train),
        *_about_batches(config, train, num_steps),
    ]


def about_initialised_rows(new: ConfiguredTokens, initialised: InitialisedRows) -> list[Finding]:
    """Return a note on the tokens that the checkpoint knows by name only."""
    untrained = [token for token in new.existing if token in initialised.ids]
    if not untrained:
        return []
    text = f"{', '.join(untrained)}: in the tokenizer, but never trained in the checkpoint; initialised as a new token"
    return [Finding(Level.note, text)]


def _about_masks(sets: Mapping[str, EncodedSet], proofs: Mapping[str, Proof]) -> Iterator[Finding]:
    for name, proof in proofs.items():
        rows = sets[name]
        if proof.wrong_mask:
            text = f"{name}: in {_rows(len(proof.wrong_mask))} the supervised ids do not decode to the text to "
            yield Finding(Level.error, f"{text}supervise: {_places(rows, proof.wrong_mask)}")
        if proof.unlike:
            text = f"{name}: {_rows(len(proof.unlike))} of {proof.num_checked:,} come back changed from the tokenizer"
            yield Finding(Level.warning, f"{text} (it can't write all of them): {_places(rows, proof.unlike)}")
        if not proof.num_with_end:
            text = f"{name}: no row teaches the model to stop: none ends with a supervised EOS or end of turn"
            why = "all are cut" if rows.total("is_truncated") == len(rows) else "does the chat template mark it?"
            yield Finding(Level.error if name == "train" else Level.warning, f"{text} ({why})")
        if proof.seams:
            text = f"{name}: {_rows(len(proof.seams))} would be other tokens if prompt and completion were tokenised"
            text += " together; apart, as here, is what generation sees"
            yield Finding(Level.note, f"{text}: {_places(rows, proof.seams)}")


def _about_answers(sets: Mapping[str, EncodedSet], proofs: Mapping[str, Proof]) -> Iterator[Finding]:
    for name, proof in proofs.items():
        if proof.low_scoring:
            row, metric, answer, reference = proof.low_scoring[0]
            text = f"{name}: of {_rows(len(proof.low_scoring))} even what they teach gets less than full marks"
            example = f"{sets[name].place(row)} by {metric}: {_short(answer)} against {_short(reference)}"
            yield Finding(Level.warning, f"{text} ({example})")
        for metric, count in proof.unscorable.items():
            text = f"{name}: {metric} can't score {_rows(count)}: their references are too short for it, or lack"
            yield Finding(Level.note, f"{text} what it compares, so nothing gets full marks there")


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _about_control_tokens(data: Data) -> Iterator[Finding]:
    for name, report in data.reports.items():
        if report.control_tokens_as_text:
            text = f"{name}: BOS, EOS or pad occur in texts {report.control_tokens_as_text:,} time(s); they stay text"
            yield Finding(Level.note, text)


def _about_rows(config: RunConfig, data: Data, train: EncodedSet) -> Iterator[Finding]:
    for name, report in data.reports.items():
        share = report.rows_truncated / max(1, report.rows_kept)
        if share:
            level = Level.warning if share > MANY_TRUNCATED else Level.note
            limit = f"data.max_seq_length = {config.data.max_seq_length}"
            yield Finding(level, f"{name}: {_rows(report.rows_truncated)} ({share:.1%}) are cut at {limit}")
        for reason, count in report.rows_dropped.items():
            if reason in ("too_long", "no_supervised_token", "malformed_thoughts"):
                places = ", ".join(report.dropped_places[reason][:3])
                yield Finding(Level.warning, f"{name}: {_rows(count)} dropped, {reason.replace('_', ' ')}: {places}")
        if report.rows_cleaned:
            yield Finding(Level.note, f"{name}: data.clean_dialogue changes {_rows(report.rows_cleaned)}")
    in_train = set(row_checksums(train))
    if doubles := len(train) - len(in_train) - data.reports["train"].rows_repeated:
        are = "is" if doubles == 1 else "are"
        yield Finding(Level.note, f"train: {_rows(doubles)} {are} exactly like an earlier one")
    for rows in [*data.validation.values(), *data.test.values()]:
        if leaked := [i for i, one in enumerate(row_checksums(rows)) if one in in_train]:
            text = f"{rows.name}: {_rows(len(leaked))} of {len(rows):,} also in train: its score says little"
            yield Finding(Level.warning, f"{text} ({_places(rows, leaked)})")
    if not data.validation:
        keys = "data.validation_files or data.validation_fraction"
        yield Finding(Level.note, f"there is no validation set: overfitting would not be seen ({keys})")
    if data.uses_fallback_template:
        text = "the tokenizer has no chat template; Towline's plain one is used, and saved with the model"
        yield Finding(Level.note, text)


def _about_batches(config: RunConfig, train: EncodedSet, num_steps: int) -> Iterator[Finding]:
    sampler = build_batch_sampler(config, train, config.runtime.world_size)
    ways = [Batching.padded, Batching.length_grouped] + [Batching.packed] * (not train.is_encoder_decoder)
    wasted = {way: padding(train, replace(sampler, batching=way), config.seed) for way in ways}
    now = wasted.pop(sampler.batching)
    others = ", ".join(f"{share:.0%} with {batching.value}" for batching, share in wasted.items())
    if not sampler.is_padding_free and now > MUCH_PADDING and min(wasted.values()) < now / 2:
        yield Finding(Level.note, f"{now:.0%} of what is computed is padding; it would be {others} (data.batching)")
    if num_steps < FEW_STEPS:
        text = f"only {plural(num_steps, 'optimizer step')}: a smaller batch or more epochs make more"
        yield Finding(Level.note, text)


def row_checksums(rows: EncodedSet) -> list[tuple[int, int]]:
    """Return two checksums of each row's ids, to find equal rows by."""
    found = []
    for row in map(rows.__getitem__, range(len(rows))):
        ids = row.input_ids.tobytes() + b"|" + (b"" if row.target_ids is None else row.target_ids.tobytes())
        found.append((zlib.crc32(ids), zlib.adler32(ids)))
    return found


_rows = partial(plural, noun="row")


def _places(rows: EncodedSet, indices: list[int]) -> str:
    more = f", … ({len(indices) - 3:,} more)" if len(indices) > 3 else ""
    return ", ".join(map(rows.place, indices[:3])) + more
