"""With everything on that the settings have for thoughts: what is fed and what is learned is what they say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from src.config.schema import Batching, RunConfig, Side, ThoughtSchedule
from src.data.batching import Batch, Position, collate, windows
from src.data.dataset import build_data
from src.data.encoding import IGNORE_INDEX, PARTS
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.training.loss import compute_losses, sum_of_weights, supervised_positions
from src.training.state import build_batch_sampler
from tests.conftest import admitted, write_lines

OPEN, CLOSE, GONE = "<", ">", "\0"
"""What stands for the tags in texts here, and for a thought that is left out."""
TAGS = ("<ToW>", "</ToW>")
SPELLED = {"<ToW>": OPEN, "</ToW>": CLOSE, "<s>": "^", "</s>": "$"}


@dataclass(frozen=True)
class Text:
    """A row: its prompt, its words and thoughts (with OPEN before them), what separates these, and its weight."""

    prompt: str
    pieces: tuple[str, ...]
    separators: tuple[str, ...]
    weight: float

    def spelled(self, tags: tuple[str, str]) -> str:
        """Return the completion as the data has it."""
        opening, closing = tags
        return self.joined([f"{opening}{p[1:]}{closing}" if p[0] == OPEN else p for p in self.pieces])

    def joined(self, pieces: Sequence[str]) -> str:
        return pieces[0] + "".join(s + piece for s, piece in zip(self.separators, pieces[1:], strict=True))


@dataclass(frozen=True)
class Settings:
    """What is chosen for a run, and the epoch that is looked at."""

    dropout: float
    per_epoch: int | None
    side: Side
    smoothing: float
    weights: tuple[float, ...]  # of a thought, its opening and its closing tag, and of the token after it
    batching: Batching
    batch_size: int
    length: int
    seed: int
    tags: tuple[str, str]
    epoch: int

    def outcomes(self, thought: str) -> set[str]:
        """Return what a thought may be in the epoch."""
        gone, size = self.epoch * (self.per_epoch or 0), len(thought)
        is_drawn = bool(self.per_epoch and self.smoothing)
        counts = [n for n in range(gone, gone + size + 1 if is_drawn else gone + 1) if n < size or not n]
        kept = {thought[n:] if self.side is Side.left else thought[: size - n] for n in counts}
        found = {f"{OPEN}{inner}{CLOSE}" for inner in kept} if self.dropout < 1 else set()
        return found | ({GONE} if 0 < gone >= size or is_drawn or self.dropout else set())

    def completions(self, text: Text) -> Iterator[str]:
        """Yield what a row's completion may be in the epoch."""
        choices = [self.outcomes(piece[1:]) if piece[0] == OPEN else {piece} for piece in text.pieces]
        yield from (without_gone(text.joined(chosen), is_first=not text.prompt) for chosen in product(*choices))


def without_gone(text: str, *, is_first: bool) -> str:
    """Return a text without what is gone: of the spaces around it one stays, at the end and at the beginning none."""

    def gap(found: re.Match[str]) -> str:
        is_edge = found.end() == len(text) or (found.start() == 0 and is_first)
        return "" if is_edge or " " not in found[0] else " "

    return re.sub(f" ?(?:{GONE} ?)+", gap, text)


def parts_of(completion: str) -> list[str]:
    """Return the part of each character."""
    parts, is_inside, before = list[str](), False, ""
    for character in completion:
        is_inside = (is_inside or character == OPEN) and character != CLOSE
        after = "after_thought" if before == CLOSE else "answer"
        parts.append({OPEN: "thought_open", CLOSE: "thought_close"}.get(character, "thought" if is_inside else after))
        before = character
    return parts


WORDS, THOUGHTS = some.text("abc", min_size=1, max_size=3), some.text("xyz", max_size=4).map(lambda text: OPEN + text)
WEIGHTS = some.sampled_from([0.0, 0.5, 1.0, 3.0])


@some.composite
def texts(draw: Any) -> Text:
    """Draw a row with 0 to 4 thoughts."""
    thoughts = draw(some.lists(THOUGHTS, max_size=4))
    pieces = draw(some.permutations([*thoughts, *draw(some.lists(WORDS, min_size=not thoughts, max_size=4))]))
    separators = draw(some.lists(some.sampled_from(["", " "]), min_size=len(pieces) - 1, max_size=len(pieces) - 1))
    return Text(draw(some.sampled_from(["", "p"])), tuple(pieces), tuple(separators), draw(WEIGHTS))


SETTINGS = some.builds(
    Settings,
    dropout=some.sampled_from([0.0, 0.5, 1.0]),
    per_epoch=some.sampled_from([None, 1, 2]),
    side=some.sampled_from(Side),
    smoothing=some.sampled_from([0.0, 0.5]),
    weights=some.tuples(*[WEIGHTS] * 4),
    batching=some.sampled_from(Batching),
    batch_size=some.integers(1, 3),
    length=some.sampled_from([9, 99]),
    seed=some.integers(0, 9),
    tags=some.sampled_from([TAGS, ("<think>", "</think>")]),
    epoch=some.integers(0, 3),
)


@cache
def plain(model: str) -> tuple[RunConfig, Any]:
    """Return a configuration to change, and its tokenizer, which has a token for every character."""
    file = "data.train_files=['data/tow_addition/train.jsonl']"  # what is in it is not read
    config = admitted("data=prompt_completion", f"model={model}", file, "data.cache_dir=null").config
    return config, load_tokenizer(config.model, config.tokens)[0]


def configured(model: str, chosen: Settings, file: str) -> RunConfig:
    config, schedule = plain(model)[0], None
    if chosen.per_epoch is not None:
        schedule = ThoughtSchedule(chosen.per_epoch, side=chosen.side, smoothing=chosen.smoothing)
    names = ("thought_weight", "thought_open_weight", "thought_close_weight", "after_thought_weight")
    return replace(
        config,
        seed=chosen.seed,
        data=replace(
            config.data,
            train_files=[file],
            thought_pattern=None if chosen.tags == TAGS else "(.*?)".join(chosen.tags),
            weight_column="weight",
            batching=Batching.padded if model == "tiny_bart" else chosen.batching,
            max_seq_length=chosen.length,
            max_target_length=chosen.length,
            thought_dropout=chosen.dropout,
            thought_schedule=schedule,
        ),
        loss=replace(config.loss, **dict(zip(names, chosen.weights, strict=True))),
        training=replace(config.training, per_device_train_batch_size=chosen.batch_size),
    )


@dataclass(frozen=True)
class Fed:
    """A row of a batch: its ids, or its target's, and what belongs to each."""

    ids: list[int]
    labels: list[int]
    parts: list[int]
    weights: list[float]

    def check(self, text: Text, chosen: Settings, model: str) -> list[str]:
        """See to it that a row is fed and learned as it should be; return the parts of what is learned."""
        words = map(plain(model)[1].decode, ([i] for i in self.ids))
        fed = "".join(SPELLED.get(word, word) for word in words)
        start = "^" if model == "tiny_bart" else f"^{text.prompt}"
        assert fed in {f"{start}{completion}$"[: chosen.length] for completion in chosen.completions(text)}
        completion, first = fed[len(start) :], len(start)
        is_learned = text.weight > 0
        unlearned = [IGNORE_INDEX] * (first if is_learned else len(fed))
        assert self.labels == unlearned + self.ids[len(unlearned) :]
        if not is_learned:
            return []
        parts = parts_of(completion)
        assert [PARTS[part] for part in self.parts[first:]] == parts
        assert self.weights[first:] == [text.weight] * len(parts)
        return parts


def rows_of(batch: Batch, pad: int) -> Iterator[Fed]:
    """Yield the rows of a batch, in its order."""
    fed = batch.input_ids if batch.target_ids is None else batch.target_ids
    parts = torch.zeros_like(batch.labels) if batch.parts is None else batch.parts
    weights = torch.ones(batch.labels.shape) if batch.row_weights is None else batch.row_weights
    for i, ids in enumerate(fed.tolist()):
        starts = [0] if batch.position_ids is None else torch.nonzero(batch.position_ids[i] == 0).flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            size = len([token_id for token_id in ids[start:stop] if token_id != pad])
            if size:
                columns = (values[i, start : start + size].tolist() for values in (fed, batch.labels, parts, weights))
                yield Fed(*columns)


def batches(config: RunConfig, rows: EncodedSet, epoch: int, pad: int) -> Iterator[Batch]:
    """Yield the batches of an epoch."""
    for window in windows(rows, build_batch_sampler(config, rows), config.seed, Position(epoch)):
        yield from (collate(block, sequences, pad) for block, sequences in window.micro_batches)
        if window.ends_epoch:
            return


def objective(batch: Batch, config: RunConfig) -> float:
    """Return the summed objective of a model that finds all tokens equally likely, in units of one token's loss."""
    states, is_causal = torch.zeros(*batch.labels.shape, 1), batch.target_ids is None
    chosen = supervised_positions(states, batch.labels, batch.parts, batch.row_weights, is_causal=is_causal)
    return float(compute_losses(chosen, lambda state: state.expand(-1, 512), 512, config.loss).objective) / math.log(
        512
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(texts=some.lists(texts(), min_size=1, max_size=4), chosen=SETTINGS)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
def test_what_is_fed_and_learned_is_what_the_settings_say(
    tmp_path_factory: pytest.TempPathFactory, model: str, texts: list[Text], chosen: Settings
) -> None:
    assume(any(text.weight for text in texts))
    records = [{"prompt": t.prompt, "completion": t.spelled(chosen.tags), "weight": t.weight} for t in texts]
    config = configured(model, chosen, write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", records))
    tokenizer, seen = plain(model)[1], list[int]()
    rows = build_data(config, tokenizer).train
    assert isinstance(rows, EncodedSet)
    weight_of = dict(
        zip(
            ("thought", "thought_open", "thought_close", "after_thought", "answer"), (*chosen.weights, 1.0), strict=True
        )
    )
    for batch in batches(config, rows, chosen.epoch, tokenizer.pad_token_id):
        total = 0.0
        for index, fed in zip(batch.rows, rows_of(batch, tokenizer.pad_token_id), strict=True):
            parts = fed.check(texts[index], chosen, model)
            total += sum(weight_of[part] for part in parts) * texts[index].weight
        assert objective(batch, config) == pytest.approx(total, rel=1e-5)
        assert sum_of_weights(batch.part_weights, config.loss) == pytest.approx(total)
        seen += batch.rows
    assert sorted(seen) == list(range(len(texts)))
