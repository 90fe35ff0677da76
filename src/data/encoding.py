"""Segments of text to rows of ids with the spans that are supervised. The mask is exact by construction, not searched.

Prompt and completion are tokenised apart and their ids joined, because that is what generation is fed. Supervised are
the completion's tokens and the EOS after it, which is appended as an id, and only to a completion that was not cut.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.config.schema import Overflow
from src.data.examples import Example
from src.data.text_encoder import PROBE, TextEncoder, last_turn, tokenizer_errors
from src.data.thought_finder import CUT
from src.errors import TokenError

Span = tuple[int, int, int]
"""The kind of supervised ids that follow one another, and where they are: [start, stop)."""
Cut = tuple[int, int]
"""Ids that are taken out: [start, stop)."""
Gone = Sequence[int]
"""How many ids are taken out of each supervised, closed thought of a row: from its left, negative from its right."""
IGNORE_INDEX = -100  # label of a position that is not supervised

ANSWER, THOUGHT = 0, 1
SPAN_KINDS = ("answer", "thought")
"""What a supervised token can be: part of a thought, its tags included, or of the answer."""

PARTS = ("answer", "thought", "thought_open", "thought_close", "after_thought")
"""What a supervised token is to the loss, by its number: `thought` is what stands between the tags, and `after_thought`
the answer's first token after a thought. A span's kind is the number of what most of it is."""
THOUGHT_OPEN, THOUGHT_CLOSE, AFTER_THOUGHT = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Lengths:
    """The longest row, in tokens; `target` is of an encoder-decoder's completion; None: `sequence` holds for both."""

    sequence: int
    target: int | None
    overflow: Overflow


@dataclass(slots=True)
class EncodedRow:
    """The ids of one row.

    `input_ids` are prompt and completion of a causal model, or an encoder's input; `target_ids` a decoder's, None for a
    causal model. `spans` are (kind, start, stop) of the supervised positions, in order, within the target or else the
    input. `prompt_length` counts the ids that generation is fed. `about_thoughts`: see thought_finder.
    """

    input_ids: list[int]
    target_ids: list[int] | None
    spans: list[Span]
    prompt_length: int
    is_truncated: bool
    num_control_tokens: int
    about_thoughts: tuple[str, ...] = ()

    @property
    def is_supervised(self) -> bool:
        return bool(self.spans)


class Encoder(TextEncoder):
    """A tokenizer that encodes rows."""

    def __init__(self, tokenizer: Any, tags: tuple[str, str] | None = None) -> None:
        super().__init__(tokenizer)
        if tokenizer.eos_token_id is None:
            raise TokenError("this tokenizer has no EOS token: a model could not learn where a completion ends")
        self.eos_token_id: int = tokenizer.eos_token_id
        self.eos_token: str = tokenizer.eos_token
        with tokenizer_errors(PROBE):
            self._prefix, self._suffix = _special_ids(tokenizer(PROBE)["input_ids"], tokenizer)
            # what a decoder is fed after its start token, before it writes
            self.target_prefix, _ = _special_ids(tokenizer(text_target=PROBE)["input_ids"], tokenizer)
        bos = tokenizer.bos_token_id
        self._causal_prefix = [bos] if bos is not None and self._prefix[:1] == [bos] else []
        self.tag_ids: tuple[int, int] | None = None
        if tags is not None:
            opened, closed = tokenizer.convert_tokens_to_ids(list(tags))
            self.tag_ids = opened, closed

    def encode(
        self, examples: Sequence[Example], lengths: Lengths, gone: Sequence[Gone] | None = None
    ) -> list[EncodedRow | None]:
        """Encode rows; None where one is too long and `overflow` does not cut it.

        `gone` is how many ids are taken out of each thought of each row before it is cut.
        """
        is_causal = lengths.target is None
        encoded = self.encode_segments([example.segments for example in examples], restarts=not is_causal)
        join = self._causal_row if is_causal else self._encoder_decoder_row
        each = zip(examples, encoded, [()] * len(examples) if gone is None else gone, strict=True)
        return [join(example, ids, n, lengths, its_gone) for example, (ids, n), its_gone in each]

    def thought_lengths(self, examples: Sequence[Example], *, is_causal: bool) -> list[list[int]]:
        """Return the number of ids between the tags of each supervised, closed thought, of rows that are not cut."""
        found = []
        for row in self.encode(examples, Lengths(sys.maxsize, None if is_causal else sys.maxsize, Overflow.error)):
            assert row is not None
            inner = self._between_tags(row.input_ids if row.target_ids is None else row.target_ids, row.spans)
            found.append([stop - start for start, stop in inner])
        return found

    def _causal_row(
        self, example: Example, segments: list[list[int]], num_control: int, lengths: Lengths, gone: Gone
    ) -> EncodedRow | None:
        """Join a row's segments after BOS, with EOS at the end, and cut what is too long."""
        has_prefix = example.segments[0].is_rendered and segments[0][:1] == self._causal_prefix
        ids = [] if has_prefix else list(self._causal_prefix)
        first = len(self._causal_prefix)  # never cut from the front
        supervised: list[tuple[int, int]] = []
        prompt_length = len(ids)
        for segment, segment_ids in zip(example.segments, segments, strict=True):
            start = len(ids)
            ids += segment_ids
            if segment.is_supervised and supervised and supervised[-1][1] == start:
                supervised[-1] = (supervised[-1][0], len(ids))
            elif segment.is_supervised:
                prompt_length = start
                supervised.append((start, len(ids)))
        if example.needs_eos:
            ids.append(self.eos_token_id)
            supervised[-1] = (supervised[-1][0], len(ids))
        if any(gone):
            cuts = self.cuts(ids, self._spans(ids, supervised), gone)
            ids, prompt_length = without(ids, cuts), moved(prompt_length, cuts)
            supervised = [(moved(start, cuts), moved(stop, cuts)) for start, stop in supervised]
        spans, excess = self._spans(ids, supervised), len(ids) - lengths.sequence
        if excess > 0:
            if lengths.overflow in (Overflow.drop, Overflow.error):
                return None
            if lengths.overflow is Overflow.truncate_prompt:
                cut = max(0, min(excess, prompt_length - first))
                ids = ids[:first] + ids[first + cut :]
                # of a thought that lost its beginning the rest is not supervised, its closing tag least of all
                whole = [span for span in spans if span[0] != THOUGHT or span[1] - cut >= first]
                spans = [(kind, max(first, start - cut), stop - cut) for kind, start, stop in whole]
                prompt_length -= cut
            ids = ids[: lengths.sequence]
            prompt_length = min(prompt_length, len(ids))
        # nothing before the very first id predicts it
        cut_spans = ((kind, max(1, start), min(stop, len(ids))) for kind, start, stop in spans)
        spans = [(kind, start, stop) for kind, start, stop in cut_spans if start < stop]
        about = self._about_cut(ids, spans) if excess > 0 else ()
        return EncodedRow(ids, None, spans, prompt_length, excess > 0, num_control, about)

    def _encoder_decoder_row(
        self, example: Example, segments: list[list[int]], num_control: int, lengths: Lengths, gone: Gone
    ) -> EncodedRow | None:
        """Join the prompt for the encoder and the completion for the decoder, with the tokenizer's special tokens."""
        assert lengths.target is not None
        first, stop = last_turn(example.segments)
        prompt = [i for ids in segments[:first] for i in ids]
        target = [*self.target_prefix, *(i for ids in segments[first:stop] for i in ids)]
        if example.needs_eos:
            target.append(self.eos_token_id)
        if example.segments[0].is_rendered and self._prefix and prompt[: len(self._prefix)] == self._prefix:
            prompt = prompt[len(self._prefix) :]  # written by the chat template already
        if any(gone):
            spans = self._spans(target, [(len(self.target_prefix), len(target))])
            target = without(target, self.cuts(target, spans, gone))
        room = lengths.sequence - len(self._prefix) - len(self._suffix)
        excess = len(prompt) - room
        is_long = excess > 0 or len(target) > lengths.target
        if is_long:
            if lengths.overflow in (Overflow.drop, Overflow.error):
                return None
            if excess > 0:
                prompt = prompt[excess:] if lengths.overflow is Overflow.truncate_prompt else prompt[: max(0, room)]
            target = target[: lengths.target]
        input_ids = [*self._prefix, *prompt, *self._suffix]
        spans = self._spans(target, [(len(self.target_prefix), len(target))]) if stop > first else []
        about = self._about_cut(target, spans) if is_long else ()
        return EncodedRow(input_ids, target, spans, len(input_ids), is_long, num_control, about)

    def _about_cut(self, ids: list[int], spans: list[Span]) -> tuple[str, ...]:
        """Return what to count of a row that is cut: whether its end is inside a thought."""
        is_inside = bool(spans) and spans[-1][0] == THOUGHT and spans[-1][2] == len(ids)
        return (CUT,) if is_inside and self.tag_ids is not None and ids[-1] != self.tag_ids[1] else ()

    def cuts(self, ids: Sequence[int], spans: Sequence[Span], gone: Gone) -> list[Cut]:
        """Return what is gone of the thoughts of a row (of an encoder-decoder's target) that has them whole."""
        each = zip(self._between_tags(ids, spans), gone, strict=True)
        return [(start, start + count) if count > 0 else (stop + count, stop) for (start, stop), count in each]

    def _between_tags(self, ids: Sequence[int], spans: Sequence[Span]) -> list[tuple[int, int]]:
        """Return [start, stop) between the tags of each thought that is closed; one at the very first id lacks its
        opening tag in its span.
        """
        assert self.tag_ids is not None
        opened, closed = self.tag_ids
        thoughts = [(start, stop) for kind, start, stop in spans if kind == THOUGHT and ids[stop - 1] == closed]
        return [(start + (ids[start] == opened), stop - 1) for start, stop in thoughts]

    def _spans(self, ids: list[int], supervised: list[tuple[int, int]]) -> list[Span]:
        """Split the supervised parts into thoughts, from tag to tag, and answers.

        One that a generation prompt has opened (DeepSeek R1's does) begins with what is supervised.
        """
        if self.tag_ids is None:
            return [(ANSWER, start, stop) for start, stop in supervised if stop > start]
        open_id, close_id = self.tag_ids
        spans, before = [], 0
        for start, stop in supervised:
            closed = _find(ids, close_id, start, stop)
            if closed < _find(ids, open_id, start, stop) and _last_of(ids[before:start], self.tag_ids) == open_id:
                spans.append((THOUGHT, start, closed + 1))
                start = closed + 1
            before = stop
            while start < stop:
                opened = _find(ids, open_id, start, stop)
                if opened > start:
                    spans.append((ANSWER, start, opened))
                if opened == stop:
                    break
                start = min(stop, _find(ids, close_id, opened, stop) + 1)
                spans.append((THOUGHT, opened, start))
        return spans


def without(ids: list[int], cuts: Sequence[Cut]) -> list[int]:
    """Return ids without those that are cut out."""
    kept = list(ids)
    for start, stop in reversed(cuts):
        del kept[start:stop]
    return kept


def moved(position: int, cuts: Sequence[Cut]) -> int:
    """Return where a position is once the cuts are made."""
    return position - sum(max(0, min(position, stop) - start) for start, stop in cuts)


def _find(ids: list[int], wanted: int, start: int, stop: int) -> int:
    """Return the first index of an id within [start, stop), or stop."""
    try:
        return ids.index(wanted, start, stop)
    except ValueError:
        return stop


def _last_of(ids: list[int], wanted: tuple[int, int]) -> int | None:
    """Return the last of the ids that is one of those wanted; None where there is none."""
    return next((i for i in reversed(ids) if i in wanted), None)


def _special_ids(ids: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer itself puts before and after the probe."""
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start], ids[start + len(bare) :]
    raise TokenError("this tokenizer changes a text when it adds its special tokens; it can't be used")
